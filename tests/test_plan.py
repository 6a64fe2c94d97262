"""Partitions, selections and composition of plans against readable loops."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergence.errors import MergenceError
from mergence.plan import DROPPED, compose, rows
from mergence.planning import Partition, alternate, best_pairs, join, keep_highest

SCORES = st.sampled_from([0.0, 1.0, -1.0, 0.5, 2.5, math.nan, math.inf, -math.inf])


@st.composite
def scores(draw: st.DrawFn) -> tuple[Tensor, int]:
    tokens = draw(st.integers(1, 12))
    row = st.lists(SCORES, min_size=tokens, max_size=tokens)
    table = draw(st.lists(row, min_size=1, max_size=3))
    return torch.tensor(table), draw(st.integers(1, tokens))


@st.composite
def partitions(draw: st.DrawFn) -> Partition:
    tokens = draw(st.integers(1, 10))
    kept = [sorted(draw(st.permutations(range(tokens)))[: max(tokens // 2, 1)]) for _ in range(2)]
    removed = [[n for n in range(tokens) if n not in row] for row in kept]
    order = torch.cat((torch.tensor(kept), torch.tensor(removed, dtype=torch.long)), dim=1)
    return Partition(order[:, : len(kept[0])], order[:, len(kept[0]) :], order.argsort(dim=1))


@given(case=scores())
def test_the_highest_scores_stay_and_both_halves_are_in_raster_order(
    case: tuple[Tensor, int],
) -> None:
    score, slots = case
    split = keep_highest(score, slots)
    for values, kept, removed in zip(
        score.tolist(), split.kept.tolist(), split.removed.tolist(), strict=True
    ):
        assert len(kept) == slots
        assert (kept, removed) == (sorted(kept), sorted(removed))
        assert sorted(kept + removed) == list(range(len(values)))
        ranked = [-math.inf if math.isnan(v) else v for v in values]
        assert all(ranked[k] >= ranked[r] for k in kept for r in removed)


def test_nan_is_lower_than_minus_infinity() -> None:
    score = torch.tensor([[math.nan, -math.inf, math.nan, -math.inf]])
    assert keep_highest(score, 2).kept.tolist() == [[1, 3]]


@given(split=partitions(), data=st.data())
def test_kept_tokens_open_slots_and_removed_ones_go_to_their_targets(
    split: Partition, data: st.DataObject
) -> None:
    slots = split.kept.shape[1]
    target = torch.tensor(
        [
            [data.draw(st.integers(DROPPED, slots - 1)) for _ in row]
            for row in split.removed.tolist()
        ],
        dtype=torch.long,
    )
    tokens = slots + split.removed.shape[1]
    weight = torch.rand(2, tokens)
    plan = split.plan(target, weight)
    assert plan.weight is weight
    assert plan.slots == slots
    for b in range(2):
        expected = [0] * tokens
        for slot, token in enumerate(split.kept[b].tolist()):
            expected[token] = slot
        for token, slot in zip(split.removed[b].tolist(), target[b].tolist(), strict=True):
            expected[token] = slot
        assert plan.slot[b].tolist() == expected


@given(split=partitions())
def test_dropping_keeps_only_the_kept(split: Partition) -> None:
    slot = split.drop(torch.ones(2, 1)).slot
    assert slot.gather(1, split.kept).tolist() == [list(range(split.kept.shape[1]))] * 2
    assert (slot.gather(1, split.removed) == DROPPED).all()


@given(split=partitions(), seed=st.integers(0, 999))
def test_merging_to_the_nearest_takes_the_highest_cosine(split: Partition, seed: int) -> None:
    tokens = split.kept.shape[1] + split.removed.shape[1]
    generator = torch.Generator().manual_seed(seed)
    metric = torch.nn.functional.normalize(torch.randn(2, tokens, 3, generator=generator), dim=2)
    slot = split.merge_to_nearest(metric, torch.ones(2, tokens)).slot
    for b in range(2):
        kept = split.kept[b].tolist()
        for token in split.removed[b].tolist():
            cosines = [float(metric[b, token].double() @ metric[b, k].double()) for k in kept]
            # float32 against float64: any of those within rounding of the best may be chosen.
            assert cosines[int(slot[b, token])] >= max(cosines) - 1e-6


def test_the_best_pairs_move_and_all_others_stay() -> None:
    # Givers 4, 0, 3 and takers 2, 1 of six tokens; the best pairs: 4 -> 1 (7), 0 -> 2 (9), 3 -> 2.
    attraction = torch.tensor([[[5.0, 7.0], [9.0, 8.0], [6.0, -1.0]]])
    givers, takers = torch.tensor([[4, 0, 3]]), torch.tensor([[2, 1]])
    moves = [
        best_pairs(attraction, givers, takers, count=count, tokens=6).tolist()[0]
        for count in range(4)
    ]
    assert moves == [
        [0, 1, 2, 3, 4, 5],
        [2, 1, 2, 3, 4, 5],
        [2, 1, 2, 3, 1, 5],
        [2, 1, 2, 2, 1, 5],
    ]


def test_a_pair_that_draws_nan_moves_last() -> None:
    attraction = torch.tensor([[[math.nan], [-math.inf], [-1.0]]])
    givers, takers = torch.tensor([[0, 1, 2]]), torch.tensor([[3]])
    assert best_pairs(attraction, givers, takers, count=2, tokens=4).tolist() == [[0, 3, 3, 3]]


def test_alternating_sets_are_the_odd_and_the_even_patches() -> None:
    odd, even = alternate(torch.zeros(2, 5, 3))
    assert odd.tolist() == [[1, 3]] * 2
    assert even.tolist() == [[0, 2, 4]] * 2


def test_joining_opens_slots_in_raster_order_and_follows_the_moves() -> None:
    moves, weight = torch.tensor([[3, 1, DROPPED, 3, 1, 5]]), torch.rand(1, 6)
    plan = join(moves, weight, 3)
    assert plan.slot.tolist() == [[1, 0, DROPPED, 1, 0, 2]]
    assert plan.weight is weight
    assert plan.slots == 3


def test_rows_picks_tokens() -> None:
    x = torch.arange(12.0).reshape(2, 3, 2)
    assert rows(x, torch.tensor([[2, 0], [1, 1]])).tolist() == [
        [[4.0, 5.0], [0.0, 1.0]],
        [[8.0, 9.0], [8.0, 9.0]],
    ]


@given(data=st.data())
def test_composition_follows_each_patch(data: st.DataObject) -> None:
    patches, middle = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 6))
    first = data.draw(st.lists(st.integers(-1, middle - 1), min_size=patches, max_size=patches))
    second = data.draw(st.lists(st.integers(-1, 3), min_size=middle, max_size=middle))
    expected = [second[slot] if slot >= 0 else DROPPED for slot in first]
    assert compose(torch.tensor([first]), torch.tensor([second])).tolist() == [expected]


@pytest.mark.parametrize("name", ["importance", "keys", "received"])
def test_reading_what_was_not_declared_names_the_remedy(name: str, view: Any) -> None:
    with pytest.raises(MergenceError, match=f'tokens.{name} without.*Add "{name}".*`needs`'):
        getattr(view(torch.zeros(1, 2, 2)), name)
