"""Patches that are all alike can merge at no loss at all: the reduced model must equal the dense.

This goes through everything at once: the merge, the sizes, size attention and pooling by size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mergence

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", {}),
    "layer scale and qk norm": ("vit_tiny_patch16_224", {"init_values": 0.5, "qk_norm": True}),
    "average": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
    "attention": ("vit_base_patch16_siglip_224", {}),
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, small: Any) -> Any:
    name, options = KINDS[request.param]
    model = small(name, **options)
    torch.nn.init.zeros_(model.pos_embed)
    return model


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("method", ["mergence", "mstm", "tome", "evit"])
def test_merging_equal_patches_changes_nothing(model: Any, method: str, fused: bool) -> None:
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64).repeat(1, 1, 4, 4)
    expected = model(image)
    mergence.apply(model, method, keep_rate=0.6, size_attention=True)
    # Sizes and weights are float32.
    torch.testing.assert_close(model(image), expected, rtol=1e-5, atol=1e-5)
    mergence.apply(model, method, keep_rate=0.6, size_attention=False)
    # Or there would be nothing to see: a merged token now draws too little attention.
    if model.num_prefix_tokens:
        assert not torch.allclose(model(image), expected, rtol=1e-3, atol=1e-3)
