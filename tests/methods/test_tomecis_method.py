"""ToMeCIS: ToMe's pairs, weighted by importance."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mergence import method as methods
from mergence.ops import merge

KEYS = [(1.0, 0.0), (1.0, 0.1), (0.0, 1.0), (-1.0, 0.0)]


def test_the_pairs_are_those_of_tome(plan_of: Any) -> None:
    keys, importance = torch.randn(9, 5), torch.rand(9)
    expected = plan_of("tome", 6, torch.zeros(9, 2), keys=keys)
    plan = plan_of("tomecis", 6, torch.zeros(9, 2), keys=keys, importance=importance)
    assert torch.equal(plan.slot, expected.slot)


def test_the_more_important_token_has_more_of_the_mean(view: Any) -> None:
    tokens = view([[0.0], [8.0], [3.0], [4.0]], keys=KEYS, importance=[0.1, 0.3, 0.2, 0.4])
    merged, size = merge(tokens.x, tokens.size, methods.build("tomecis", {}).plan(tokens, 3))
    assert merged.flatten().tolist() == pytest.approx([6.0, 3.0, 4.0])  # 0.3 * 8 / 0.4
    assert size.tolist() == [[2.0, 1.0, 1.0]]


def test_without_any_importance_the_mean_is_plain(view: Any) -> None:
    tokens = view([[0.0], [8.0], [3.0], [4.0]], keys=KEYS, importance=[math.nan] * 4)
    merged, _ = merge(tokens.x, tokens.size, methods.build("tomecis", {}).plan(tokens, 3))
    assert merged.flatten().tolist() == pytest.approx([4.0, 3.0, 4.0])
