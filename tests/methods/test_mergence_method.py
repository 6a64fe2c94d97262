"""The default method: the cost formula and the matching."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mergence import method as methods
from mergence import ops
from mergence.errors import OptionError

EAST, NORTH, NEAR_EAST, NEAR_NORTH = (1.0, 0.0), (0.0, 1.0), (1.0, 0.1), (0.1, 1.0)


def cosine(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return sum(p * q for p, q in zip(a, b, strict=True)) / (math.hypot(*a) * math.hypot(*b))


def naive_slots(
    x: list[tuple[float, ...]], importance: list[float], slots: int, alpha: float, epsilon: float
) -> list[int]:
    """The docstring, token by token."""
    cost = []
    for i, own in enumerate(importance):
        above = [
            cosine(x[i], x[j])
            for j, other in enumerate(importance)
            if other > own or (other == own and j < i)
        ]
        redundancy = math.log(1 + epsilon - max(above, default=-1.0))
        cost.append(alpha * math.log(own) + redundancy)
    stay = sorted(sorted(range(len(x)), key=lambda i: -cost[i])[:slots])
    return [
        stay.index(i) if i in stay else max(range(slots), key=lambda s: cosine(x[i], x[stay[s]]))
        for i in range(len(x))
    ]


def test_the_less_important_of_two_copies_joins_the_other(plan_of: Any) -> None:
    plan = plan_of("mergence", 3, [EAST, NORTH, NEAR_EAST, (-1, -1)], importance=[4, 3, 2, 1])
    assert plan.slot.tolist() == [[0, 1, 0, 2]]
    plan = plan_of("mergence", 3, [EAST, NORTH, NEAR_EAST, (-1, -1)], importance=[2, 3, 4, 1])
    assert plan.slot.tolist() == [[1, 0, 1, 2]]


def test_a_merged_token_is_as_long_as_the_longest_in_it(plan_of: Any) -> None:
    plan = plan_of("mergence", 1, [EAST, NORTH], importance=[2, 1])
    assert plan.keep_norm
    merged, _ = ops.merge(torch.tensor([[[3.0, 0.0], [0.0, 1.0]]]), torch.ones(1, 2), plan)
    assert merged.norm().item() == pytest.approx(3.0)


def test_with_a_large_alpha_importance_alone_decides(plan_of: Any) -> None:
    x, importance = [EAST, NORTH, NEAR_EAST, (-1, -1)], [4, 3, 2, 1]
    plan = plan_of("mergence", 3, x, importance=importance, options={"alpha": 100.0})
    assert plan.slot.tolist()[0][:3] == [0, 1, 2]


def test_with_alpha_zero_redundancy_alone_decides(plan_of: Any) -> None:
    # Token 2 nearly repeats token 0 and matters 1000 times as much as token 3.
    x, importance = [EAST, NORTH, NEAR_EAST, (-1, -1)], [4000, 3000, 2000, 2]
    plan = plan_of("mergence", 3, x, importance=importance, options={"alpha": 0.0})
    assert plan.slot.tolist() == [[0, 1, 0, 2]]


def test_of_equally_important_copies_the_earlier_stays_for_all(plan_of: Any) -> None:
    plan = plan_of("mergence", 2, [EAST, EAST, NORTH, NORTH], importance=[1, 1, 1, 1])
    assert plan.slot.tolist() == [[0, 0, 1, 1]]


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("alpha", "epsilon"), [(0.25, 0.1), (0.0, 0.02), (1.5, 0.5)])
def test_random_tokens_follow_the_formula(
    seed: int, alpha: float, epsilon: float, plan_of: Any
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(10, 4, generator=generator)
    importance = torch.rand(10, generator=generator)
    plan = plan_of(
        "mergence", 6, x, importance=importance, options={"alpha": alpha, "epsilon": epsilon}
    )
    rows = [tuple(row) for row in x.tolist()]
    assert plan.slot[0].tolist() == naive_slots(rows, importance.tolist(), 6, alpha, epsilon)


def test_tokens_weigh_by_size_and_nothing_is_dropped(plan_of: Any) -> None:
    size = [[3.0, 1.0, 5.0, 2.0]]
    plan = plan_of("mergence", 1, [EAST, NORTH, EAST, NORTH], importance=[4, 3, 2, 1], size=size)
    assert plan.weight.tolist() == size
    assert plan.slot.tolist() == [[0, 0, 0, 0]]


@pytest.mark.parametrize(
    "options", [{"alpha": -0.1}, {"epsilon": 0}, {"alpha": "a"}, {"alpha": math.nan}], ids=str
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=next(iter(options))):
        methods.build("mergence", options)
