"""DiffRate's rule: the tail is dropped, what comes before it merges by similarity."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mergence import method as methods
from mergence.errors import OptionError

IMPORTANCE = [0.5, 0.1, 0.3, 0.05, 0.2, 0.02]  # 0, 2 and 4 stay; 5, 3, 1 are the tail
DEGREES = (0, 60, 90, 150, 180, 190)


@pytest.mark.parametrize(
    ("prune", "slot"),
    [
        (0.0, [0, 1, 1, 2, 2, 2]),
        (0.5, [0, 1, 1, 2, 2, -1]),
        (0.99, [0, 1, 1, -1, 2, -1]),
        (1.0, [0, -1, 1, -1, 2, -1]),
    ],
)
def test_the_tail_is_dropped_and_the_next_join_what_they_resemble(
    prune: float, slot: list[int], at: Any, plan_of: Any
) -> None:
    plan = plan_of("diffrate", 3, at(*DEGREES), importance=IMPORTANCE, options={"prune": prune})
    assert plan.slot.tolist() == [slot]


def test_a_merged_token_weighs_its_size_times_its_similarity(at: Any, plan_of: Any) -> None:
    size = [3, 2, 1, 4, 5, 1]
    plan = plan_of("diffrate", 3, at(*DEGREES), importance=IMPORTANCE, size=size)
    similar = math.cos(math.radians(30))
    expected = [3, 2 * similar, 1, 4 * similar, 5, math.cos(math.radians(10))]
    assert plan.weight.flatten().tolist() == pytest.approx(expected, rel=1e-6)


def test_a_token_unlike_all_others_hardly_counts(plan_of: Any) -> None:
    plan = plan_of("diffrate", 1, [(1.0, 0.0), (-1.0, 0.0)], importance=[0.6, 0.4])
    assert plan.slot.tolist() == [[0, 0]]
    assert 0 < plan.weight[0, 1] <= 1e-6


def test_nan_importance_leaves_first(plan_of: Any) -> None:
    x, importance = torch.eye(4), [0.4, math.nan, 0.1, 0.2]
    plan = plan_of("diffrate", 2, x, importance=importance, options={"prune": 0.5})
    assert plan.slot[0, [0, 1, 3]].tolist() == [0, -1, 1]
    assert plan.slot[0, 2] >= 0


def test_prune_is_a_share() -> None:
    with pytest.raises(OptionError, match="prune"):
        methods.build("diffrate", {"prune": 1.5})


def test_a_share_of_a_hundred_is_not_rounded_down_by_the_arithmetic(plan_of: Any) -> None:
    x, importance = torch.randn(200, 2), torch.rand(200)
    for prune, dropped in ((0.29, 29), (0.57, 57), (0.578, 57)):
        plan = plan_of("diffrate", 100, x, importance=importance, options={"prune": prune})
        assert int((plan.slot == -1).sum()) == dropped
