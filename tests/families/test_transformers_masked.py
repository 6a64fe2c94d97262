"""Masks: masked autoencoders of transformers (ViT-MAE, VideoMAE), and those of padded images."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import mergence
from mergence.errors import ReducedOutputError, UnsupportedModelError
from mergence.families._common import randomised
from mergence.families._transformers_tiny import tiny_configuration
from mergence.families.transformers import FAMILY

SMALL = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def mae(**options: Any) -> Any:
    config = tiny_configuration("ViTMAEConfig", **{"mask_ratio": 0.0, **options})
    return randomised(transformers.ViTMAEModel(config)).eval()


def in_order(image: Tensor) -> Tensor:
    return torch.arange(36.0).repeat(len(image), 1)


def video(**options: Any) -> Any:
    config = tiny_configuration("VideoMAEConfig", num_frames=8, patch_size=32, **options)
    return randomised(transformers.VideoMAEForVideoClassification(config)).eval()


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["mergence", "tome", "topk"])
def test_the_encoder_of_vit_mae_sees_patches_in_raster_order(method: str, kernel: str) -> None:
    model, image = mae(), torch.randn(2, 3, 96, 96)
    model.set_attn_implementation(kernel)
    expected = model(image, noise=in_order(image))
    assert not torch.equal(model(image)[0], expected[0])  # by itself the library shuffles
    mergence.apply(model, method, macs=1.0)
    found = model(image)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(found.ids_restore, torch.arange(36).expand(2, -1))
    mergence.apply(model, method, schedule=[36, 20, 20, 12, 12, 12])
    reduced, trace = model(image), mergence.trace(model, image)
    assert reduced.last_hidden_state.shape == (2, 1 + 12, 48)
    assert torch.equal(reduced.last_hidden_state, trace.output.last_hidden_state)
    assert trace.grid == (6, 6)
    assert mergence.restore(reduced.last_hidden_state).shape == (2, 1 + 36, 48)
    mergence.remove(model)
    assert torch.equal(model(image, noise=in_order(image))[0], expected[0])


@torch.no_grad()
def test_vit_mae_equals_the_vit_of_the_same_weights() -> None:
    vit = transformers.ViTModel(tiny_configuration("ViTConfig"), add_pooling_layer=False).eval()
    model, image = mae(), torch.randn(2, 3, 96, 96)
    state = {k: v for k, v in model.state_dict().items() if k in vit.state_dict()}
    vit.load_state_dict(state)
    for one in (model, vit):
        mergence.apply(one, keep_rate=0.7)
    assert mergence.describe(model).reduced == mergence.describe(vit).reduced
    torch.testing.assert_close(model(image)[0], vit(image)[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_vit_mae_takes_other_image_sizes() -> None:
    model, image = mergence.apply(mae(), keep_rate=0.5), torch.randn(2, 3, 128, 96)
    found = model(image, interpolate_pos_encoding=True).last_hidden_state
    assert found.shape == (2, 1 + 6, 48)


@torch.no_grad()
def test_dropping_patches_at_random_is_refused() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"75%.*random.*model\.config\.mask_ratio = 0\.0"
    ):
        mergence.apply(mae(mask_ratio=0.75), macs=0.67)
    model, image = mergence.apply(mae(), macs=0.67), torch.randn(2, 3, 96, 96)
    noise = in_order(image)
    for call in (lambda: model(image, noise=noise), lambda: model(image, noise)):
        with pytest.raises(ReducedOutputError, match=r"`noise`.*mergence\.disabled"):
            call()
    with mergence.disabled(model):
        assert model(image, noise)[0].shape == (2, 37, 48)
    model.config.mask_ratio = 0.5
    with pytest.raises(ReducedOutputError, match="50%"):
        model(image)


@pytest.mark.parametrize("architecture", ["ViTMAE", "VideoMAE"])
def test_decoders_are_refused(architecture: str) -> None:
    config = getattr(transformers, f"{architecture}Config")(**SMALL, image_size=32)
    model = getattr(transformers, f"{architecture}ForPreTraining")(config)
    with pytest.raises(UnsupportedModelError, match=r"ForPreTraining cannot.*decoder"):
        mergence.apply(model, macs=0.67)


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("method", ["mergence", "tome"])
def test_merging_equal_tubelets_changes_nothing(method: str, kernel: str) -> None:
    model = video().double()
    model.set_attn_implementation(kernel)
    model.videomae.embeddings.position_embeddings.zero_()
    # One of the tubelets is another: only with its share does the mean stay the same.
    frames = torch.randn(2, 2, 3, 32, 32, dtype=torch.float64).repeat(1, 4, 1, 3, 3)
    frames[:, 2:4, :, :32, 32:64] = torch.randn(2, 2, 3, 32, 32)
    expected = model(frames).logits
    mergence.apply(model, method, keep_rate=0.6, size_attention=True)
    # Sizes and weights are float32.
    torch.testing.assert_close(model(frames).logits, expected, rtol=1e-5, atol=1e-5)
    mergence.apply(model, method, keep_rate=0.6, size_attention=False)
    assert not torch.allclose(model(frames).logits, expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_videos_are_averaged_by_size_and_their_frames_lie_below_each_other() -> None:
    model, frames = mergence.apply(video().double(), keep_rate=0.6), torch.randn(2, 8, 3, 96, 96)
    frames = frames.double()
    trace = mergence.trace(model, frames)
    assert trace.grid == (4 * 3, 3)
    size = trace.points[-1].size.double()
    assert (size > 1).any()
    tokens = model.videomae(frames).last_hidden_state
    mean = (tokens * size.unsqueeze(2)).sum(dim=1) / 36
    expected = model.classifier(model.fc_norm(mean))
    torch.testing.assert_close(model(frames).logits, expected, rtol=1e-5, atol=1e-6)
    assert mergence.restore(tokens).shape == (2, 36, 48)
    assert mergence.describe(model).dense.stem == 36 * 48 * 3 * 2 * 32 * 32


@torch.no_grad()
def test_videos_with_patches_left_out_are_refused() -> None:
    model, frames = video().videomae, torch.randn(2, 8, 3, 96, 96)
    mask = torch.zeros(2, 36, dtype=torch.bool)
    mask[:, :9] = True
    expected = model(frames, mask)[0]
    mergence.apply(model, keep_rate=0.7)
    with pytest.raises(ReducedOutputError, match=r"`bool_masked_pos`.*mergence\.disabled"):
        model(frames, bool_masked_pos=mask)
    with mergence.disabled(model):
        assert torch.equal(model(frames, mask)[0], expected)
    assert model(frames)[0].shape == (2, mergence.describe(model).counts[-1], 48)


def test_a_head_on_the_first_patch_is_refused() -> None:
    model = video(use_mean_pooling=False)
    with pytest.raises(UnsupportedModelError, match=r"mean_pooling=False.*mean_pooling=Tr"):
        mergence.apply(model, macs=0.67)
    mergence.apply(model.videomae, macs=0.67)  # as the message says


def test_the_family_says_what_its_models_take() -> None:
    shapes = {kind: FAMILY.input_shape(build()) for kind, build in FAMILY.tiny().items()}
    assert shapes.pop("videomae") == shapes.pop("vivit") == (8, 3, 96, 96)
    assert set(shapes.values()) == {(3, 96, 96)}


@torch.no_grad()
@pytest.mark.slow
def test_compiled_and_exported_towers_look_at_the_mask_of_a_padded_image() -> None:
    size = {"num_hidden_layers": 6, "intermediate_size": 96, "image_size": 96, "patch_size": 16}
    config = transformers.SmolVLMVisionConfig(hidden_size=48, num_attention_heads=3, **size)
    tower = randomised(transformers.SmolVLMVisionTransformer(config)).eval()
    mergence.apply(tower, keep_rate=0.7)
    image, whole = torch.randn(2, 3, 96, 96), torch.ones(2, 6, 6, dtype=torch.bool)
    expected = tower(image, patch_attention_mask=whole)[0]
    assert torch.equal(expected, tower(image)[0])
    compiled = torch.compile(tower, backend="eager", fullgraph=True)
    inputs = {"patch_attention_mask": whole}
    graph = torch.export.export(tower, (image,), inputs, strict=False).module()
    padded = whole.clone()
    padded[:, 4:] = False
    for one in (tower, compiled, graph):
        torch.testing.assert_close(one(image, patch_attention_mask=whole)[0], expected)
        with pytest.raises((ReducedOutputError, RuntimeError), match="given an attention mask"):
            one(image, patch_attention_mask=padded)
