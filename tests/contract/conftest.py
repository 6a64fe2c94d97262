"""Every method x every family's tiny models: both lists come from the registries.

A family's tiny models take 96 x 96 colour images, or what its `input_shape` says.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergence
from mergence import family
from mergence.family import ModelSpec
from mergence.method import names
from mergence.outputs import answer

Output = Callable[[nn.Module, Tensor], Tensor]
Snapshot = Callable[[nn.Module], object]
Fresh = Callable[[str], nn.Module]
KEEP_RATE = 0.7  # three reductions, each small enough for every method


# The whole product would take half an hour. Methods do not know libraries and families do not know
# methods, so cuts through it are run.
# - In pairs, every model meets a method and every method a model: every promise.
# - Every method meets one plain model: every promise.
# - Every method meets one model a library, and the first model of every family one method of each
#   sort (merges into what stays, merges pairs, drops): the promises marked `full_product`.
# The fast tier has the plain model and one model a library; all else is slow.
PLAIN = "timm-vit"
KINDS = [f"{f.name}-{kind}" for f in family.registry().values() for kind in f.tiny()]
# timm_eva and the like are of timm.
LIBRARIES = [
    f for f in family.registry() if not any(f.startswith(f"{g}_") for g in family.registry())
]
FIRST_OF_LIBRARY = [next(k for k in KINDS if k.startswith(f"{name}-")) for name in LIBRARIES]
SORTS = ("mergence", "tome", "topk")
PAIRS = [
    (KINDS[i % len(KINDS)], names()[i % len(names())]) for i in range(max(len(KINDS), len(names())))
]
FIRST_OF_FAMILY = {
    f"{f.name}-{next(iter(f.tiny()))}" for f in family.registry().values() if f.tiny()
}
EVERY_PROMISE = {*PAIRS, *product([PLAIN], names())}
FULL_PRODUCT = {*product(FIRST_OF_LIBRARY, names()), *product(FIRST_OF_FAMILY, SORTS)}
FAST = {*product([PLAIN], names()), *(pair for pair in PAIRS if pair[0] in FIRST_OF_LIBRARY)}


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "full_product: run on more models x methods")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each test its models and methods."""
    if "dense" not in metafunc.fixturenames:
        return
    if "method" not in metafunc.fixturenames:
        kinds = [
            pytest.param(kind, marks=[] if kind in (PLAIN, *FIRST_OF_LIBRARY) else pytest.mark.slow)
            for kind in KINDS
        ]
        metafunc.parametrize("dense", kinds, indirect=True)
        return
    full = metafunc.definition.get_closest_marker("full_product") is not None
    chosen = EVERY_PROMISE | FULL_PRODUCT if full else EVERY_PROMISE
    pairs = [
        pytest.param(*pair, marks=[] if pair in FAST else pytest.mark.slow, id="-".join(pair))
        for pair in product(KINDS, names())
        if pair in chosen
    ]
    metafunc.parametrize(("dense", "method"), pairs, indirect=True)


@pytest.fixture
def dense(request: pytest.FixtureRequest, fresh: Fresh) -> nn.Module:
    """A tiny model of each kind of each family, untouched; see `pytest_generate_tests`."""
    return fresh(request.param)


@pytest.fixture
def method(request: pytest.FixtureRequest) -> str:
    """The name of each method."""
    return str(request.param)


@pytest.fixture
def reduced(dense: nn.Module, method: str) -> nn.Module:
    """Each tiny model, reduced by each method."""
    return mergence.apply(dense, method, keep_rate=KEEP_RATE)


