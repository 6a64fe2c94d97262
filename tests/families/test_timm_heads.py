"""Heads of reduced timm models: pooling by size, and features that remember their sizes."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import mergence
from mergence import family
from mergence.errors import ReducedOutputError

HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", {}),
    "average": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "average with prefix": (
        "vit_tiny_patch16_224",
        {"global_pool": "avg", "pool_include_prefix": True},
    ),
    "average and maximum": ("vit_tiny_patch16_224", {"global_pool": "avgmax"}),
    "maximum": ("vit_tiny_patch16_224", {"global_pool": "max"}),
    "attention": ("vit_base_patch16_siglip_224", {}),
    "average without class token": ("vit_base_patch16_siglip_gap_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
}
BY_SIZE = [name for name in HEADS if name.startswith(("average", "attention"))]


@pytest.fixture(params=HEADS)
def model(request: pytest.FixtureRequest, small: Any) -> Any:
    name, options = HEADS[request.param]
    return small(name, **options)


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 64, 64, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
def test_features_then_head_is_forward(model: Any, fused: bool, image: Tensor) -> None:
    if model.attn_pool is not None:
        model.attn_pool.fused_attn = fused
    mergence.apply(model, "mergence", keep_rate=0.6)
    features = model.forward_features(image)
    assert features.shape[1] < model.num_prefix_tokens + 16
    model(torch.randn(1, 3, 64, 64).double())  # another forward in between
    # Not exact: for a head that reads the class token, forward computes no more in the last MLP.
    expected = model(image)
    torch.testing.assert_close(model.forward_head(features), expected, rtol=1e-12, atol=1e-12)
    assert model.forward_head(features, pre_logits=True).shape == (2, 24)


@torch.no_grad()
@pytest.mark.parametrize("head", BY_SIZE)
def test_a_merged_token_counts_as_often_as_its_patches(head: str, small: Any) -> None:
    name, options = HEADS[head]
    model = mergence.apply(small(name, **options), "mergence", schedule=[16, 6, 6, 6])
    features = model.forward_features(torch.randn(1, 3, 64, 64, dtype=torch.float64))
    size = mergence.trace(model, torch.randn(1, 3, 64, 64).double()).points[0].size
    assert features.shape[1] == model.num_prefix_tokens + size.shape[1]
    carry = features._mergence_carry
    sizes = [1] * model.num_prefix_tokens + carry.size[0].int().tolist()
    assert sum(sizes) == model.num_prefix_tokens + 16
    written_out = features[0].repeat_interleave(torch.tensor(sizes), dim=0).unsqueeze(0)
    pooled = model.pool(features)
    mergence.remove(model)
    # log(size) and the shares are float32.
    torch.testing.assert_close(pooled, model.pool(written_out), rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("head", BY_SIZE)
def test_a_head_that_cannot_know_the_sizes_refuses(head: str, small: Any, image: Tensor) -> None:
    name, options = HEADS[head]
    model = mergence.apply(small(name, **options), "topk", keep_rate=0.6)
    features = model.forward_features(image)
    with pytest.raises(ReducedOutputError, match=r"sizes are not known.*forward_features returned"):
        model.forward_head(features.clone())


@torch.no_grad()
@pytest.mark.parametrize("head", BY_SIZE)
def test_autocast_pools_in_the_precision_of_the_dense_head(head: str, small: Any) -> None:
    name, options = HEADS[head]
    model, image = small(name, **options).float(), torch.randn(2, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model.forward_head(model.forward_features(image), pre_logits=True).dtype
        mergence.apply(model, "mergence", keep_rate=0.6)
        assert model.forward_head(model.forward_features(image), pre_logits=True).dtype == expected


@torch.no_grad()
def test_masks_are_refused_and_work_while_disabled(small: Any, image: Tensor) -> None:
    model, mask = small(), torch.zeros(17, 17, dtype=torch.float64)
    mask[:, 3] = -10.0
    expected = model(image, attn_mask=mask)
    mergence.apply(model, "mergence", keep_rate=0.6)
    with pytest.raises(ReducedOutputError, match=r"attention mask.*mergence\.disabled"):
        model(image, attn_mask=mask)
    with mergence.disabled(model):
        assert torch.equal(model(image, attn_mask=mask), expected)


@torch.no_grad()
def test_a_late_block_called_by_itself_is_refused(small: Any) -> None:
    model = mergence.apply(small(), "mergence", keep_rate=0.6)
    alone: nn.Module = model.blocks[-1]
    x = torch.randn(1, 9, 24, dtype=torch.float64)
    with pytest.raises(ReducedOutputError, match=r"Block 4.*by itself.*mergence\.disabled"):
        alone(x)
    with mergence.disabled(model):
        assert alone(x).shape == x.shape


@torch.no_grad()
@pytest.mark.parametrize("registers", [0, 4])
def test_without_a_class_token_the_mean_query_says_what_matters(
    registers: int, small: Any, image: Tensor
) -> None:
    options = {"global_pool": "avg", "class_token": False, "reg_tokens": registers}
    model = small("vit_tiny_patch16_224", **options)
    calls: list[Tensor] = []
    model.blocks[1].attn.qkv.register_forward_hook(lambda *a: calls.append(a[2]))
    mergence.apply(model, "topk", schedule=[16, 9, 9, 9])
    (point,) = mergence.trace(model, image).points
    tokens, heads = 16 + registers, model.blocks[1].attn.num_heads
    q, k, _ = calls[0].reshape(2, tokens, 3, heads, -1).permute(2, 0, 3, 1, 4)
    logits = q.mean(dim=2, keepdim=True) @ k.mT * model.blocks[1].attn.scale
    expected = logits.softmax(dim=-1).mean(dim=1)[:, 0, registers:]
    torch.testing.assert_close(point.importance, expected.float(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "options", "has"),
    [
        ("vit_medium_patch16_reg4_gap_256", {}, False),
        ("vit_medium_patch16_reg4_gap_256", {"use_naflex": True}, False),
        ("vit_medium_patch16_rope_reg1_gap_256", {}, False),
        ("vit_small_patch14_reg4_dinov2", {}, True),
        ("eva02_tiny_patch14_224", {}, True),
        ("beit_base_patch16_224", {}, True),
    ],
)
def test_registers_alone_are_no_class_token(name: str, options: Any, has: bool) -> None:
    with torch.device("meta"):
        model = timm.create_model(name, depth=1, **options)
    assert family.spec_of(model).class_token == has
