"""torch.export with a dynamic batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergence
from mergence.method import names

pytestmark = pytest.mark.slow


def check(model: nn.Module, image: Tensor, output: Any) -> None:
    """Export with one batch size, compare at others."""
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(model, (image,), dynamic_shapes=({0: batch},)).module()
    for other in (image, image[:1], image.repeat(3, 1, 1, 1)[:5]):
        torch.testing.assert_close(output(exported, other), output(model, other), rtol=0, atol=0)


@pytest.mark.parametrize("method", names())
def test_every_method_exports_with_a_dynamic_batch(
    vit: nn.Module, method: str, image: Tensor, output: Any, shorten: Any
) -> None:
    check(mergence.apply(shorten(vit), method, keep_rate=0.7), image, output)


def test_every_kind_of_model_exports_with_a_dynamic_batch(
    dense: nn.Module, image: Tensor, output: Any, shorten: Any
) -> None:
    check(mergence.apply(shorten(dense, 2), "mergence", keep_rate=0.7), image, output)
