"""The split by score, by every implementation as by a sort."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergence.ops import cpu, dense, fused

EACH = pytest.mark.parametrize("implementation", [dense, cpu, fused], ids=["dense", "cpu", "fused"])
SCORES = st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5, 1e-40, math.nan, math.inf, -math.inf])


def check(implementation: object, score: Tensor, kept: int) -> None:
    order, place = implementation.split(score, kept)  # type: ignore[attr-defined]
    assert order.dtype == place.dtype == torch.int64
    for values, found, at in zip(score.tolist(), order.tolist(), place.tolist(), strict=True):
        # NaN apart: comparisons with it mislead a sort.
        numbers = [n for n in range(len(values)) if not math.isnan(values[n])]
        rest = [n for n in range(len(values)) if math.isnan(values[n])]
        by_score = sorted(numbers, key=lambda n: -values[n]) + rest
        assert found == sorted(by_score[:kept]) + sorted(by_score[kept:])
        assert [found[p] for p in at] == list(range(len(values)))


@EACH
@given(row=st.lists(SCORES, min_size=1, max_size=12), data=st.data())
def test_the_highest_stay_and_among_equals_the_first(
    implementation: object, place: torch.device, row: list[float], data: st.DataObject
) -> None:
    kept = data.draw(st.integers(0, len(row)))
    check(implementation, torch.tensor([row, row[::-1]], device=place), kept)


@EACH
@pytest.mark.parametrize(("tokens", "kept"), [(196, 130), (196, 1), (1369, 700), (2, 2)])
def test_many_tokens(implementation: object, place: torch.device, tokens: int, kept: int) -> None:
    # Few different values, so that the border lies among equals.
    score = (torch.randn(2, tokens, device=place) * 8).round() / 8
    check(implementation, score, kept)
