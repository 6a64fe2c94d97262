"""torch.export with a dynamic batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn


@pytest.mark.slow
def test_the_exported_model_agrees_at_every_batch_size(
    exportable: nn.Module, image: Tensor, output: Any
) -> None:
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(exportable, (image,), dynamic_shapes=({0: batch},))
    exported = program.module()
    for other in (image, image[:1], torch.randn(5, 3, 96, 96)):
        assert torch.equal(output(exported, other), output(exportable, other))
