"""timm's NaFlexVit: on images it answers as the class it stands for; padded patches are refused."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models.naflexvit import batch_patchify, checkpoint_filter_fn
from torch import Tensor, nn

import mergence
from mergence.errors import ReducedOutputError, UnsupportedModelError

# The same weights in both classes; rotary positions, every pooling.
TWINS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", {}),
    "average": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "attention": ("vit_base_patch16_siglip_224", {}),
    "rotary": ("vit_small_patch16_rope_mixed_224", {}),
}


@pytest.fixture
def model(small: Any) -> Any:
    return small("naflexvit_base_patch16_gap")


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 64, 64, dtype=torch.float64)


def cut(image: Tensor, padding: int = 0) -> dict[str, Tensor]:
    """The patches of images with their places, as timm's NaFlex loader hands them out."""
    patches, (rows, columns) = batch_patchify(image, (16, 16), pad=False)
    places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    valid = torch.ones(len(patches), rows * columns, dtype=torch.bool)
    valid[:, rows * columns - padding :] = False
    return {
        "patches": patches,
        "patch_coord": places.expand(len(patches), -1, -1),
        "patch_valid": valid,
    }


@torch.no_grad()
@pytest.mark.parametrize("name", TWINS)
def test_it_answers_as_the_class_that_it_stands_for(name: str, small: Any, image: Tensor) -> None:
    architecture, options = TWINS[name]
    classic = small(architecture, **options)
    if classic.num_prefix_tokens and classic.pos_embed is not None:
        classic.pos_embed[:, :1] = 0  # timm's conversion leaves the class token's position out
    model = small(architecture, use_naflex=True, **options)
    model.load_state_dict(checkpoint_filter_fn(classic.state_dict(), model))
    for one in (classic, model):
        mergence.apply(one, "mergence", schedule=[16, 9, 9, 5])
    # log(size) and the shares are float32.
    torch.testing.assert_close(model(image), classic(image), rtol=1e-5, atol=1e-6)
    assert mergence.describe(model).reduced == mergence.describe(classic).reduced
    features = model.forward_features(image)
    answer = model.forward_head(features)
    torch.testing.assert_close(answer, model(image), rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("padding", [0, 5], ids=["all valid", "padded"])
def test_patches_cut_out_before_are_refused_and_work_while_disabled(
    model: Any, image: Tensor, padding: int
) -> None:
    patches = cut(image, padding)
    expected = model(patches)
    assert torch.allclose(expected, model(image)) == (not padding)
    mergence.apply(model, keep_rate=0.6)
    calls = (
        lambda: model(patches),
        lambda: model(patches["patches"], patches["patch_coord"], patches["patch_valid"]),
        lambda: model.forward_head(**model.forward_features(**patches)),
        lambda: model.forward_intermediates(patches, output_fmt="NLC"),
    )
    for call in calls:
        with pytest.raises(ReducedOutputError, match=r"NaFlex.*padded.*Give it images.*disabled"):
            call()
    with mergence.disabled(model):
        assert all(torch.equal(call(), expected) for call in calls[:3])
        assert calls[3]()[0].shape == (2, 4 + 16, 24)
    assert model(image).isfinite().all()


@torch.no_grad()
def test_masks_of_images_are_refused(model: Any, image: Tensor) -> None:
    mergence.apply(model, keep_rate=0.6)
    valid = torch.ones(2, 16, dtype=torch.bool)
    with pytest.raises(ReducedOutputError, match="attention mask"):
        model.forward_features(image, patch_valid=valid)
    with pytest.raises(ReducedOutputError, match="attention mask"):
        model.forward_head(model.forward_features(image), patch_valid=valid)


@torch.no_grad()
@pytest.mark.parametrize("pool", ["avg", "avgmax", "map"])
def test_a_merged_token_counts_as_often_as_its_patches(pool: str, small: Any) -> None:
    model = small("naflexvit_base_patch16_map", global_pool=pool)
    mergence.apply(model, "mergence", schedule=[16, 6, 6, 6])
    features = model.forward_features(torch.randn(1, 3, 64, 64, dtype=torch.float64))
    sizes = [1] * model.num_prefix_tokens + features._mergence_carry.size[0].int().tolist()
    written_out = features[0].repeat_interleave(torch.tensor(sizes), dim=0).unsqueeze(0)
    pooled = model.forward_head(features)
    with pytest.raises(ReducedOutputError, match="sizes are not known"):
        model.forward_head(features.clone())
    mergence.remove(model)
    # log(size) and the shares are float32.
    torch.testing.assert_close(pooled, model.forward_head(written_out), rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("size", [(96, 48), (64, 64)], ids=str)
def test_other_image_sizes_and_intermediates(model: Any, size: tuple[int, int]) -> None:
    image = torch.randn(2, 3, *size, dtype=torch.float64)
    expected = model(image)
    dense = model.forward_intermediates(image, indices=2)
    mergence.apply(model, macs=1.0)
    assert torch.equal(model(image), expected)
    mergence.apply(model, keep_rate=0.5)
    assert not torch.equal(model(image), expected)
    with mergence.disabled(model):
        found = model.forward_intermediates(image, indices=2)
        assert all(map(torch.equal, found[1], dense[1]))
    reduced = model.forward_intermediates(image, indices=2, intermediates_only=True)
    assert [y.shape for y in reduced] == [y.shape for y in dense[1]]


def test_the_own_size_is_that_of_the_configuration() -> None:
    small = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    model = timm.create_model("naflexvit_base_patch16_gap", **small)
    assert mergence.describe(mergence.apply(model, keep_rate=0.6)).patches == 24 * 24  # 384 px
    model = timm.create_model("vit_tiny_patch16_224", use_naflex=True, img_size=96, **small)
    assert mergence.describe(mergence.apply(model, keep_rate=0.6)).patches == 36
    model = timm.models.NaFlexVit(**small)
    assert mergence.describe(mergence.apply(model, keep_rate=0.6)).patches == 16 * 16


def test_blocks_of_another_kind_and_random_dropping_are_refused(small: Any) -> None:
    name = "naflexvit_base_patch16_gap"
    with pytest.raises(UnsupportedModelError, match="patch_drop_rate"):
        mergence.apply(small(name, patch_drop_rate=0.5), macs=0.67)
    model = small(name)
    model.blocks[2] = small("vit_small_patch16_rope_mixed_224", use_naflex=True).blocks[2]
    with pytest.raises(UnsupportedModelError, match=r"Block 3 .*EvaBlock"):
        mergence.apply(model, macs=0.67)
    model.blocks[2] = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"block 3 is a .*Identity"):
        mergence.apply(model, macs=0.67)
