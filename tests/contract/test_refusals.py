"""Models that no family covers are refused by name and left as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import mergence
from mergence import family
from mergence.errors import ReducedOutputError, UnsupportedModelError

UNSUPPORTED: dict[str, Callable[[], nn.Module]] = {
    "timm.models.swin_transformer.SwinTransformer": lambda: timm.create_model(
        "swin_tiny_patch4_window7_224", embed_dim=12, depths=(1, 1), num_heads=(1, 2)
    ),
    "timm.models.convnext.ConvNeXt": lambda: timm.create_model(
        "convnext_atto", depths=(1, 1, 1, 1), dims=(8, 8, 8, 8)
    ),
    "timm.models.hiera.Hiera": lambda: timm.create_model(
        "hiera_tiny_224", embed_dim=12, num_heads=1, stages=(1, 1, 1, 1)
    ),
    "torch.nn.modules.container.Sequential": lambda: nn.Sequential(nn.Linear(3, 3)),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unknown_model_is_refused_with_what_was_found_and_what_is_known(
    name: str, snapshot: Any
) -> None:
    model = UNSUPPORTED[name]()
    before = snapshot(model)
    with pytest.raises(UnsupportedModelError) as caught:
        mergence.apply(model, macs=0.67)
    message = str(caught.value)
    assert name in message
    for known in family.registry().values():
        assert known.supported in message
    assert "\n" not in message
    assert snapshot(model) == before


@pytest.mark.parametrize("old", ["1.0.20", "1.0.21.dev0", "0.9.16"])
def test_an_older_release_of_a_library_is_refused_before_anything_is_changed(
    old: str, vit: nn.Module, snapshot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(vit)
    monkeypatch.setattr(timm, "__version__", old)
    with pytest.raises(UnsupportedModelError, match=rf"timm {old}.*timm 1\.0\.21 and newer"):
        mergence.apply(vit, macs=0.67)
    assert snapshot(vit) == before
    monkeypatch.setattr(timm, "__version__", "1.0.21")
    mergence.apply(vit, macs=0.67)


def test_attention_that_somebody_covered_is_refused(
    dense: nn.Module, spec: Any, snapshot: Any
) -> None:
    block = spec(dense).blocks[-1]
    named = [m for n, m in block.named_children() if "attn" in n or "attention" in n]
    if not named:
        pytest.skip("what its attention is called is the library's own affair")
    attention: Any = named[0]
    own = attention.forward
    attention.forward = lambda *inputs, **named: own(*inputs, **named)
    before = snapshot(dense)
    with pytest.raises(UnsupportedModelError, match=r"attention of block.* was covered"):
        mergence.apply(dense, macs=0.67)
    assert snapshot(dense) == before


def test_tokens_that_the_model_does_not_count_are_refused(vit: nn.Module, image: Tensor) -> None:
    class Prompted(type(vit)):  # type: ignore[misc]
        def _pos_embed(self, x: torch.Tensor) -> torch.Tensor:
            x = super()._pos_embed(x)
            return torch.cat((x[:, :1], x[:, -3:], x[:, 1:]), dim=1)

    vit.__class__ = Prompted
    mergence.apply(vit, macs=0.67)
    with pytest.raises(ReducedOutputError, match=r"40 tokens where 1 prefix tokens and 36"):
        vit(image)


def test_a_sharded_model_is_refused_with_the_order_that_works(dense: nn.Module, spec: Any) -> None:
    block = spec(dense).blocks[0]
    # What fully_shard does to a module, which needs processes.
    block.__class__ = type(f"FSDP{type(block).__name__}", (type(block),), {})
    with pytest.raises(UnsupportedModelError, match=r"FSDP.*apply before that"):
        mergence.apply(dense, macs=0.67)


def test_a_wrapper_is_refused_with_the_path_of_the_model_inside(
    dense: nn.Module, snapshot: Any
) -> None:
    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.ModuleDict({"visual": dense})

    tower = Tower()
    before = snapshot(tower)
    with pytest.raises(UnsupportedModelError, match=r"Tower.*'\.encoder\.visual'"):
        mergence.apply(tower, macs=0.67)
    assert snapshot(tower) == before
    mergence.apply(tower.encoder["visual"], keep_rate=0.7)  # as the message says


def test_a_compiled_model_is_refused_with_the_way_out(vit: nn.Module, snapshot: Any) -> None:
    compiled = torch.compile(vit, backend="eager")
    before = snapshot(vit)
    with pytest.raises(UnsupportedModelError, match=r"torch\.compile.*_orig_mod"):
        mergence.apply(compiled, macs=0.67)
    assert snapshot(vit) == before
    mergence.apply(compiled._orig_mod, macs=0.67)  # as the message says


@pytest.mark.parametrize("what", ["vit_tiny_patch16_224", None, nn.Linear])
def test_what_is_no_module_is_refused(what: object) -> None:
    with pytest.raises(UnsupportedModelError, match=r"is a \w+, not a torch\.nn\.Module"):
        mergence.apply(what, macs=0.67)


@pytest.mark.parametrize("ask", [mergence.describe, mergence.recipe_of])
def test_asking_a_dense_model_what_is_applied_says_what_to_do(vit: nn.Module, ask: Any) -> None:
    with pytest.raises(mergence.MergenceError, match=r"not reduced.*mergence\.apply"):
        ask(vit)


def test_tracing_a_dense_model_says_what_to_do(vit: nn.Module, image: torch.Tensor) -> None:
    with pytest.raises(mergence.MergenceError, match=r"not reduced.*Apply first"):
        mergence.trace(vit, image)
