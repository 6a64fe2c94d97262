"""ToMe: bipartite pairs, most similar first, at most half."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergence import method as methods


def naive_slots(keys: torch.Tensor, leave: int) -> list[int]:
    """The paper's rule on one image: odd patches give, even ones take."""
    count = keys.shape[0]
    unit = [row / row.norm() for row in keys.double()]
    pairs = []
    for giver in range(1, count, 2):
        taker = max(range(0, count, 2), key=lambda j: float(unit[giver] @ unit[j]))
        pairs.append((float(unit[giver] @ unit[taker]), giver, taker))
    merged = {giver: taker for _, giver, taker in sorted(pairs, reverse=True)[:leave]}
    stay = [n for n in range(count) if n not in merged]
    return [stay.index(merged.get(n, n)) for n in range(count)]


def test_the_most_similar_pair_merges_first(plan_of: Any) -> None:
    # Takers 0, 2, 4; givers 1, 3, 5. Cosines of the best pairs: 1 -> 4 (1.0), 3 -> 0, 5 -> 2.
    keys = [(1.0, 0.0), (0.0, 2.0), (-1.0, 0.0), (1.0, 0.2), (0.0, 1.0), (-1.0, 0.5)]
    x = torch.randn(6, 2)
    assert plan_of("tome", 5, x, keys=keys).slot.tolist() == [[0, 3, 1, 2, 3, 4]]
    assert plan_of("tome", 4, x, keys=keys).slot.tolist() == [[0, 2, 1, 0, 2, 3]]
    assert plan_of("tome", 3, x, keys=keys).slot.tolist() == [[0, 2, 1, 0, 2, 1]]


def test_several_givers_may_join_one_taker(plan_of: Any) -> None:
    keys = [(0.0, 1.0), (1.0, 0.0), (1.0, 0.1), (1.0, 0.2)]
    assert plan_of("tome", 2, torch.zeros(4, 2), keys=keys).slot.tolist() == [[0, 1, 1, 1]]


@pytest.mark.parametrize("count", [2, 3, 8, 9])
@pytest.mark.parametrize("seed", range(4))
def test_random_keys_follow_the_rule(count: int, seed: int, plan_of: Any) -> None:
    keys = torch.randn(count, 5, generator=torch.Generator().manual_seed(seed))
    for leave in range(1, count // 2 + 1):
        plan = plan_of("tome", count - leave, torch.zeros(count, 2), keys=keys)
        assert plan.slot[0].tolist() == naive_slots(keys, leave)


@pytest.mark.parametrize(("tokens", "fewest"), [(196, 98), (197, 99), (2, 1), (3, 2)])
def test_at_most_half_can_leave_at_once(tokens: int, fewest: int) -> None:
    assert methods.build("tome", {}).fewest_slots(tokens) == fewest


def test_tokens_weigh_by_size_and_nothing_is_dropped(plan_of: Any) -> None:
    size = [[2.0, 7.0, 1.0, 1.0]]
    plan = plan_of("tome", 2, torch.zeros(4, 2), keys=torch.randn(4, 3), size=size)
    assert plan.weight.tolist() == size
    assert (plan.slot >= 0).all()
