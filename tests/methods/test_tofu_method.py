"""ToFu: ToMe's pairs, one of each dropped early, merged with their norm late."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergence import method as methods
from mergence.errors import OptionError
from mergence.ops import merge

# Takers 0, 2, 4; givers 1, 3, 5. Cosines of the best pairs: 1 -> 4 (1.0), 3 -> 0, 5 -> 2.
KEYS = [(1.0, 0.0), (0.0, 2.0), (-1.0, 0.0), (1.0, 0.2), (0.0, 1.0), (-1.0, 0.5)]
X = [(1.0, 1.0), (4.0, 0.0), (2.0, 2.0), (3.0, 3.0), (0.0, 3.0), (5.0, 5.0)]


@pytest.mark.parametrize("block", [1, 6])
def test_early_blocks_drop_the_giver_and_leave_the_taker(block: int, view: Any) -> None:
    tokens = view(X, keys=KEYS, block=block)
    plan = methods.build("tofu", {}).plan(tokens, 4)
    assert plan.slot.tolist() == [[0, -1, 1, -1, 2, 3]]
    merged, size = merge(tokens.x, tokens.size, plan)
    assert merged.tolist() == [[list(X[i]) for i in (0, 2, 4, 5)]]
    assert size.tolist() == [[1.0] * 4]


@pytest.mark.parametrize("block", [7, 12])
def test_late_blocks_merge_to_the_largest_norm(block: int, view: Any) -> None:
    tokens = view(X, keys=KEYS, block=block)
    plan = methods.build("tofu", {}).plan(tokens, 5)
    assert plan.slot.tolist() == [[0, 3, 1, 2, 3, 4]]
    merged, size = merge(tokens.x, tokens.size, plan)
    # The mean of (4, 0) and (0, 3) is (2, 1.5), of length 2.5; the longer of the two has 4.
    torch.testing.assert_close(merged[0, 3], torch.tensor([3.2, 2.4]))
    assert merged[0, [0, 1, 2, 4]].tolist() == [list(X[i]) for i in (0, 2, 3, 5)]
    assert size.tolist() == [[1.0, 1.0, 1.0, 2.0, 1.0]]


def test_an_option_says_where_early_ends(plan_of: Any) -> None:
    def dropped(early: float, block: int) -> bool:
        plan = plan_of("tofu", 5, X, keys=KEYS, block=block, options={"early": early})
        return bool((plan.slot < 0).any())

    assert not dropped(0.0, 1)
    assert dropped(1.0, 12)
    assert [dropped(0.25, block) for block in (3, 4)] == [True, False]


def test_early_is_a_share() -> None:
    with pytest.raises(OptionError, match="early"):
        methods.build("tofu", {"early": 6})
