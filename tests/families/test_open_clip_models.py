"""Reduced models of open_clip and torchvision: whole models, heads, and what is refused."""

from __future__ import annotations

from typing import Any

import open_clip
import pytest
import timm
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import mergence
from mergence.errors import UnsupportedModelError
from mergence.families.open_clip import FAMILY

TEXT = torch.tensor([[1, 5, 9, 2, 0, 0, 0, 63], [1, 7, 3, 2, 0, 0, 63, 0]])


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 96, 96)


def tiny(kind: str) -> Any:
    return FAMILY.tiny()[kind]()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["clip", "clip_avg"])
def test_the_whole_model_is_reduced_on_its_image_side(kind: str, image: Tensor) -> None:
    model = tiny(kind)
    keys = list(model.state_dict())
    expected, text = model.encode_image(image, normalize=True), model.encode_text(TEXT)
    mergence.apply(model, macs=1.0)
    assert torch.equal(model.encode_image(image, normalize=True), expected)
    mergence.apply(model, keep_rate=0.7)
    assert list(model.state_dict()) == keys
    found = model.encode_image(image, normalize=True)
    assert found.shape == expected.shape
    assert not torch.equal(found, expected)
    assert torch.equal(model.encode_text(TEXT), text)
    embedding, _, scale = model(image, TEXT)
    assert torch.equal(embedding, found)
    to_image, to_text = model.get_logits(image, TEXT)
    assert to_image.shape == to_text.shape == (2, 2)
    torch.testing.assert_close(to_image, scale * found @ model.encode_text(TEXT, normalize=True).T)
    with mergence.disabled(model):
        assert torch.equal(model.encode_image(image, normalize=True), expected)
    alone = mergence.apply(mergence.remove(model).visual, keep_rate=0.7)
    assert torch.equal(nn.functional.normalize(alone(image), dim=-1), found)


@torch.no_grad()
def test_a_timm_trunk_is_reduced_through_the_whole_model() -> None:
    whole = open_clip.CustomTextCLIP(
        24,
        {"timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
        {"context_length": 8, "vocab_size": 64, "width": 24, "heads": 3, "layers": 1},
    ).eval()
    assert isinstance(whole.visual.trunk, timm.models.VisionTransformer)
    image = torch.randn(2, 3, 160, 160)
    expected = whole.encode_image(image)
    mergence.apply(whole, keep_rate=0.6)
    found = mergence.describe(whole)
    assert found.counts[-1] < found.patches == 100
    assert not torch.equal(whole.encode_image(image), expected)
    mergence.remove(whole)
    assert torch.equal(whole.encode_image(image), expected)


@torch.no_grad()
def test_pooling_in_the_tower_is_by_size(image: Tensor) -> None:
    model = mergence.apply(tiny("clip_avg").visual.double(), keep_rate=0.6)
    image = image.double()
    size = mergence.trace(model, image).points[-1].size
    assert (size > 1).any()
    tokens: list[Tensor] = []
    model.transformer.register_forward_hook(lambda module, x, y: tokens.append(y))
    found = model(image)
    share = (size / size.sum(dim=1, keepdim=True)).double().unsqueeze(2)
    pooled = model.ln_post((tokens[0][:, 1:] * share).sum(dim=1)) @ model.proj
    torch.testing.assert_close(found, pooled, rtol=1e-6, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["NCHW", "NLC"])
@pytest.mark.parametrize("kind", ["clip", "timm_trunk"])
def test_intermediates_have_a_value_for_every_patch(
    kind: str, layout: str, image: Tensor, merges: Any, by_hand: Any
) -> None:
    model = tiny(kind)
    tower = model.visual.transformer.resblocks if kind == "clip" else model.trunk.blocks
    both = "normalize_intermediates", "image_output_fmt"
    names = both if kind == "clip" else (both[0], "output_fmt")

    def ask(normed: bool = False) -> list[Tensor]:
        form = dict(zip(names, (normed, layout), strict=True))
        maps: list[Tensor] = model.forward_intermediates(image, **form)["image_intermediates"]
        return maps

    expected = ask()
    mergence.apply(model, macs=1.0)
    assert all(torch.equal(a, b) for a, b in zip(ask(), expected, strict=True))
    mergence.apply(model, keep_rate=0.5)
    found = ask()
    assert [y.shape for y in found] == [y.shape for y in expected]
    assert torch.equal(found[0], expected[0])
    assert not torch.equal(found[5], expected[5])
    merges.clear()
    last: list[Tensor] = []
    tower[-1].register_forward_hook(lambda *a: last.append(a[2]))
    norm = model.visual.ln_post if kind == "clip" else model.trunk.norm
    for normed, after in ((False, nn.Identity()), (True, norm)):
        maps = ask(normed)[5]
        values = by_hand(last[-1][:, 1 if kind == "clip" else 0 :], merges[-3:])
        full = maps.flatten(2).transpose(1, 2) if layout == "NCHW" else maps
        torch.testing.assert_close(full, after(values), rtol=1e-5, atol=1e-5)
    with mergence.disabled(model):
        assert all(torch.equal(a, b) for a, b in zip(ask(), expected, strict=True))


@pytest.mark.parametrize(
    ("vision", "message"),
    [
        ({"layers": [1, 1, 1, 1], "width": 8}, r"image tower.*ModifiedResNet.*Known: open_clip"),
        ({"timm_model_name": "test_convnext", "timm_proj": "linear"}, r"ConvNeXt.*Known:"),
        (
            {"layers": 2, "width": 48, "head_width": 16, "qk_norm": True},
            r"Block 1 of .*is a.*Custom",
        ),
        ({"layers": 2, "width": 48, "head_width": 16, "patch_dropout": 0.5}, "patch_dropout"),
    ],
)
def test_other_towers_are_refused_by_name(vision: dict[str, Any], message: str) -> None:
    text = {"context_length": 8, "vocab_size": 64, "width": 24, "heads": 3, "layers": 1}
    model = open_clip.CLIP(24, {"image_size": 64, "patch_size": 16} | vision, text)
    with pytest.raises(UnsupportedModelError, match=message):
        mergence.apply(model, macs=0.67)


@torch.no_grad()
def test_torchvisions_stem_of_convolutions_is_counted(image: Tensor) -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from torchvision.models.vision_transformer import ConvStemConfig

    stem = [ConvStemConfig(8, 3, 2), ConvStemConfig(16, 3, 2), ConvStemConfig(24, 3, 4)]
    model = VisionTransformer(96, 16, 2, 3, 24, 48, conv_stem_configs=stem).eval()
    expected = model(image)
    mergence.apply(model, macs=1.0)
    assert torch.equal(model(image), expected)
    with FlopCounterMode(display=False) as counter:
        model.conv_proj(image)
    assert mergence.describe(model).dense.stem == counter.get_total_flops() // 2 // 2


def test_a_foreign_torchvision_block_is_refused() -> None:
    model = VisionTransformer(96, 16, 2, 3, 24, 48)
    model.encoder.layers[1].self_attention = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"attention of block 2 of .* is a .*Identity;"):
        mergence.apply(model, macs=0.67)
