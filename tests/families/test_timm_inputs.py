"""timm models at other resolutions and aspect ratios."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import mergence
from mergence.errors import ScheduleError, UnsupportedModelError
from mergence.method import names

SIZES = [(64, 64), (48, 48), (96, 64), (64, 112), (128, 128)]
KINDS = {
    "class token": ("vit_tiny_patch16_224", {}),
    "average": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "attention": ("vit_base_patch16_siglip_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
}


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, small: Any) -> Any:
    name, options = KINDS[request.param]
    return small(name, dynamic_img_size=True, **options)


@torch.no_grad()
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_keep_all_is_bit_identical_at_every_size(model: Any, size: tuple[int, int]) -> None:
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    expected, features = model(image), model.forward_features(image)
    mergence.apply(model, "topk", keep_rate=1.0)
    assert torch.equal(model(image), expected)
    assert torch.equal(model.forward_head(model.forward_features(image)), expected)
    assert torch.equal(model.forward_features(image), features)


@torch.no_grad()
@pytest.mark.parametrize(
    "schedule",
    [
        {"keep_rate": 0.7},
        {"macs": 0.7},
        {"r": 1.5},
        {"r": 0.4},
        {"schedule": mergence.Counts(after=(16, 12, 7, 7), of=16)},
        # At 4 x 4 patches 0.96 rounds up to all of them, and a list was made for one size only.
        {"schedule": mergence.KeepRate(keep_rate=0.96, blocks=(2, 3))},
        {"schedule": [16, 12, 7, 7]},
    ],
    ids=str,
)
def test_every_block_follows_the_schedule_at_every_size_or_it_is_refused(
    small: Any, schedule: Any
) -> None:
    model = mergence.apply(small(dynamic_img_size=True), "tome", **schedule)
    seen: list[int] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, x, y: seen.append(y.shape[1] - 1))
    followed = []
    for height, width in SIZES:
        seen.clear()
        try:
            model(torch.randn(1, 3, height, width, dtype=torch.float64))
        except ScheduleError:
            continue
        assert tuple(seen) == model._mergence.counts(height * width // 256), (height, width)
        followed.append((height, width))
    assert SIZES[0] in followed  # the model's own
    assert followed == SIZES or schedule == {"schedule": [16, 12, 7, 7]}


@torch.no_grad()
@pytest.mark.parametrize("method", names())
def test_traces_know_the_grid_of_an_image_that_is_not_square(method: str, small: Any) -> None:
    model = mergence.apply(small(dynamic_img_size=True), method, keep_rate=0.7)
    trace = mergence.trace(model, torch.randn(2, 3, 96, 64, dtype=torch.float64))
    assert trace.grid == (6, 4)
    assert all(point.source.shape == (2, 24) for point in trace.points)
    assert trace.points


@torch.no_grad()
def test_fusion_reads_the_grid_of_each_image(small: Any) -> None:
    model = small(dynamic_img_size=True)
    mergence.apply(model, "mstm", keep_rate=0.7)
    image = torch.randn(2, 3, 96, 64, dtype=torch.float64)
    expected = model(image)
    mergence.apply(model, "mstm", keep_rate=0.7, fusion=True)
    assert torch.equal(model(image), expected)  # gates at zero


def test_blocks_and_parts_that_would_compute_something_else_are_refused(small: Any) -> None:
    from timm.models.vision_transformer import ParallelScalingBlock

    with pytest.raises(UnsupportedModelError, match=r"block 1 is a .*ParallelScalingBlock"):
        mergence.apply(small(block_fn=ParallelScalingBlock), macs=0.7)
    with pytest.raises(UnsupportedModelError, match="patch_drop_rate"):
        mergence.apply(small(patch_drop_rate=0.2), macs=0.7)
    with pytest.raises(UnsupportedModelError, match=r"attention of block 1 is a .*DiffAttention"):
        mergence.apply(small(attn_layer="diff"), macs=0.7)
