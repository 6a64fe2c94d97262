"""transformers' backbones, whose maps have a place for every patch, and depth and poses on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor

import mergence
from mergence.calibration import calibrate
from mergence.data import Batch
from mergence.errors import UnsupportedModelError
from mergence.families._common import randomised
from mergence.families._transformers_tiny import tiny_configuration
from mergence.models import load_model
from mergence.outputs import answer
from mergence.schedule import Counts

SIDE = 98  # 7 x 7 patches of 14
KINDS = {
    "Dinov2Backbone": {"mlp_ratio": 4},
    "Dinov2WithRegistersBackbone": {"mlp_ratio": 4, "num_register_tokens": 3},
    "DINOv3ViTBackbone": {"num_register_tokens": 2, "pos_embed_rescale": None},
    "Tipsv2VisionBackbone": {"mlp_ratio": 4, "num_register_tokens": 1},
}


def backbone(cls: str, **options: Any) -> Any:
    """One whose scales are not small, so that tokens differ."""
    config = tiny_configuration(
        cls.replace("Backbone", "Config"), layerscale_value=0.3, **(KINDS[cls] | options)
    )
    return randomised(getattr(transformers, cls)(config)).eval()


def depth(kind: str = "DepthAnything") -> Any:
    config = getattr(transformers, f"{kind}Config")(
        backbone_config={
            "model_type": "dinov2",
            "hidden_size": 48,
            "num_hidden_layers": 6,
            "num_attention_heads": 3,
            "image_size": SIDE,
            "patch_size": 14,
            "layerscale_value": 0.3,
            "out_indices": [2, 3, 5, 6],
            "reshape_hidden_states": False,
            "apply_layernorm": True,
        },
        reassemble_hidden_size=48,
        neck_hidden_sizes=[8, 16, 24, 24],
        fusion_hidden_size=16,
        head_hidden_size=8,
    )
    return randomised(getattr(transformers, f"{kind}ForDepthEstimation")(config)).eval()


@torch.no_grad()
@pytest.mark.parametrize("grid", [True, False], ids=["maps", "tokens"])
@pytest.mark.parametrize("normed", [True, False], ids=["normed", "as they are"])
@pytest.mark.parametrize("cls", KINDS)
def test_maps_are_the_tokens_of_their_stage_at_every_patch(
    cls: str, grid: bool, normed: bool, merges: Any, by_hand: Any
) -> None:
    model = backbone(cls, out_indices=[1, 4, 6], reshape_hidden_states=grid, apply_layernorm=normed)
    image = torch.randn(2, 3, 64, 128)  # 4 rows, 8 columns
    dense = model(image)
    mergence.apply(model, schedule=Counts(after=(32, 20, 20, 20, 11, 11), of=32))
    prefix = mergence.describe(model).prefix
    found = model(image, output_hidden_states=True)
    assert [m.shape for m in found.feature_maps] == [m.shape for m in dense.feature_maps]
    assert torch.equal(found.feature_maps[0], dense.feature_maps[0])
    merges.clear()
    tokens: list[Tensor] = []
    handles = [b.register_forward_hook(lambda *a: tokens.append(a[2])) for b in _blocks(model)]
    model(image)
    for handle in handles:
        handle.remove()
    for index, block in ((1, 4), (2, 6)):
        full = by_hand(tokens[block - 1][:, prefix:], merges)
        full = torch.cat((tokens[block - 1][:, :prefix], full), dim=1)
        last = block == 6 and cls.startswith("DINOv3")  # which norms its last stage always
        full = _norm(model)(full) if normed or last else full
        if grid:
            full = full[:, prefix:].unflatten(1, (4, 8)).permute(0, 3, 1, 2)
        elif cls.startswith("DINOv3"):
            full = full[:, prefix:]
        torch.testing.assert_close(found.feature_maps[index], full, rtol=1e-5, atol=1e-5)
    assert "hidden_states" not in model(image)
    states = [mergence.restore(h) for h in found.hidden_states]
    assert {h.shape for h in states} == {(2, prefix + 32, 48)}
    assert [h.shape[1] - prefix for h in found.hidden_states] == [32, 32, 20, 20, 32, 11, 32]
    with mergence.disabled(model):
        assert all(map(torch.equal, model(image).feature_maps, dense.feature_maps))


def _blocks(model: Any) -> Any:
    return model.encoder.layer if hasattr(model, "encoder") else model.model.layer


def _norm(model: Any) -> Any:
    return model.layernorm if hasattr(model, "layernorm") else model.norm


@torch.no_grad()
def test_stages_may_be_chosen_anew_and_the_last_is_always_whole() -> None:
    model, image = backbone("DINOv3ViTBackbone", out_indices=[2]), torch.randn(2, 3, 96, 96)
    mergence.apply(model, keep_rate=0.6)
    found = model(image, output_hidden_states=True)
    assert found.last_hidden_state.shape == (2, 3 + 36, 48)
    model.out_indices = [3, 5]
    assert [m.shape for m in model(image).feature_maps] == [(2, 48, 6, 6)] * 2


@torch.no_grad()
@pytest.mark.parametrize("kind", ["DepthAnything", "PromptDepthAnything"])
def test_depth_models_are_reduced_directly(kind: str) -> None:
    model, image = depth(kind), torch.randn(2, 3, SIDE, SIDE + 28)
    expected, before = model(image).predicted_depth, list(model.state_dict())
    mergence.apply(model, macs=1.0)
    assert torch.equal(model(image).predicted_depth, expected)
    for options in ({"macs": 0.6}, {"macs": 0.5, "coarse": 0.25}):
        mergence.apply(model, **options)
        reduced = model(image).predicted_depth
        assert reduced.shape == expected.shape
        assert not torch.equal(reduced, expected)
        assert torch.equal(model(image, return_dict=False)[0], reduced)
        assert list(model.state_dict()) == before
    with mergence.disabled(model):
        assert torch.equal(model(image).predicted_depth, expected)
    assert torch.equal(mergence.remove(model)(image).predicted_depth, expected)


@pytest.mark.parametrize("make", [depth, lambda: backbone("Dinov2Backbone")], ids=["depth", "maps"])
def test_they_are_calibrated_by_the_cosine_of_their_maps(make: Any) -> None:
    model = make()
    side = SIDE if "Depth" in type(model).__name__ else 96
    images = torch.randn(4, 3, side, side)
    batches = [Batch(images, None, list("abcd"), [])]
    with torch.no_grad():
        dense = answer(model(images)).flatten(1)
    result = calibrate(model, batches, budgets=[0.6], points=2, trials=2)
    (found,) = result.found
    assert result.objective == "cosine"
    mergence.apply(model, found.recipe)
    with torch.no_grad():
        reduced = answer(model(images)).flatten(1)
    distance = float((1 - torch.cosine_similarity(dense, reduced)).mean())
    assert found.distance == pytest.approx(distance, abs=1e-5)
    assert distance > 1e-5


def test_a_depth_model_by_name_takes_all_images_at_one_size(tmp_path: Path) -> None:
    model, size = depth(), {"height": SIDE, "width": SIDE}
    model.save_pretrained(tmp_path)
    transformers.DPTImageProcessor(
        size=size, keep_aspect_ratio=True, ensure_multiple_of=14
    ).save_pretrained(tmp_path)
    loaded = load_model(f"hf:{tmp_path}")
    assert loaded.input_size == (3, SIDE, SIDE)
    pixels = loaded.transform(Image.new("RGB", (200, 50), "red"))
    assert pixels.shape == loaded.input_size
    mergence.apply(loaded.model, macs=0.6)
    with torch.no_grad():
        assert answer(loaded.model(pixels.unsqueeze(0))).shape == (1, SIDE, SIDE)
    # The library's own way to use it keeps proportions.
    estimate = transformers.pipeline(
        "depth-estimation",
        model=loaded.model,
        image_processor=transformers.AutoImageProcessor.from_pretrained(tmp_path),
    )
    assert estimate(Image.new("RGB", (200, 50), "red"))["depth"].size == (200, 50)


def test_a_depth_model_on_another_backbone_is_refused() -> None:
    model = depth()
    model.backbone = transformers.SwinBackbone(
        transformers.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2])
    )
    with pytest.raises(UnsupportedModelError, match=r"'backbone' of this DepthAny.*SwinBackbone"):
        mergence.apply(model, macs=0.67)


@torch.no_grad()
@pytest.mark.parametrize("experts", [1, 2])
def test_poses(experts: int) -> None:
    config = transformers.VitPoseConfig(
        backbone_config=tiny_configuration(
            "VitPoseBackboneConfig",
            image_size=[128, 96],
            patch_size=[16, 16],
            num_experts=experts,
            part_features=12,
            out_indices=[6],
        ),
        num_labels=5,
    )
    model = randomised(transformers.VitPoseForPoseEstimation(config)).eval()
    image, index = torch.randn(2, 3, 128, 96), torch.tensor([0, experts - 1])

    def call(index: Tensor) -> Tensor:
        maps: Tensor = model(image, dataset_index=index).heatmaps
        return maps

    expected = call(index)
    mergence.apply(model, macs=1.0)
    assert torch.equal(call(index), expected)
    mergence.apply(model, schedule=[48, 40, 40, 30, 30, 20])
    found = call(index)
    assert found.shape == expected.shape == (2, 5, 32, 24)
    assert not torch.equal(found, expected)
    assert torch.equal(found, call(index.flip(0))) == (experts == 1)
    other = model.backbone(image, index)
    mergence.apply(model.backbone, mergence.recipe_of(model))
    assert torch.equal(model.backbone(image, index).feature_maps[0], other.feature_maps[0])
    with mergence.disabled(model):
        assert torch.equal(call(index), expected)
