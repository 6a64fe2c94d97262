"""torch.compile without graph breaks and without recompiling."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import mergence
from mergence import family, ops
from mergence import method as methods
from mergence.method import names
from mergence.outputs import answer

pytestmark = pytest.mark.usefixtures("fresh_compiler")


# One method of each sort in the fast tier: tracing is slow.
@pytest.mark.parametrize(
    "method",
    [
        pytest.param(name, marks=[] if name in ("mergence", "tome", "topk") else pytest.mark.slow)
        for name in names()
    ],
)
def test_planning_and_merging_compile_in_one_graph(method: str, view: Any) -> None:
    tokens = view(
        torch.randn(2, 9, 4),
        importance=torch.rand(2, 9),
        keys=torch.randn(2, 9, 3),
        received=torch.rand(2, 9),
    )
    rule = methods.build(method, {})

    def step(x: Tensor) -> Tensor:
        return ops.merge(x, tokens.size, rule.plan(tokens, 6))[0]

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    assert torch.equal(compiled(tokens.x), step(tokens.x))


@pytest.mark.slow
def test_the_whole_forward_is_one_graph_and_compiles_once(
    compilable: nn.Module, image: Tensor, output: Any
) -> None:
    compiled = torch.compile(compilable, fullgraph=True, backend="eager")
    first = output(compiled, image)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(output(compiled, image), first)
    assert torch.equal(first, output(compilable, image))


@pytest.mark.slow
def test_it_compiles_once_for_disabled_however_deep(
    vit: nn.Module, image: Tensor, output: Any, shorten: Any
) -> None:
    short = shorten(vit, 1)
    expected = output(short, image)
    compiled = torch.compile(mergence.apply(short, "topk", keep_rate=0.7), backend="eager")
    reduced = output(compiled, image)
    with mergence.disabled(short):
        output(compiled, image)
    with torch.compiler.set_stance("fail_on_recompile"):
        with mergence.disabled(short), mergence.disabled(short), mergence.disabled(short):
            assert torch.equal(output(compiled, image), expected)
        assert torch.equal(output(compiled, image), reduced)


@pytest.mark.slow
def test_it_compiles_again_for_gradients_and_for_another_batch(
    vit: nn.Module, image: Tensor, output: Any, shorten: Any
) -> None:
    short = mergence.apply(shorten(vit, 2), "topk", keep_rate=0.7)  # never ran uncompiled
    compiled = torch.compile(short, fullgraph=True, backend="eager")
    without, with_gradients = output(compiled, image), compiled(image)
    one = output(compiled, image[:1])
    assert with_gradients.requires_grad
    assert torch.equal(without, output(short, image))
    assert torch.equal(with_gradients, short(image))
    assert torch.equal(one, output(short, image[:1]))


@pytest.mark.slow
def test_blocks_that_are_compiled_one_by_one_know_of_each_other(
    of_library: nn.Module, image: Tensor, output: Any, threads: Any
) -> None:
    expected = output(of_library, image)
    blocks = family.find(of_library).inspect(of_library).blocks
    for block in blocks:
        block.compile(backend="eager")
    with torch._dynamo.config.patch(recompile_limit=2 * len(blocks)):
        assert torch.equal(output(of_library, image), expected)
        with threads(1) as pool:
            assert torch.equal(pool.submit(output, of_library, image).result(), expected)


@pytest.mark.slow
def test_graph_breaks_between_blocks_lose_nothing(vit: Any, image: Tensor, output: Any) -> None:
    mergence.apply(vit, keep_rate=0.7)
    for block in vit.blocks:
        block.register_forward_hook(lambda *_: torch._dynamo.graph_break())
    expected = output(vit, image)
    compiled = torch.compile(vit, backend="eager")
    with torch._dynamo.config.patch(recompile_limit=20):
        assert torch.equal(output(compiled, image), expected)


@pytest.mark.slow
def test_most_blocks_that_are_compiled_one_by_one_share_their_code(
    image: Tensor, output: Any
) -> None:
    # torch compiles one function eight times and then no more, and all blocks are one function. One
    # of the eight is for both numbers of tokens at which a block removes none: sizes are dynamic.
    model = timm.create_model("vit_tiny_patch16_224", img_size=96, embed_dim=48, num_heads=3).eval()
    mergence.apply(model, macs=0.67)
    torch._dynamo.reset()  # what other tests compiled has taught it which sizes are
    for block in model.blocks:
        block.compile(backend="eager", dynamic=True)
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        output(model, image)


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


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_in_a_compiled_graph_is_that_of_eager_mode(
    dtype: torch.dtype, vit: Any, image: Tensor, shorten: Any, output: Any
) -> None:
    model = mergence.apply(shorten(vit, 2), "mergence", keep_rate=0.7)
    single = output(model, image)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.autocast("cpu", dtype=dtype):
        found, expected = output(compiled, image), output(model, image)
    assert found.dtype == expected.dtype == dtype
    assert torch.equal(found, expected)
    assert not torch.equal(found.float(), single)


@pytest.mark.slow
@pytest.mark.parametrize("one_graph", [True, False], ids=["one graph", "graph breaks"])
def test_gradient_checkpointing_in_compiled_code_gives_the_same_gradients(
    one_graph: bool, vit: Any, image: Tensor, shorten: Any
) -> None:
    model = mergence.apply(shorten(vit, 2), "mergence", keep_rate=0.7)

    def gradients(call: Any) -> dict[str, Tensor]:
        model.zero_grad()
        answer(call(image)).square().sum().backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    expected = gradients(model)
    model.set_grad_checkpointing()
    # A reduced block notes the sizes of its tokens, which the compiler takes for a side effect.
    allowed = "skip_fwd_side_effects_in_bwd_under_checkpoint"
    if one_graph and not hasattr(torch._dynamo.config, allowed):
        pytest.skip(f"this torch has no {allowed}")
    with torch._dynamo.config.patch({allowed: True} if one_graph else {}):
        compiled = torch.compile(model, fullgraph=one_graph, backend="aot_eager")
        found = gradients(compiled)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
