"""Timing: the arithmetic on made-up times, the turns, and a real run on the embedded model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import mergence
from mergence import benchmark, demo, family
from mergence.benchmark import Row, bench, judged, row_of, take_turns
from mergence.errors import OptionError
from mergence.program import program_of
from mergence.recipe import make


def test_a_row_says_how_much_of_the_ideal_was_reached() -> None:
    row = row_of("x", 8, "float32", "eager", [4.0, 5.0, 6.0], dense=8.0, ratio=0.5, peak=None)
    assert (row.ms, row.images_per_s, row.speedup) == (5.0, 1600.0, 1.6)
    assert row.of_ideal == pytest.approx(0.8)
    assert row.ms_low <= row.ms <= row.ms_high


def rows(*speedups: float) -> list[Row]:
    one = row_of("x", 1, "float32", "eager", [1.0, 1.0], dense=1.0, ratio=0.5, peak=None)
    return [replace(one, batch=2**i, speedup=speedup) for i, speedup in enumerate(speedups)]


@pytest.mark.parametrize(
    ("speedups", "verdicts"),
    [
        ((1.2,), ["pays"]),
        ((1.0,), ["no gain"]),
        ((0.9,), ["slower"]),
        ((0.9, 1.0, 1.3), ["slower; pays from batch 4", "no gain; pays from batch 4", "pays"]),
        ((1.3, 0.9), ["pays", "slower; pays at batch 1"]),
        ((0.9, 1.2, 0.9), ["slower; pays at batch 2", "pays", "slower; pays at batch 2"]),
        (
            (1.2, 1.0, 1.3, 0.9),
            ["pays", "no gain; pays at batch 1, 4", "pays", "slower; pays at batch 1, 4"],
        ),
        (
            (0.9, 1.2, 1.0, 1.1),
            ["slower; pays from batch 8", "pays", "no gain; pays from batch 8", "pays"],
        ),
    ],
)
def test_the_verdict_is_plain(speedups: tuple[float, ...], verdicts: list[str]) -> None:
    assert [row.verdict for row in judged(rows(*speedups))] == verdicts


def test_the_order_of_the_batches_is_nothing_to_the_verdict() -> None:
    small, middle, large = rows(0.9, 1.2, 1.3)
    assert judged([large, small, middle])[1].verdict == "slower; pays from batch 2"


def test_another_method_does_not_lend_its_verdict() -> None:
    slow, fast = rows(0.9, 1.5)
    assert judged([slow, replace(fast, name="y")])[0].verdict == "slower"


def test_where_only_a_stronger_reduction_pays_the_verdict_names_the_gentlest_that_does() -> None:
    slow, half, third = rows(0.9, 1.2, 1.5)
    half = replace(half, name="half", batch=1, macs_ratio=0.4)
    third = replace(third, name="third", batch=1, macs_ratio=0.3)
    verdicts = [row.verdict for row in judged([slow, half, third])]
    assert verdicts == ["slower; use half instead", "pays", "pays"]
    # At another batch size they say nothing about this one.
    assert judged([slow, replace(half, batch=2)])[0].verdict == "slower"


def test_all_take_turns_and_the_first_turn_does_not_count() -> None:
    order: list[str] = []

    def note(name: str) -> object:
        def call(images: Tensor) -> None:
            order.append(name)

        return call

    calls = {name: note(name) for name in ("dense", "a", "b")}
    times = take_turns(calls, torch.zeros(1), seconds=0, rounds=3)  # type: ignore[arg-type]
    assert order == ["dense", "a", "b"] * 4
    assert [len(t) for t in times.values()] == [3, 3, 3]


def test_an_accelerator_is_timed_at_work_and_not_at_its_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A device with 10 ms of work in each call, and 2 ms until it begins after a pause."""
    now, queued = 0.0, 0.0

    def call(_: object) -> None:
        nonlocal queued
        queued += 0.010

    def synchronise(_: object) -> None:
        nonlocal now, queued
        now, queued = now + queued + (0.002 if queued else 0.0), 0.0

    monkeypatch.setattr(benchmark, "synchronise", synchronise)
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now)
    images = SimpleNamespace(device=torch.device("cuda"))
    times = take_turns({"dense": call}, images, seconds=0, rounds=3)  # type: ignore[arg-type]
    assert times == {"dense": pytest.approx([10.4] * 3)}  # five calls, one pause


