"""PiToMe: clusters merge, isolated tokens are protected late."""

from __future__ import annotations

from typing import Any

import pytest
import torch

# A cluster of three (tokens 0, 2, 4) and a close pair (1, 3). By energy: 2, 4, 0, 1, 3.
DEGREES = (0, 180, 12, 181, 24)


@pytest.mark.parametrize("block", [1, 6])
def test_in_the_first_half_the_most_similar_pairs_of_all_merge(
    block: int, at: Any, plan_of: Any
) -> None:
    # Givers 2, 0, 3 and takers 4, 1. Angles of the best pairs: 3 -> 1 (1), 2 -> 4 (12), 0 -> 4.
    x, keys = torch.zeros(5, 2), at(*DEGREES)
    assert plan_of("pitome", 4, x, keys=keys, block=block).slot.tolist() == [[0, 1, 2, 1, 3]]
    assert plan_of("pitome", 3, x, keys=keys, block=block).slot.tolist() == [[0, 1, 2, 1, 2]]


@pytest.mark.parametrize("block", [7, 12])
def test_in_the_second_half_only_the_highest_energies_merge(
    block: int, at: Any, plan_of: Any
) -> None:
    # One leaves: 2 and 4 may merge. Two leave: 2, 4, 0, 1, of which 2 and 0 give to 4 or 1.
    x, keys = torch.zeros(5, 2), at(*DEGREES)
    assert plan_of("pitome", 4, x, keys=keys, block=block).slot.tolist() == [[0, 1, 3, 2, 3]]
    assert plan_of("pitome", 3, x, keys=keys, block=block).slot.tolist() == [[2, 0, 2, 1, 2]]


def test_tokens_weigh_by_size_and_nothing_is_dropped(at: Any, plan_of: Any) -> None:
    size = [[1.0, 2.0, 3.0, 4.0, 5.0]]
    plan = plan_of("pitome", 3, torch.zeros(5, 2), keys=at(*DEGREES), size=size)
    assert plan.weight.tolist() == size
    assert (plan.slot >= 0).all()
