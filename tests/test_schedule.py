"""Schedules: counts per block, alignment, fitting to a share of the MACs."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mergence import schedule as schedules
from mergence.errors import RecipeError, ScheduleError
from mergence.schedule import Constant, Counts, KeepRate, Macs, Ramp, Schedule
from mergence.setting import Setting


def setting(
    tokens: int = 196,
    depth: int = 12,
    *,
    prefix: int = 1,
    align: int = 1,
    fewest: Callable[[int], int] = lambda tokens: 1,
) -> Setting:
    # The share of tokens that the MLPs see: simple, and as monotonous as MACs.
    def share(counts: tuple[int, ...]) -> float:
        return sum(counts[1:]) / (tokens * depth)

    return Setting(
        tokens=tokens,
        patches=tokens,
        own=tokens,
        depth=depth,
        prefix=prefix,
        align=align,
        fewest=fewest,
        share=share,
    )


def counts_of(schedule: Schedule, setting: Setting) -> tuple[int, ...]:
    """Patch tokens after each block, where all enter the first."""
    start, *counts = schedule.tokens(setting)
    assert start == setting.tokens
    return tuple(counts)


SHAPES: list[Schedule] = [
    kind()  # type: ignore[operator]
    for kind in schedules._KINDS.values()
    if kind not in (Counts, Macs)
]


def test_keep_rate_reduces_at_the_quarters_and_rounds_up() -> None:
    counts = counts_of(KeepRate(keep_rate=0.7), setting())
    assert counts == (196,) * 3 + (138,) * 3 + (97,) * 3 + (68,) * 3


def test_keep_rate_does_not_round_up_what_only_floats_make_a_fraction() -> None:
    assert counts_of(KeepRate(keep_rate=0.7, blocks=(1,)), setting(10, 1)) == (7,)


def test_keep_rate_reduces_where_it_is_told() -> None:
    counts = counts_of(KeepRate(keep_rate=0.5, blocks=(2, 5)), setting(100, 6))
    assert counts == (100, 50, 50, 50, 25, 25)


def test_keep_rate_reduces_every_so_many_blocks_at_any_depth() -> None:
    assert counts_of(KeepRate(keep_rate=0.9, every=1), setting(100, 4)) == (90, 81, 73, 66)
    assert counts_of(KeepRate(keep_rate=0.5, every=2), setting(100, 5)) == (100, 50, 50, 25, 25)


@pytest.mark.parametrize("wrong", [{"every": 0}, {"every": 1, "blocks": (4,)}], ids=str)
def test_keep_rate_takes_either_blocks_or_a_distance(wrong: Any) -> None:
    with pytest.raises(ScheduleError, match="give either blocks, or every"):
        KeepRate(keep_rate=0.5, **wrong)


def test_constant_removes_the_same_number_after_each_block() -> None:
    assert counts_of(Constant(r=3), setting(20, 4)) == (17, 14, 11, 8)
    assert counts_of(Constant(r=3, first=3), setting(20, 4)) == (20, 20, 17, 14)


def test_a_fraction_of_a_token_is_honoured_on_average() -> None:
    counts = counts_of(Constant(r=1.25), setting(20, 8))
    assert counts[-1] == 20 - 10
    assert all(
        before - after in (1, 2) for before, after in zip((20, *counts), counts, strict=False)
    )


def test_constant_removes_as_many_as_the_method_can() -> None:
    half = setting(20, 4, fewest=lambda tokens: tokens - tokens // 2)
    assert counts_of(Constant(r=8), half) == (12, 6, 3, 2)
    assert counts_of(Constant(r=99), setting(20, 3)) == (1, 1, 1)


def test_counts_are_taken_as_they_are_or_scaled_to_another_resolution() -> None:
    plain = Counts(after=(196, 100, 49))
    assert counts_of(plain, setting(400, 3)) == (196, 100, 49)
    # Without another word they are those of the model's own input size.
    assert counts_of(plain, replace(setting(784, 3), own=196)) == (784, 400, 196)
    scaled = Counts(after=(196, 98, 49, 1), of=196)
    assert counts_of(scaled, setting(196, 4)) == (196, 98, 49, 1)
    assert counts_of(scaled, setting(784, 4)) == (784, 392, 196, 4)
    assert counts_of(scaled, setting(49, 4)) == (49, 24, 12, 1)


def test_scaled_counts_that_halve_can_be_followed_at_every_size() -> None:
    halving = Counts(after=(18, 18, 9, 9, 5), of=36)
    for patches in (side * side for side in range(1, 41)):
        where = setting(patches, 5, fewest=lambda tokens: tokens - tokens // 2)
        scaled = [count * patches / 36 for count in halving.after]
        for count, wanted in zip(counts_of(halving, where), scaled, strict=True):
            assert abs(count - wanted) <= 1
        counts_of(halving, replace(where, align=8))


def test_wrong_counts_stay_wrong_where_they_are_scaled() -> None:
    half = setting(200, 2, fewest=lambda tokens: tokens - tokens // 2)
    with pytest.raises(ScheduleError, match="wants 102 patch tokens, but only 100 are left"):
        counts_of(Counts(after=(50, 51), of=100), half)
    with pytest.raises(ScheduleError, match="Block 1 would go from 200 to 99"):
        counts_of(Counts(after=(99, 99), of=200), half)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("align", [4, 8, 16])
@given(rate=st.floats(0.05, 1))
def test_aligned_counts_are_multiples_with_the_prefix(align: int, prefix: int, rate: float) -> None:
    plain = counts_of(KeepRate(keep_rate=rate), setting(prefix=prefix))
    counts = counts_of(KeepRate(keep_rate=rate), setting(prefix=prefix, align=align))
    for count, wanted in zip(counts, plain, strict=True):
        assert count == 196 or (count + prefix) % align == 0
        assert abs(count - wanted) <= align / 2 or count == align - prefix
        assert count >= 1


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.kind)
@settings(max_examples=15)
@given(macs=st.floats(0.35, 1))
def test_a_budget_is_kept_and_used_up_to_one_step(shape: Any, align: int, macs: float) -> None:
    where = setting(align=align)
    found = Macs(macs=macs, shape=shape).tokens(where)
    assert where.share(found) <= macs
    # Any gentler strength of the shape would break the budget.
    strengths = [i / 200 for i in range(201)]
    shares = [where.share(shape.with_strength(s, where).tokens(where)) for s in strengths]
    assert where.share(found) >= max(share for share in shares if share <= macs)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.kind)
def test_a_shape_goes_from_nothing_to_everything_and_never_back(shape: Any) -> None:
    where = setting()
    shares = [where.share(shape.with_strength(i / 50, where).tokens(where)) for i in range(51)]
    assert shares[0] == 1
    assert shares == sorted(shares, reverse=True)
    assert shares[-1] < 0.4


FEWER = tuple(range(193, 97, -3))


@pytest.mark.parametrize(("span", "start"), [(0, 196), (8, 196), (12, 196), (15, 157), (99, 100)])
def test_a_ramp_longer_than_the_network_begins_before_it(span: float, start: int) -> None:
    where = replace(setting(), fewer=FEWER)
    entering, *after = Ramp(span=span).tokens(where)
    assert entering == start  # 196 x (0.02 + 0.98 x 12 / 15) = 157.6
    assert after[0] == entering
    assert Ramp(span=span).tokens(setting())[0] == 196  # a model that cannot read coarsely
    # A model of 12 blocks: after coarse patches a step every quarter of it, otherwise every sixth.
    every = 3 if start < 196 else 2
    assert Ramp(span=span, every=every).tokens(where) == (entering, *after)
    assert after[every - 1 :] == list(Ramp(span=span, every=every).tokens(setting())[every:])


@settings(max_examples=15)
@given(macs=st.floats(0.2, 1))
def test_a_budget_is_kept_and_used_when_tokens_leave_before_the_first_block(macs: float) -> None:
    where = replace(setting(), fewer=FEWER)
    tokens = Macs(macs=macs, shape=Ramp()).tokens(where)
    assert where.share(tokens) <= macs
    shares = [where.share(Ramp(span=i / 8).tokens(where)) for i in range(800)]
    assert where.share(tokens) >= max(share for share in shares if share <= macs)


@pytest.mark.parametrize("schedule", [Counts(after=(9, 9)), Macs(macs=0.5, shape=KeepRate())])
def test_a_fixed_schedule_is_no_shape(schedule: Schedule) -> None:
    with pytest.raises(
        ScheduleError, match=r"is fixed.*or a shape that can be fitted, such as KeepR"
    ):
        counts_of(Macs(macs=0.5, shape=schedule), setting(depth=2))


@pytest.mark.parametrize(
    "schedule",
    [
        *SHAPES,
        KeepRate(keep_rate=0.6, blocks=(2, 9)),
        KeepRate(keep_rate=0.9, every=1),
        Constant(r=2.5, first=4),
        Counts(after=(9, 8, 7), of=9),
        Macs(macs=0.67, shape=KeepRate(blocks=(4,))),
    ],
    ids=str,
)
def test_a_schedule_survives_json(schedule: Schedule) -> None:
    assert schedules.from_dict(json.loads(json.dumps(schedule.to_dict()))) == schedule


NO_NUMBERS: list[tuple[type[Schedule], dict[str, Any], str]] = [
    (KeepRate, {"keep_rate": "0.7"}, "keep_rate is '0.7'; give a number above 0"),
    (KeepRate, {"keep_rate": True}, "keep_rate is True; give a number above 0"),
    (KeepRate, {"every": True}, "every=True"),
    (Constant, {"r": "5"}, "r is '5'; give the number"),
    (Constant, {"r": True}, "r is True; give the number"),
    (Constant, {"r": 10**400}, "r is 1000.*; give the number"),
    (Ramp, {"span": None}, "span=None"),
    (Ramp, {"span": math.inf}, "span=inf"),
    (Ramp, {"end": True}, "end=True"),
    (Counts, {"after": 5}, "after is 5; give a list"),
    (Counts, {"after": "54"}, "after is '54'; give a list"),
    (Counts, {"after": (5, True)}, "For block 2, Counts.after holds True"),
    (Counts, {"after": (5,), "of": True}, "of is True"),
    (Macs, {"macs": "0.5", "shape": KeepRate()}, "macs is '0.5'; give the share"),
    (Macs, {"macs": True, "shape": KeepRate()}, "macs is True; give the share"),
]


@pytest.mark.parametrize(("kind", "values", "message"), NO_NUMBERS, ids=str)
def test_what_is_no_number_is_refused(kind: Any, values: dict[str, Any], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        kind(**values)


def test_numbers_of_other_libraries_and_ranges_are_taken() -> None:
    assert Constant(r=np.int64(8)).tokens(setting()) == Constant(r=8).tokens(setting())
    assert KeepRate(keep_rate=np.float32(0.5)).tokens(setting())[-1] < 100
    assert Counts(after=range(190, 178, -1)).tokens(setting())[-1] == 179


def test_a_block_is_named_by_a_number() -> None:
    for schedule in (KeepRate(keep_rate=0.5, blocks=(True,)), Constant(r=2, first=True)):
        with pytest.raises(ScheduleError, match="names block True; the model has blocks 1 to 12"):
            schedule.tokens(setting())


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "kind None; known kinds: keep_rate"),
        ({"kind": "linear"}, "kind 'linear'; known kinds"),
        ({"kind": "counts"}, "'counts' is not complete"),
        ({"kind": "constant", "r": 2, "rr": 1}, "not complete, or holds more: .*'rr'"),
        ({"kind": "constant", "r": True}, "'constant' is damaged: r is True; give"),
        ({"kind": "macs", "macs": "0.5", "shape": {"kind": "ramp"}}, "'macs' is damaged: macs is"),
        ({"kind": "keep_rate", "keep_rate": "a"}, "keep_rate"),
        ({"kind": "macs", "macs": 0.5, "shape": "steep"}, "shape"),
        ({"kind": "counts", "after": [9, "b"]}, "after"),
        ({"kind": "counts", "after": [9], "of": 0}, "of is 0"),
        ({"kind": "counts", "after": [9], "of": "9"}, "of is '9'"),
        ({"kind": "keep_rate", "every": 1.5}, "every=1.5"),
        ({"kind": "ramp", "every": "2"}, "every='2'"),
    ],
    ids=str,
)
def test_a_damaged_schedule_is_a_recipe_error(data: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        schedules.from_dict(data)


@pytest.mark.parametrize("depth", [1, 2, 12])
def test_a_share_that_halving_cannot_reach_is_out_of_reach(depth: int) -> None:
    half = setting(9, depth, fewest=lambda tokens: tokens - tokens // 2)
    shape = KeepRate(every=1)
    least = half.share(shape.with_strength(1.0, half).tokens(half))
    assert half.share(Macs(macs=least, shape=shape).tokens(half)) == least
    with pytest.raises(ScheduleError, match="out of reach: the schedule 'keep_rate' needs"):
        Macs(macs=least - 0.01, shape=shape).tokens(half)


def test_no_blocks_named_is_not_the_default_blocks() -> None:
    try:
        counts = counts_of(KeepRate(keep_rate=0.5, blocks=()), setting())
    except ScheduleError:
        return  # refusing is as good as reducing nowhere
    assert counts == (196,) * 12


def test_the_message_of_a_step_too_far_names_the_block_and_the_limit() -> None:
    half = replace(setting(20, 2), fewest=lambda tokens: tokens - tokens // 2)
    with pytest.raises(ScheduleError, match=r"Block 2 would go from 16 to 7.*at least 8"):
        counts_of(Counts(after=(16, 7)), half)
