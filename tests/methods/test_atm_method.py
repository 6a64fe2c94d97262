"""ATM: the pairs of least merge error, and late never two large tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergence import method as methods
from mergence.errors import OptionError


def test_a_smaller_partner_may_beat_a_more_similar_one(at: Any, plan_of: Any) -> None:
    # Giver 1 to 0: 1/2 * (1 - cos 50) = 0.18. To 2: 1/2 * (1 - cos 40) = 0.12 where 2 is one patch,
    # 4/5 * 0.234 = 0.19 where it is four. Giver 3 joins 2: at most 4/5 * (1 - cos 10) = 0.01.
    x = at(0, 50, 90, 80)
    assert plan_of("atm", 3, x, size=[1, 1, 4, 1]).slot.tolist() == [[0, 1, 2, 2]]
    assert plan_of("atm", 2, x, size=[1, 1, 1, 1]).slot.tolist() == [[0, 1, 1, 1]]
    assert plan_of("atm", 2, x, size=[1, 1, 4, 1]).slot.tolist() == [[0, 0, 1, 1]]


def test_late_blocks_match_the_small_with_the_large(at: Any, plan_of: Any) -> None:
    # Early the large neighbours 0 and 1 merge: 3 * (1 - cos 1) = 0.0005, against 0.03 of 3 to 2.
    # Late 3 and 2 give to 1 and 0: 6/7 * (1 - cos 69) = 0.55 of 3 to 1 is the least.
    x, size = at(0, 1, 90, 70), [6, 6, 1, 1]
    for block in (1, 9):
        plan = plan_of("atm", 3, x, size=size, block=block)
        assert plan.slot.tolist() == [[0, 0, 1, 2]]
    for block in (10, 12):
        plan = plan_of("atm", 3, x, size=size, block=block)
        assert plan.slot.tolist() == [[0, 1, 2, 1]]


@pytest.mark.parametrize("count", [8, 9])
def test_where_all_sizes_are_equal_late_is_as_early(count: int, plan_of: Any) -> None:
    x, size = torch.randn(count, 4), torch.full((count,), 2.0)
    early, late = (plan_of("atm", 6, x, size=size, block=block) for block in (1, 12))
    assert torch.equal(early.slot, late.slot)


def test_an_option_says_where_late_begins(at: Any, plan_of: Any) -> None:
    x, size = at(0, 1, 90, 70), [6, 6, 1, 1]
    plan = plan_of("atm", 3, x, size=size, block=1, options={"early": 0})
    assert plan.slot.tolist() == [[0, 1, 2, 1]]
    with pytest.raises(OptionError, match="early"):
        methods.build("atm", {"early": 9})


def test_tokens_weigh_by_size_and_nothing_is_dropped(plan_of: Any) -> None:
    size = [[2.0, 7.0, 1.0, 1.0]]
    plan = plan_of("atm", 2, torch.randn(4, 3), size=size)
    assert plan.weight.tolist() == size
    assert (plan.slot >= 0).all()
