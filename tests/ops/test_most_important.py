"""The most important token of each slot, by every implementation as by a loop."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergence.ops import cpu, dense, fused
from mergence.plan import DROPPED, MergePlan

EACH = pytest.mark.parametrize("implementation", [dense, cpu, fused], ids=["dense", "cpu", "fused"])


@EACH
@given(slots=st.integers(1, 5), data=st.data())
def test_it_is_the_first_of_the_highest_of_its_slot(
    implementation: Any, place: torch.device, slots: int, data: st.DataObject
) -> None:
    others = st.lists(st.integers(DROPPED, slots - 1), max_size=7)
    slot = data.draw(st.permutations([*range(slots), *data.draw(others)]))
    few = st.sampled_from([0.0, 0.25, 0.5])  # so that some are equal
    score = data.draw(st.lists(few, min_size=len(slot), max_size=len(slot)))
    each = torch.tensor([slot, slot[::-1]], device=place)
    plan = MergePlan(each, torch.ones(each.shape, device=place), slots)
    found = implementation.most_important(plan, torch.tensor([score, score[::-1]], device=place))
    for row, by, leaders in zip(
        (slot, slot[::-1]), (score, score[::-1]), found.tolist(), strict=True
    ):
        for number, leader in enumerate(leaders):
            members = [at for at, where in enumerate(row) if where == number]
            assert leader == max(members, key=lambda at: (by[at], -at))


@EACH
def test_without_numbers_it_still_is_a_token(implementation: Any, place: torch.device) -> None:
    slot = torch.tensor([[0, 1, 1, DROPPED]], device=place)
    plan = MergePlan(slot, torch.ones(slot.shape, device=place), 2)
    found = implementation.most_important(plan, torch.full((1, 4), torch.nan, device=place))
    assert ((found >= 0) & (found < 4)).all()
