"""Models whose parts were exchanged after mergence was applied: said, and not computed wrongly."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergence
from mergence import family
from mergence.errors import MergenceError, ReducedOutputError, UnsupportedModelError

X = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.usefixtures("fresh_compiler")


def tiny(name: str, kind: str) -> Any:
    return family.registry()[name].tiny()[kind]()


def replaced(vit: Any) -> None:
    vit.blocks[2] = tiny("timm", "vit").blocks[2]


def copied(vit: Any) -> None:
    vit.blocks[2] = copy.deepcopy(vit.blocks[2])


def swapped_places(vit: Any) -> None:
    vit.blocks[2], vit.blocks[4] = vit.blocks[4], vit.blocks[2]


def attention_exchanged(vit: Any) -> None:
    class Other(type(vit.blocks[2].attn)):  # type: ignore[misc]
        pass

    vit.blocks[2].attn.__class__ = Other


def attention_covered(vit: Any) -> None:
    vit.blocks[2].attn.forward = lambda x, **options: x


@pytest.mark.parametrize("change", [replaced, copied, swapped_places])
def test_describe_says_that_a_block_is_not_the_one_that_was_reduced(
    change: Callable[[Any], None],
) -> None:
    vit = mergence.apply(tiny("timm", "vit"), macs=0.7)
    change(vit)
    with pytest.raises(MergenceError, match=r"Block 3 of this VisionTransformer .* Apply again"):
        mergence.describe(vit)
    mergence.describe(mergence.apply(vit, mergence.recipe_of(vit)))


@pytest.mark.parametrize("change", [attention_exchanged, attention_covered])
def test_describe_says_that_an_attention_is_not_the_librarys(change: Callable[[Any], None]) -> None:
    vit = mergence.apply(tiny("timm", "vit"), macs=0.7)
    change(vit)
    with pytest.raises(MergenceError, match=r"since it was reduced.* attention of block 3"):
        mergence.describe(vit)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "kind", "path"),
    [
        ("timm", "vit", "blocks"),
        ("torchvision", "vit", "encoder.layers"),
        ("open_clip", "tower", "transformer.resblocks"),
        ("transformers", "vit", "vit.layers"),
    ],
)
def test_a_block_after_the_last_sees_all_its_tokens(name: str, kind: str, path: str) -> None:
    model = tiny(name, kind)
    blocks, seen = model.get_submodule(path), []

    class Last(nn.Module):
        def forward(self, x: Tensor, *inputs: Any, **options: Any) -> Tensor:
            seen.append(x.shape[1])
            return x

    mergence.apply(model, "tome", r=4)
    last = Last()
    blocks.add_module(str(len(blocks)), last)
    model(X)
    assert seen == [1 + 36 - 6 * 4]


@torch.no_grad()
def test_two_models_that_share_a_reduced_part_say_so_until_each_is_applied_to() -> None:
    one, other = tiny("transformers", "dinov2"), tiny("transformers", "dinov2")
    other.dinov2 = one.dinov2
    mergence.apply(one, macs=0.7)
    expected = one(X).logits
    mergence.apply(other, macs=0.7)
    with pytest.raises(ReducedOutputError, match=r"'dinov2' of this Dinov2For.* another model"):
        one(X)
    with pytest.raises(MergenceError, match=r"Block 1 of this Dinov2For.* Apply again"):
        mergence.describe(one)
    mergence.apply(one, macs=0.7)
    assert torch.equal(one(X).logits, expected)


@torch.no_grad()
@pytest.mark.parametrize("index", [0, 3, 5])
@pytest.mark.parametrize("kind", ["vit", "vit_avg"])
def test_a_copy_of_a_single_block_is_refused(kind: str, index: int) -> None:
    vit = tiny("timm", kind)
    dense = vit(X)
    mergence.apply(vit, "tome", r=4)
    vit.blocks[index] = copy.deepcopy(vit.blocks[index])
    for call in (vit, vit.forward_features, torch.compile(vit, backend="eager")):
        with pytest.raises(ReducedOutputError, match=f"'{index}' of this Sequential.* copied"):
            call(X)
    with mergence.disabled(vit):
        assert torch.equal(vit(X), dense)


def test_a_method_that_was_compiled_since_is_to_be_put_back_before_remove() -> None:
    vit = mergence.apply(tiny("timm", "vit"), macs=0.7)
    compiled = torch.compile(vit.forward_features, backend="eager")
    vit.forward_features = compiled
    with pytest.raises(MergenceError, match=r"forward_features of The model, a.* Undo that before"):
        mergence.remove(vit)
    del vit.forward_features
    mergence.remove(vit)
    vit(X)


def test_a_forward_that_was_compiled_before_is_refused_with_what_to_do() -> None:
    vit = tiny("timm", "vit")
    vit.forward = torch.compile(vit.forward, backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"torch\.compile.* model\.compile\(\)"):
        mergence.apply(vit, macs=0.7)
