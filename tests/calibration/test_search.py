"""The numbers of a calibration: dynamic program, fitting, neighbours, curves."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergence.calibration.search import Prices, _at_rate, best_counts, neighbours, predicted
from mergence.calibration.sensitivity import Curves
from mergence.errors import ScheduleError
from mergence.macs import BlockCost, ModelCost, ReductionCost, count
from mergence.setting import Setting


def prices(
    depth: int, tokens: int, *, align: int = 1, half: bool = False, alone: bool = False
) -> Prices:
    block = BlockCost(attention=400, mlp=800, width=10)
    model = ModelCost(
        (block,) * depth, prefix=1, dim=10, head_dim=5, stem=30, head=50, prefix_alone=alone
    )
    reduction = ReductionCost(frozenset({"importance"}), lambda n, s: n * n)
    dense = count(model, tokens).total
    setting = Setting(
        tokens=tokens,
        patches=tokens,
        own=tokens,
        depth=depth,
        prefix=1,
        align=align,
        fewest=(lambda n: n - n // 2) if half else (lambda n: 1),
        share=lambda counts: count(model, tokens, counts, reduction).total / dense,
    )
    return Prices(model, reduction, setting)


def random_table(depth: int, tokens: int, seed: int) -> torch.Tensor:
    """Distances that grow as fewer tokens are left, in every block in its own way."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(depth, tokens, generator=generator, dtype=torch.float64)
    table = steps.cumsum(dim=1).flip(1)
    table = torch.cat((torch.full((depth, 1), float("inf"), dtype=torch.float64), table), dim=1)
    table[:, tokens] = 0
    return table


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("points", [1, 2, 4])
@pytest.mark.parametrize("seed", range(4))
def test_the_dynamic_program_finds_what_trying_everything_finds(
    seed: int, points: int, half: bool, alone: bool
) -> None:
    depth, tokens, rate = 4, 6, 10.0
    price = prices(depth, tokens, half=half, alone=alone)
    table = random_table(depth, tokens, seed)

    def worth(counts: tuple[int, ...]) -> float:
        return predicted(table, counts, tokens) + rate * price.share(counts)

    def allowed(counts: tuple[int, ...]) -> bool:
        steps = list(zip((tokens, *counts), counts, strict=False))
        falls = all(b == a or price.setting.fewest(a) <= b < a for a, b in steps)
        return falls and sum(b < a for a, b in steps) <= points

    everything = filter(allowed, product(range(1, tokens + 1), repeat=depth))
    best = min(map(worth, everything))
    found = _at_rate(table, price, points, rate)
    assert allowed(found)
    assert worth(found) == pytest.approx(best)
    if alone:
        assert found[-1] == found[-2]


@pytest.mark.parametrize("budget", [0.9, 0.6, 0.35])
@pytest.mark.parametrize("points", [1, 3])
def test_best_counts_meet_the_budget_and_use_it(budget: float, points: int) -> None:
    price = prices(6, 60)
    counts = best_counts(random_table(6, 60, 1), price, budget, points)
    assert price.share(counts) <= budget
    assert price.share(counts) > budget - 0.04  # one token more in one place
    assert len({60, *counts}) - 1 <= points


def test_a_budget_out_of_reach_is_refused() -> None:
    with pytest.raises(ScheduleError, match=r"1 reduction points needs only 0\.10"):
        best_counts(random_table(6, 60, 1), prices(6, 60, half=True), 0.1, 1)


@given(
    st.lists(st.integers(1, 60), min_size=6, max_size=6),
    st.sampled_from([0.45, 0.6, 0.8]),
    st.sampled_from([1, 8]),
    st.booleans(),
)
def test_fitted_counts_can_be_carried_out(
    wanted: list[int], budget: float, align: int, half: bool
) -> None:
    price = prices(6, 60, align=align, half=half)
    falling = sorted(wanted, reverse=True)
    counts = price.fitted(falling, budget)
    if counts is None:
        return
    assert price.share(counts) <= budget
    before = 60
    for after in counts:
        assert price.setting.fewest(before) <= after <= before or after == before
        assert after == 60 or (after + 1) % align == 0
        before = after


def test_neighbours_differ_and_meet_the_budget() -> None:
    price = prices(6, 60)
    start = price.fitted((60, 45, 45, 30, 30, 15), 0.6)
    assert start is not None
    around = list(neighbours(start, price, 0.6, 0.15))
    assert len(set(around)) >= 6
    for counts in around:
        assert counts != start
        assert price.share(counts) <= 0.6
        assert len({60, *counts}) <= len({60, *start})
        assert list(counts) == sorted(counts, reverse=True)


def test_a_table_goes_through_what_was_measured() -> None:
    curves = Curves(100, (((80, 0.01), (40, 0.1), (10, 0.9)), ((60, 0.02),)))
    table = curves.table()
    assert table.shape == (2, 101)
    for row, points in zip(table, curves.measured, strict=True):
        for n, distance in points:
            assert float(row[n]) == pytest.approx(distance)
        assert row[100] == 0
        assert row[0] == float("inf")
        assert (row.diff() <= 0).all()
    assert table[0, 1] > 0.9
    assert 0 < table[0, 95] < 0.01
    # A lone point is a line of slope 1 in (removed / left).
    assert float(table[1, 75]) == pytest.approx(0.02 * (25 / 75) / (40 / 60))


def test_a_noisy_curve_never_rewards_fewer_tokens() -> None:
    table = Curves(100, (((80, 0.05), (40, 0.03), (10, 0.2)),)).table()
    assert (table[0].diff() <= 0).all()
