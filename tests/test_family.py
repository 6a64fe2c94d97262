"""What a family says of a model is checked once, before anything is changed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import mergence
from mergence import surgery
from mergence.errors import UnsupportedModelError
from mergence.families.timm import FAMILY
from mergence.family import ModelSpec
from mergence.macs import BlockCost


@pytest.fixture
def vit(fresh: Any) -> Any:
    return fresh("timm-vit")


def with_cost(**changes: Any) -> Callable[[ModelSpec], ModelSpec]:
    return lambda spec: replace(spec, cost=replace(spec.cost, **changes))


FREE = (BlockCost(attention=0, mlp=0, width=0),) * 6
WRONG: dict[str, tuple[Callable[[ModelSpec], Any], str]] = {
    "nothing": (lambda spec: None, "gives None in place of a ModelSpec"),
    "few costs": (with_cost(blocks=FREE[1:]), "gives 6 blocks and the costs of 5"),
    "no blocks": (lambda spec: with_cost(blocks=())(replace(spec, blocks=())), "0 blocks and the"),
    "a grid": (lambda spec: replace(spec, patches=(6, 6)), r"patches is \(6, 6\), and must be a"),
    "no prefix": (with_cost(prefix=None), "prefix is None, and must be a whole number"),
    "no costs": (with_cost(blocks=FREE, stem=0, head=0), "add up to no multiply-adds"),
    "no mixin": (lambda spec: replace(spec, block_mixin=None), "and must be classes"),
    "a part twice": (lambda spec: replace(spec, parts=spec.parts * 2), "one module for the Vi"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_family_that_misreads_a_model_is_named(
    name: str, vit: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = WRONG[name]
    inspect = type(FAMILY).inspect
    monkeypatch.setattr(type(FAMILY), "inspect", lambda self, model: change(inspect(self, model)))
    with pytest.raises(UnsupportedModelError, match=message):
        mergence.apply(vit, macs=0.67)
    assert not any(map(surgery.is_swapped, vit.modules()))


def test_blocks_that_are_one_module_are_named(vit: Any) -> None:
    vit.blocks[2] = vit.blocks[1]
    image = torch.randn(1, 3, 96, 96)
    expected = vit(image)
    with pytest.raises(UnsupportedModelError, match="one module for block 2 and block 3, and"):
        mergence.apply(vit, macs=0.67)
    assert torch.equal(vit(image), expected)
    assert not any(map(surgery.is_swapped, vit.modules()))
