"""torch.jit.trace, which converters for other runtimes begin with."""

from __future__ import annotations

from typing import Any

import openvino
import pytest
import torch
from torch import Tensor, nn

import mergence
from mergence.method import names
from mergence.outputs import answer

# What reduced models have in their graphs beside what dense ones have. OpenVINO 2026.4 and
# coremltools 9 converted all of it; before one is added here, both must have been tried.
CONVERTED = """
    add_ amax amin any arange argsort avg_pool2d bitwise_not clamp clamp_ clamp_min contiguous
    cumsum detach div elu embedding eq expand_as floor_divide full_like gather gt isnan le
    linalg_vector_norm linspace log logical_and logical_or lt masked_fill matmul max mean mul
    mul_ ne neg neg_ ones ones_like pad pow remainder rsub ScalarImplicit softmax square
    square_ squeeze stack sub sub_ sum to topk unsqueeze where
"""

pytestmark = pytest.mark.filterwarnings("ignore")  # torch finds tracing deprecated


class Answer(nn.Module):
    """A model whose answer is a tensor, whatever its library wraps it in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return answer(self.model(image))


def traced(model: nn.Module, image: Tensor) -> Any:
    with torch.no_grad():
        return torch.jit.trace(model.eval(), image)


def operators(model: nn.Module, image: Tensor) -> set[str]:
    nodes = traced(model, image).inlined_graph.nodes()
    return {kind.removeprefix("aten::") for n in nodes if (kind := n.kind()).startswith("aten::")}


@pytest.mark.slow
def test_a_traced_model_agrees_at_every_batch_size(
    traceable: nn.Module, image: Tensor, inputs: Any, output: Any
) -> None:
    model = Answer(traceable)
    graph = traced(model, image)
    for images in (image, inputs(3)):
        found, expected = output(graph, images), output(model, images)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# `random` hashes the places of tokens with integers.
@pytest.mark.parametrize("method", [name for name in names() if name != "random"])
def test_every_method_has_operators_that_converters_know(
    vit: nn.Module, method: str, image: Tensor, shorten: Any
) -> None:
    short = shorten(vit, 2)
    known = operators(short, image) | set(CONVERTED.split())
    assert operators(mergence.apply(short, method, schedule=[25, 25]), image) <= known


@pytest.mark.parametrize("side", [96, 112])  # seven rows of patches: one of them is in no region
def test_no_tensor_has_more_dimensions_than_core_ml_knows(vit: Any, side: int) -> None:
    vit.set_input_size(img_size=side)
    model = mergence.apply(vit, macs=0.4)
    assert mergence.describe(model).start < mergence.describe(model).patches
    nodes = traced(model, torch.randn(1, 3, side, side)).inlined_graph.nodes()
    tensors = [v.type().dim() for n in nodes for v in n.outputs() if v.isCompleteTensor()]
    assert max(tensors) == 5


def test_openvino_runs_a_model_that_reads_coarsely(
    vit: nn.Module, image: Tensor, inputs: Any, output: Any, shorten: Any
) -> None:
    short = shorten(vit, 2)
    known = operators(short, image) | set(CONVERTED.split())
    model = mergence.apply(short, schedule=[20, 8], coarse=0.5).eval()
    assert mergence.describe(model).start < mergence.describe(model).patches
    assert operators(model, image) <= known
    graph = openvino.convert_model(model, example_input=image, input=[-1, *image.shape[1:]])
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    run = openvino.Core().compile_model(graph, "CPU", exact)
    for images in (image, inputs(3)):
        found = torch.from_numpy(run(images.numpy())[0])
        torch.testing.assert_close(found, output(model, images), rtol=1e-4, atol=1e-5)