def _and_first_kinds(some: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Some of the pairs, and those of the first kind of each family."""
    return [pair for pair in PAIRS if pair in some or pair[0] in FIRST_OF_FAMILY]


# Following a forward takes seconds: the first kind of a family is followed in both ways, compiled
# and traced, and every other in one; compiling takes twice as long.
@pytest.fixture(params=_and_first_kinds(PAIRS[::3]), ids="-".join)
def compilable(request: pytest.FixtureRequest, fresh: Fresh, shorten: Any) -> nn.Module:
    """Every third kind of model with one of the methods, two blocks deep."""
    return _short(*request.param, fresh, shorten)


@pytest.fixture(params=_and_first_kinds([*PAIRS[1::3], *PAIRS[2::3]]), ids="-".join)
def traceable(request: pytest.FixtureRequest, fresh: Fresh, shorten: Any) -> nn.Module:
    """The others, in the same way."""
    return _short(*request.param, fresh, shorten)


# Export takes longer still: a model of every family, and a part of the others.
@pytest.fixture(params=_and_first_kinds(PAIRS[::6]), ids="-".join)
def exportable(request: pytest.FixtureRequest, fresh: Fresh, shorten: Any) -> nn.Module:
    """Every sixth of the short models, and those of the first kinds."""
    return _short(*request.param, fresh, shorten)


# ONNX takes longest, and so does compiling block by block, which is the same for all families.
@pytest.fixture(params=[pair for pair in PAIRS if pair[0] in FIRST_OF_LIBRARY], ids="-".join)
def of_library(request: pytest.FixtureRequest, fresh: Fresh, shorten: Any) -> nn.Module:
    """One of the short models a library."""
    return _short(*request.param, fresh, shorten)


def _short(kind: str, method: str, fresh: Fresh, shorten: Any) -> nn.Module:
    """A reduction after the first of two blocks: the second attends to tokens of several sizes."""
    once = mergence.KeepRate(keep_rate=KEEP_RATE, blocks=(1,))
    return mergence.apply(shorten(fresh(kind), 2), method, schedule=once)


@pytest.fixture
def vit(fresh: Fresh) -> nn.Module:
    """One plain tiny model, where the kind of model makes no difference."""
    return fresh(PLAIN)


@pytest.fixture
def inputs(request: pytest.FixtureRequest, fresh: Fresh) -> Callable[[int], Tensor]:
    """Makes random inputs of the shape that the test's model takes, as many as asked."""
    parameters = request.node.callspec.params if hasattr(request.node, "callspec") else {}
    chosen = [
        p
        for n, p in parameters.items()
        if n in ("dense", "compilable", "traceable", "exportable", "of_library")
    ]
    kind = next(iter(chosen), PLAIN)
    kind = kind if isinstance(kind, str) else kind[0]
    shape = family.registry()[kind.partition("-")[0]].input_shape(fresh(kind))
    return lambda batch: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))


@pytest.fixture
def image(inputs: Callable[[int], Tensor]) -> Tensor:
    """Two images."""
    return inputs(2)


@pytest.fixture
def threads() -> Callable[[int], ThreadPoolExecutor]:
    """Makes threads in which torch computes with as many of its own as in this one.

    They inherit none, and sums depend on their number.
    """

    def make(number: int) -> ThreadPoolExecutor:
        found = torch.get_num_threads()
        return ThreadPoolExecutor(number, initializer=torch.set_num_threads, initargs=(found,))

    return make


@pytest.fixture(scope="session")
def spec() -> Callable[[nn.Module], ModelSpec]:
    """Reads the structure of a model, reduced or not."""
    return lambda model: family.find(model).inspect(model)


@pytest.fixture(scope="session")
def output() -> Output:
    """Runs a model without gradients; its answer, whatever the library wraps it in."""

    def run(model: nn.Module, image: Tensor) -> Tensor:
        with torch.no_grad():
            return answer(model(image))

    return run


@pytest.fixture(scope="session")
def snapshot() -> Snapshot:
    """Everything that is attached to any module: class, attributes, parameters, hooks, in order."""

    def take(model: nn.Module) -> object:
        def shallow(value: object) -> object:
            return list(value.items()) if isinstance(value, dict) else value

        return [
            (name, type(module), [(k, shallow(v)) for k, v in module.__dict__.items()])
            for name, module in model.named_modules()
        ]

    return take


@pytest.fixture(scope="session")
def token_counts() -> Callable[..., Any]:
    """Context manager: the tokens that leave each block, prefix left out, while it is open."""

    @contextmanager
    def watch(blocks: tuple[nn.Module, ...], prefix: int) -> Iterator[list[int]]:
        seen: list[int] = []

        def note(module: nn.Module, arguments: Any, y: Any) -> None:
            seen.append((y if isinstance(y, Tensor) else y[0]).shape[1] - prefix)

        handles = [block.register_forward_hook(note) for block in blocks]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    return watch
