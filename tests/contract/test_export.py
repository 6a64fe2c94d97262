"""torch.export and ONNX with a dynamic batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergence
from mergence import method as methods
from mergence import ops
from mergence.method import Method, names
from mergence.plan import TokenView


@pytest.mark.slow
def test_the_exported_model_agrees_at_every_batch_size(
    exportable: nn.Module, image: Tensor, inputs: Any, output: Any
) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(exportable, (image,), dynamic_shapes=({0: batch},))
    exported = program.module()
    for other in (image, image[:1], inputs(5)):
        # An exported graph merges without scatter, in another order of float32 sums.
        found, expected = output(exported, other), output(exportable, other)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


class Steps(nn.Module):
    """Planning and merging alone, `[B, 1, N, C]` tokens to `[B, slots, C]` for each method."""

    def __init__(self, *methods: Method) -> None:
        super().__init__()
        self.methods = methods

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = x.squeeze(1)
        view = TokenView(
            x=x,
            size=torch.ones(x.shape[:2]) + (x[:, :, 0] > 0),
            block=9,
            depth=12,
            _importance=x[:, :, 1].softmax(dim=1),
            _keys=x[:, :, 2:],
            _received=x[:, :, 2].softmax(dim=1),
        )
        merged = [ops.merge(x, view.size, method.plan(view, 9)) for method in self.methods]
        return tuple(tokens * size.unsqueeze(2) for tokens, size in merged)


@pytest.mark.slow
def test_every_method_becomes_a_graph_without_scatter_or_shapes_that_depend_on_values(
    tmp_path: Path,
) -> None:
    # One graph for all of them: the exporter takes seconds for any.
    every = Steps(*(methods.build(name, {}) for name in names())).eval()
    done = mergence.export(every, tmp_path / "m.onnx", torch.randn(20, 1, 12, 8))
    assert done.agreement.off == 0
    assert not any("Scatter" in operator for operator in done.operators)


# What reductions are made of in exported programs. ExecuTorch 1.5 ran all of it; before one is
# added here, it must have been tried.
RUN = """
    add alias amax amin any arange bmm cat clamp clone constant_pad_nd cumsum div elu embedding eq
    expand full full_like gather gt isnan le log logical_and logical_or lt max mean mul ne neg
    permute pow scalar_tensor select slice _softmax squeeze sub sum _to_copy topk unsqueeze view
    where
"""


def operators(model: nn.Module, images: Tensor) -> set[str]:
    program = torch.export.export(model.eval(), (images,)).run_decompositions()
    calls = [node.target for node in program.graph.nodes if node.op == "call_function"]
    named = {str(call.overloadpacket) for call in calls if hasattr(call, "overloadpacket")}
    return {name.removeprefix("aten.") for name in named} - {"_assert_tensor_metadata"}


# `random` hashes the places of tokens with integers.
@pytest.mark.parametrize("method", [name for name in names() if name != "random"])
def test_every_method_has_operators_that_executorch_knows(method: str) -> None:
    step = Steps(methods.build(method, {}))
    assert {"topk", "gather"} <= operators(step, torch.randn(4, 1, 12, 8)) <= set(RUN.split())


def test_coarse_patches_have_operators_that_executorch_knows(
    vit: nn.Module, image: Tensor, shorten: Any
) -> None:
    known = operators(shorten(vit, 1), image) | set(RUN.split())
    model = mergence.apply(vit, schedule=[20], coarse=0.4)
    assert mergence.describe(model).start < mergence.describe(model).patches
    assert operators(model, image) <= known


@pytest.mark.slow
def test_a_model_of_every_library_becomes_an_onnx_graph(
    of_library: nn.Module, inputs: Any, tmp_path: Path
) -> None:
    done = mergence.export(of_library, tmp_path / "m.onnx", inputs(20))
    assert done.agreement.off == 0
