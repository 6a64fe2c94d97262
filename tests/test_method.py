"""The method registry and the base class, by example of a method of someone else's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import mergence
from mergence import family
from mergence import method as methods
from mergence.errors import UnknownNameError
from mergence.plan import MergePlan, TokenView
from mergence.schedule import KeepRate, Schedule


@pytest.fixture
def pairs() -> Iterator[type[mergence.Method]]:
    """As the docs tell the reader to write one: neighbours merge, the rest stays."""

    @mergence.register("pairs")
    @dataclass(frozen=True, kw_only=True)
    class Pairs(mergence.Method):
        shape: ClassVar[Schedule] = KeepRate()

        def plan(self, tokens: TokenView, slots: int) -> MergePlan:
            count = tokens.size.shape[1]
            slot = (torch.arange(count) - (count - slots)).clamp(min=0)
            return MergePlan(slot.expand_as(tokens.size), tokens.size, slots)

    yield Pairs
    del methods._REGISTRY["pairs"]


def test_every_method_of_the_issue_is_there_and_says_what_it_is() -> None:
    assert {"mergence", "mstm", "tome", "evit", "topk", "random"} <= set(methods.names())
    for name, cls in methods.registry().items():
        assert cls.name == name
        assert cls.__doc__
        assert isinstance(cls.shape, Schedule)


def test_a_registered_method_is_found_and_runs(pairs: type[mergence.Method]) -> None:
    assert "pairs" in methods.names()
    model: nn.Module = family.registry()["timm"].tiny()["vit"]()
    mergence.apply(model, "pairs", schedule=[36, 30, 30, 30, 30, 30])
    trace = mergence.trace(model, torch.randn(1, 3, 96, 96))
    assert trace.points[0].source.tolist() == [[0] * 7 + list(range(1, 30))]
    assert trace.points[0].size.tolist() == [[7.0] + [1.0] * 29]


def test_a_taken_name_is_refused_and_stays_with_its_owner() -> None:
    owner = methods.registry()["tome"]
    with pytest.raises(UnknownNameError, match=r"'tome' is taken by mergence\.methods\.tome\.ToMe"):

        @mergence.register("tome")
        @dataclass(frozen=True, kw_only=True)
        class Mine(mergence.Method):
            def plan(self, tokens: Any, slots: int) -> Any: ...

    assert methods.registry()["tome"] is owner


def test_a_method_of_another_module_may_not_take_a_name_by_calling_itself_alike() -> None:
    owner = methods.registry()["topk"]
    impostor = type("TopK", (owner,), {"__module__": "elsewhere", "__qualname__": "TopK"})
    try:
        with pytest.raises(UnknownNameError, match="taken"):
            mergence.register("topk")(impostor)
    finally:
        methods._REGISTRY["topk"] = owner


def test_a_method_without_a_rule_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        mergence.Method()  # type: ignore[abstract]
