"""torch.jit.trace, which converters for phones and other runtimes begin with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergence
from mergence.outputs import answer


class Answer(nn.Module):
    """A model whose answer is a tensor, whatever its library wraps it in."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, image: Tensor) -> Tensor:
        return answer(self.model(image))


def check(model: nn.Module, image: Tensor, other: Tensor) -> None:
    model = Answer(model).eval()
    with torch.no_grad():
        traced: Any = torch.jit.trace(model, image)
        for images in (image, other):
            torch.testing.assert_close(traced(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_traced_model_agrees_at_every_batch_size(
    short_reduced: nn.Module, image: Tensor, inputs: Any
) -> None:
    check(short_reduced, image, inputs(3))


@pytest.mark.filterwarnings("ignore")
def test_so_does_one_that_reads_coarsely(vit: nn.Module, image: Tensor, inputs: Any) -> None:
    check(mergence.apply(vit, macs=0.4), image, inputs(3))
