"""How older releases of transformers build towers, told from what they leave in modules."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

import mergence
from mergence.errors import UnsupportedModelError
from mergence.families._transformers import CLIP, DINO, SPLIT_VIT, TOWERS, VIT, Tower
from mergence.families._transformers_releases import SPLIT_DINO, TUPLE_CLIP, as_built
from mergence.families.transformers import FAMILY


class Block(nn.Module):
    """A block with parts of some names; `forward` is that of transformers 5."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> None: ...


class TupleBlock(Block):
    """One of transformers 4."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, attention_mask: Tensor, output_attentions: bool = False
    ) -> None: ...


def tower(path: str, block: nn.Module) -> nn.Module:
    module: nn.Module = nn.ModuleList([block])
    for name in reversed(path.split(".")):
        module = Block(**{name: module})
    return module


def entry(cls: str) -> Tower:
    return next(kind for name, kind in TOWERS.items() if name.endswith(f".{cls}"))


ONE = Block(attention=Block(q_proj=nn.Linear(2, 2)))
SPLIT = Block(attention=Block(attention=Block(query=nn.Linear(2, 2)), output=nn.Linear(2, 2)))


@pytest.mark.parametrize(
    ("cls", "path", "block", "layout"),
    [
        ("ViTModel", "layers", ONE, VIT),
        ("ViTModel", "encoder.layer", SPLIT, SPLIT_VIT),
        ("VideoMAEModel", "encoder.layer", SPLIT, SPLIT_VIT),
        ("Dinov2Model", "encoder.layer", ONE, DINO),
        ("Dinov2Model", "encoder.layer", SPLIT, SPLIT_DINO),
        ("DINOv3ViTModel", "model.layer", ONE, DINO),
        ("DINOv3ViTModel", "layer", ONE, DINO),
        ("CLIPVisionModel", "encoder.layers", Block(self_attn=nn.Linear(2, 2)), CLIP),
        ("CLIPVisionTransformer", "encoder.layers", TupleBlock(), TUPLE_CLIP),
    ],
)
def test_names_are_those_that_the_modules_have(
    cls: str, path: str, block: nn.Module, layout: Any
) -> None:
    found = as_built(entry(cls), tower(path, block))
    assert found.blocks == path
    assert found.layout == layout


@pytest.mark.parametrize(
    ("cls", "path", "block"),
    [
        ("DINOv3ViTBackbone", "layer", ONE),
        (
            "VideoMAEModel",
            "encoder.layer",
            Block(attention=Block(attention=Block(q_bias=nn.Linear(2, 2)))),
        ),
    ],
)
def test_what_a_release_builds_otherwise_is_refused(cls: str, path: str, block: nn.Module) -> None:
    with pytest.raises(
        UnsupportedModelError,
        match=rf"not supported as transformers {transformers.__version__} .*Upgrade: pip",
    ):
        as_built(entry(cls), tower(path, block))


def test_what_was_not_tried_in_a_release_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    clip, owl = FAMILY.tiny()["clip"](), FAMILY.tiny()["owlvit"]()
    monkeypatch.setattr(sys.modules["transformers"], "__version__", "5.4.0")
    mergence.apply(clip, keep_rate=0.7)
    with pytest.raises(UnsupportedModelError, match=r"OwlViT.*as transformers 5\.4\.0 builds"):
        mergence.apply(owl, keep_rate=0.7)


class OldViT(transformers.ViTModel):
    """As before transformers 5.9, with its blocks in an encoder."""

    __module__ = transformers.ViTModel.__module__

    def forward(self, pixel_values: Tensor, **options: Any) -> Any:
        x = self.embeddings(pixel_values)
        for block in self.encoder.layer:
            x = block(x)
        return BaseModelOutputWithPooling(last_hidden_state=self.layernorm(x))


@torch.no_grad()
def test_a_classifier_finds_its_blocks_where_an_older_release_has_them() -> None:
    today = FAMILY.tiny()["vit"]()
    model = copy.deepcopy(today)
    vit: Any = model.vit
    vit.encoder = Block(layer=vit._modules.pop("layers"))
    vit.__class__ = OldViT
    image = torch.randn(2, 3, 96, 96)
    for one in (model, today):
        mergence.apply(one, keep_rate=0.7)
    assert torch.equal(model(image).logits, today(image).logits)