def test_a_real_run_has_a_row_for_each_setting_and_leaves_the_model_alone() -> None:
    loaded = demo.load()
    mergence.apply(loaded.model, "tome", macs=0.9)
    result = bench(
        loaded.model,
        {"half": make("evit", macs=0.5)},
        input_size=loaded.input_size,
        batches=(1, 2),
        seconds=0,
        rounds=2,
    )
    assert [(r.name, r.batch) for r in result.rows] == [
        ("dense", 1),
        ("half", 1),
        ("dense", 2),
        ("half", 2),
    ]
    assert result.rows[0].speedup == 1
    assert result.rows[1].macs_ratio == pytest.approx(0.5, abs=0.01)
    assert mergence.recipe_of(loaded.model).method.name == "tome"


def test_macs_are_those_at_the_size_that_is_timed(fresh: Any) -> None:
    model = fresh("transformers-dinov2")  # made for 36 patches
    recipe = make("tome", schedule=[36, 30, 20, 10, 10, 10])
    size = (3, 160, 160)
    rows = bench(model, {"r": recipe}, input_size=size, batches=(1,), seconds=0, rounds=2).rows
    program = program_of(mergence.apply(model, recipe))
    assert rows[1].macs_ratio == program.macs(100).total / program.macs(100, dense=True).total
    assert rows[1].macs_ratio != mergence.describe(model).macs_ratio


def test_no_recipe_takes_the_place_of_the_dense_model() -> None:
    recipes = {"dense": make("topk", macs=0.5)}
    with pytest.raises(OptionError, match="A recipe is called 'dense'"):
        bench(demo.load().model, recipes, input_size=(1, 28, 28), batches=(1,), seconds=0, rounds=2)


@pytest.mark.slow
def test_more_models_can_be_compiled_than_one_code_object_may_have_graphs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced = partial(torch.compile, fullgraph=True, backend="eager")
    monkeypatch.setattr(torch, "compile", lambda call, **options: traced(call))
    model: Any = family.registry()["timm"].tiny()["vit"]()
    model.blocks = model.blocks[:1]
    recipes = {str(n): make("topk", schedule=[36 - n]) for n in range(1, 10)}
    size, modes = (3, 96, 96), ("compile",)
    result = bench(model, recipes, input_size=size, batches=(1,), modes=modes, seconds=0, rounds=2)
    assert [row.name for row in result.rows] == ["dense", *recipes]


@pytest.mark.parametrize(
    ("mode", "says"), [("jit", "'jit' is unknown"), ("cudagraphs", "needs a CUDA device")]
)
def test_a_mode_that_is_not_to_be_had_is_refused(mode: str, says: str) -> None:
    model = demo.load().model
    with pytest.raises(OptionError, match=says):
        bench(model, {}, input_size=(1, 28, 28), modes=(mode,))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"rounds": 1}, "rounds is 1; give at least 2"),
        ({"modes": "compile"}, "modes is 'compile'; give a list"),
        ({"batches": 8}, "batches is 8; give a list"),
        ({"dtypes": torch.bfloat16}, "dtypes is torch.bfloat16; give a list"),
        ({"input_size": 28}, "input_size is 28; give channels, height and width"),
        ({"input_size": (28, 28)}, r"input_size is \(28, 28\); give channels"),
    ],
)
def test_wrong_arguments_are_named(arguments: dict[str, Any], says: str) -> None:
    given = {"input_size": (1, 28, 28), "batches": (1,), "seconds": 0} | arguments
    with pytest.raises(OptionError, match=says):
        bench(demo.load().model, {}, **given)
