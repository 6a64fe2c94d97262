"""torch.compile without graph breaks and without recompiling."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergence
from mergence import method as methods
from mergence import ops
from mergence.method import names


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.fixture
def short(vit: nn.Module, shorten: Any) -> nn.Module:
    """A plain model of three blocks, each of which reduces."""
    return shorten(vit)


@pytest.mark.parametrize("method", names())
def test_planning_and_merging_compile_in_one_graph(method: str, view: Any) -> None:
    tokens = view(torch.randn(2, 9, 4), importance=torch.rand(2, 9), keys=torch.randn(2, 9, 3))
    rule = methods.build(method, {})

    def step(x: Tensor) -> Tensor:
        return ops.merge(x, tokens.size, rule.plan(tokens, 6))[0]

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(tokens.x), step(tokens.x))


@pytest.mark.slow
@pytest.mark.parametrize("method", names())
def test_the_whole_forward_is_one_graph(
    short: nn.Module, method: str, image: Tensor, output: Any
) -> None:
    mergence.apply(short, method, keep_rate=0.7)
    expected = output(short, image)
    compiled = torch.compile(short, fullgraph=True, backend="eager")
    assert torch.equal(output(compiled, image), expected)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(output(compiled, image), expected)


@pytest.mark.slow
def test_a_model_that_never_ran_compiles(short: nn.Module, image: Tensor, output: Any) -> None:
    mergence.apply(short, "topk", keep_rate=0.7)
    compiled = output(torch.compile(short, fullgraph=True, backend="eager"), image)
    assert torch.equal(compiled, output(short, image))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["timm-siglip", "timm-dinov2_reg"])
def test_heads_that_pool_by_size_and_registers_compile(
    kind: str, image: Tensor, output: Any, tiny: Any, shorten: Any
) -> None:
    model = mergence.apply(shorten(tiny(kind)), "mergence", keep_rate=0.7)
    expected = output(model, image)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    # Not exact: decompositions may sum in another order.
    torch.testing.assert_close(output(compiled, image), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_inductor_agrees_with_eager(
    vit: nn.Module, image: Tensor, output: Any, shorten: Any
) -> None:
    # One block with one reduction: the C++ compiler takes most of a minute for three.
    mergence.apply(shorten(vit, 1), "mergence", keep_rate=0.7)
    expected = output(vit, image)
    compiled = torch.compile(vit, fullgraph=True)
    # Not exact: generated kernels sum in another order.
    torch.testing.assert_close(output(compiled, image), expected, rtol=1e-4, atol=1e-5)
