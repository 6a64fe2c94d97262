"""What holds for every plan of every method, on random and on hostile input."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergence import method as methods
from mergence.errors import OptionError
from mergence.method import Method, names, registry
from mergence.plan import DROPPED, TokenView

# EViT's fused token comes last and stands for tokens from everywhere.
NO_REPRESENTATIVE = {"evit": {-1}}
VALUES = (0.0, 1.0, -1.0, 0.25, 3.0)
IMPORTANCE = (0.0, 1e-30, 0.1, 0.1, 0.5, math.nan)


@st.composite
def views(draw: st.DrawFn) -> TokenView:
    tokens, batch = draw(st.integers(2, 12)), draw(st.integers(1, 3))

    def generator() -> torch.Generator:
        # One seed a table: drawing every element takes most of the test's time.
        return torch.Generator().manual_seed(draw(st.integers(0, 9999)))

    def table(elements: Sequence[float], *shape: int) -> Tensor:
        return torch.tensor(elements)[torch.randint(len(elements), shape, generator=generator())]

    def features() -> Tensor:
        if draw(st.booleans()):  # few values: many ties, equal tokens, zero tokens
            few = VALUES[: draw(st.integers(1, len(VALUES)))]
            return table(few, batch, tokens, 3)
        return torch.randn(batch, tokens, 3, generator=generator())

    return TokenView(
        x=features(),
        size=table(range(1, 21), batch, tokens).float(),
        block=draw(st.integers(1, 12)),
        depth=12,
        _importance=table(IMPORTANCE, batch, tokens),
        _keys=features(),
        _received=table(IMPORTANCE, batch, tokens),
    )


def check_plan(method: Method, tokens: TokenView, slots: int) -> None:
    plan = method.plan(tokens, slots)
    batch, count, _ = tokens.x.shape
    assert plan.slots == slots
    assert plan.slot.dtype == torch.int64
    assert plan.slot.shape == plan.weight.shape == (batch, count)
    assert plan.weight.isfinite().all()
    assert (plan.weight > 0).all()
    for row in plan.slot.tolist():
        assert set(row) - {DROPPED} == set(range(slots))  # none outside, none empty
        # Raster order: representatives, one a slot, can be found at rising positions.
        position = 0
        exempt = {slots + i for i in NO_REPRESENTATIVE.get(method.name, set())}
        for slot in sorted(set(range(slots)) - exempt):
            assert slot in row[position:], "slots are not in raster order"
            position = row.index(slot, position) + 1


@pytest.mark.parametrize("name", names())
@given(tokens=views(), data=st.data())
def test_every_plan_is_complete_and_in_raster_order(
    name: str, tokens: TokenView, data: st.DataObject
) -> None:
    method = methods.build(name, {})
    count = tokens.x.shape[1]
    check_plan(method, tokens, data.draw(st.integers(method.fewest_slots(count), count - 1)))


def hostile(kind: str, tokens: int) -> TokenView:
    x, importance = torch.randn(2, tokens, 3), torch.rand(2, tokens)
    if kind == "all equal":
        x, importance = torch.ones_like(x), torch.full_like(importance, 0.5)
    if kind == "all zero":
        x, importance = torch.zeros_like(x), torch.zeros_like(importance)
    if kind == "importance nan":
        importance = torch.full_like(importance, math.nan)
    if kind == "tokens nan":
        x = torch.full_like(x, math.nan)
    return TokenView(x, torch.ones(2, tokens), 1, 12, importance, x, importance)


@pytest.mark.parametrize("kind", ["all equal", "all zero", "importance nan", "tokens nan"])
@pytest.mark.parametrize("name", names())
def test_hostile_tokens_still_get_a_complete_plan(name: str, kind: str) -> None:
    method = methods.build(name, {})
    for tokens in (2, 9):
        for slots in {method.fewest_slots(tokens), tokens - 1}:
            check_plan(method, hostile(kind, tokens), slots)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", names())
def test_plans_are_made_in_every_dtype(name: str, dtype: torch.dtype) -> None:
    x, score = torch.randn(2, 9, 4).to(dtype), torch.rand(2, 9)
    tokens = TokenView(x, torch.ones(2, 9), 1, 12, score, x, score)
    check_plan(methods.build(name, {}), tokens, 6)


@pytest.mark.parametrize("name", names())
def test_a_method_reads_only_what_it_declares(name: str) -> None:
    cls = registry()[name]
    x = torch.randn(1, 8, 4)
    have = {"importance": torch.rand(1, 8), "keys": x, "received": torch.rand(1, 8)}
    assert cls.needs <= have.keys()
    needed = {f"_{key}": have[key] for key in cls.needs}
    cls().plan(TokenView(x, torch.ones(1, 8), 1, 12, **needed), 5)


@pytest.mark.parametrize("name", names())
def test_a_method_survives_json_and_is_frozen(name: str) -> None:
    method = registry()[name]()
    written = json.loads(json.dumps(method.to_dict()))
    assert (written["method"], written["version"]) == (name, method.version)
    assert methods.from_dict(written) == method
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.size_attention = not method.size_attention  # type: ignore[misc]


@pytest.mark.parametrize("name", names())
def test_an_option_of_the_wrong_type_is_refused(name: str) -> None:
    for option in registry()[name].options():
        with pytest.raises(OptionError, match=option):
            methods.build(name, {option: "no"})


@pytest.mark.parametrize("value", [math.inf, 10**400], ids=["infinity", "huge"])
@pytest.mark.parametrize("name", names())
def test_an_option_that_is_not_finite_is_refused(name: str, value: Any) -> None:
    for option in registry()[name].options():
        with pytest.raises(OptionError, match=option):
            methods.build(name, {option: value})


def test_the_message_of_an_infinite_option_says_what_to_give() -> None:
    with pytest.raises(OptionError, match="alpha is inf; give a number at least 0 and finite"):
        methods.build("mergence", {"alpha": math.inf})


@pytest.mark.parametrize("name", names())
def test_planning_more_work_never_costs_less(name: str) -> None:
    method = methods.build(name, {})
    costs = [method.plan_macs(tokens, tokens // 2 + 1, 48, 16) for tokens in (8, 64, 196)]
    assert 0 <= costs[0] <= costs[1] <= costs[2]
