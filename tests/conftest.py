"""What tests of every folder share."""

from __future__ import annotations

import copy
import gc
import io
import os
import pickle
import resource
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor, nn

from mergence import family, ops
from mergence.plan import TokenView

# Derandomised: a red run can be repeated, and a green one stays green on another machine.
settings.register_profile("mergence", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("mergence")

if not torch.cuda.is_available():
    # Triton reads this when it is first imported. Nothing else of the suite uses Triton on a CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; a thread pool in each of them would only wait for the others.
    torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """Leave what is imported out of the garbage collector's rounds: a fifth of all time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 20, 100)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give tests every kind of tiny model; the fast tier has one a library."""
    if "tiny_model" in metafunc.fixturenames:
        kinds = [
            pytest.param(f"{f.name}-{kind}", marks=[pytest.mark.slow] if number else [])
            for f in family.registry().values()
            for number, kind in enumerate(f.tiny())
        ]
        metafunc.parametrize("tiny_model", kinds, indirect=True)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """What was compiled before, and what failed then and is not tried again, has no effect."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def disk_with_room_for() -> Callable[[int], AbstractContextManager[None]]:
    """Files cannot grow beyond so many bytes: writing fails midway, as on a full disk."""

    @contextmanager
    def full(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return full


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Of each merge of the test: the patch tokens before and after it, and the slots."""
    plain, found = ops.merge, []

    def merge(x: Tensor, size: Tensor, plan: Any, prefix: int = 0) -> tuple[Tensor, Tensor]:
        merged, sizes = plain(x, size, plan, prefix)
        found.append((x[:, prefix:], merged[:, prefix:], plan.slot))
        return merged, sizes

    monkeypatch.setattr(ops, "merge", merge)
    return found


@pytest.fixture(scope="session")
def by_hand() -> Callable[..., Tensor]:
    """Gives every patch its value, one by one, from tokens `[B, N, C]` and the merges before."""

    def one(now: Tensor, before: Tensor, after: Tensor, slot: Tensor) -> Tensor:
        a, b = now - now.mean(dim=0), after - after.mean(dim=0)
        left = float((a * b).sum() / b.square().sum()) if len(b) > 1 else 1.0
        left = min(max(left, 0.0), 1.0)
        zero = torch.zeros_like(now[0])
        return torch.stack(
            [
                (now[s] if s >= 0 else zero) + left * (x - (after[s] if s >= 0 else zero))
                for x, s in zip(before, slot.tolist(), strict=True)
            ]
        )

    def every(tokens: Tensor, merges: Any) -> Tensor:
        full = list(tokens)
        for step in reversed([step for step in merges if step[0].shape[1] > tokens.shape[1]]):
            full = [one(now, *parts) for now, *parts in zip(full, *step, strict=True)]
        return torch.stack(full)

    return every


@pytest.fixture(scope="session")
def view() -> Callable[..., TokenView]:
    """Builds what a method sees, `[N, C]` lists or `[B, N, C]` tensors alike."""

    def build(
        x: Any,
        *,
        importance: Any = None,
        keys: Any = None,
        received: Any = None,
        size: Any = None,
        block: int = 1,
    ) -> TokenView:
        def batched(value: Any, ndim: int) -> Tensor:
            tensor = torch.as_tensor(value, dtype=torch.float32)
            return tensor if tensor.ndim == ndim else tensor.unsqueeze(0)

        x = batched(x, 3)
        return TokenView(
            x=x,
            size=torch.ones(x.shape[:2]) if size is None else batched(size, 2),
            block=block,
            depth=12,
            _importance=None if importance is None else batched(importance, 2),
            _keys=None if keys is None else batched(keys, 3),
            _received=None if received is None else batched(received, 2),
        )

    return build


@pytest.fixture(scope="session")
def replica() -> Callable[[Hashable, Callable[[], nn.Module]], nn.Module]:
    """Copies of the module that a function builds, which is called once for each key."""

    # From bytes and tensors a copy is made six times as fast as by deepcopy or from the start.
    frozen: dict[Hashable, tuple[bytes, list[Tensor]]] = {}

    def freeze(module: nn.Module) -> tuple[bytes, list[Tensor]]:
        tensors: list[Tensor] = []

        class Pickler(pickle.Pickler):
            def persistent_id(self, part: object) -> int | None:
                if not isinstance(part, Tensor):
                    return None
                tensors.append(part)
                return len(tensors) - 1

        file = io.BytesIO()
        Pickler(file).dump(module)
        return file.getvalue(), tensors

    templates: dict[Hashable, nn.Module] = {}  # of what its library does not let be pickled

    def build(key: Hashable, first: Callable[[], nn.Module]) -> nn.Module:
        if key not in frozen and key not in templates:
            module = first()
            try:
                frozen[key] = freeze(module)
            except AttributeError:  # a local function in it
                templates[key] = module
        if key in templates:
            return copy.deepcopy(templates[key])
        data, tensors = frozen[key]
        copies = copy.deepcopy(tensors)

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, index: int) -> Tensor:
                return copies[index]

        restored: nn.Module = Unpickler(io.BytesIO(data)).load()
        return restored

    return build


@pytest.fixture(scope="session")
def fresh(replica: Any) -> Callable[[str], nn.Module]:
    """Copies of the families' tiny models, by names such as `timm-vit`."""

    def build(name: str) -> nn.Module:
        library, _, kind = name.partition("-")
        model: nn.Module = replica(name, family.registry()[library].tiny()[kind])
        return model

    return build


@pytest.fixture
def tiny_model(request: pytest.FixtureRequest, fresh: Callable[[str], nn.Module]) -> nn.Module:
    """A tiny model of each kind of each family."""
    return fresh(request.param)


@pytest.fixture(scope="session")
def shorten() -> Callable[[nn.Module, int], nn.Module]:
    """Cuts a model to its first blocks, for what takes seconds a block."""

    def cut(model: nn.Module, blocks: int) -> nn.Module:
        gone = family.find(model).inspect(model).blocks[blocks:]
        for module in model.modules():
            if isinstance(module, nn.Sequential | nn.ModuleList):
                for index in reversed(range(len(module))):
                    if any(module[index] is block for block in gone):
                        del module[index]
        assert len(family.find(model).inspect(model).blocks) == blocks
        return model

    return cut


@pytest.fixture(scope="session")
def attend() -> Callable[[nn.Module, str], None]:
    """Switches a model to fused ("sdpa") or explicit ("eager") attention where it has both."""

    def switch(model: nn.Module, kernel: str) -> None:
        if hasattr(model, "set_attn_implementation"):
            try:
                model.set_attn_implementation(kernel)
            except ValueError:  # of it or of a part of it
                pytest.skip("this release of the library has no fused attention for it")
        for module in model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = kernel == "sdpa"

    return switch
