"""The architectures people use, at full size with random weights."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import mergence

ARCHITECTURES = {
    "deit_tiny_patch16_224": {},
    "deit_tiny_distilled_patch16_224": {},
    "deit3_small_patch16_224": {},
    "vit_small_patch14_dinov2": {"img_size": 224},  # 518 takes half a minute and tests no more
    "vit_small_patch14_reg4_dinov2": {"img_size": 224},
    "vit_base_patch16_clip_224": {},
    "vit_base_patch16_siglip_224": {},
}


def _unsettle(module: nn.Module) -> None:
    # LayerScale starts at 1e-5 or 1e-6: a block that forgot it would hardly show.
    if isinstance(getattr(module, "gamma", None), nn.Parameter):
        nn.init.normal_(module.gamma)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_keep_all_is_bit_identical_and_remove_is_exact(
    name: str, output: Any, spec: Any, snapshot: Any
) -> None:
    model = timm.create_model(name, **ARCHITECTURES[name]).eval().apply(_unsettle)
    image: Tensor = torch.randn(1, 3, 224, 224)
    expected, before, found = output(model, image), snapshot(model), spec(model)
    mergence.apply(model, schedule=[found.patches] * len(found.blocks))
    assert torch.equal(output(model, image), expected)
    mergence.apply(model, macs=0.67)
    assert mergence.describe(model).macs_ratio <= 0.67
    assert not torch.equal(output(model, image), expected)
    mergence.remove(model)
    assert snapshot(model) == before
    assert torch.equal(output(model, image), expected)
