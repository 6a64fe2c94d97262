"""Calibration from images to recipes, on a tiny random model and on the embedded one."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import mergence
from mergence import demo
from mergence.calibration import Calibration, calibrate
from mergence.calibration.refining import Best
from mergence.calibration.search import Prices, best_counts
from mergence.calibration.tuning import _prices
from mergence.data import Batch, Skipped, loader
from mergence.distances import kl_divergence
from mergence.errors import DataError, OptionError
from mergence.evaluation import evaluate
from mergence.families.timm import FAMILY
from mergence.method import Method
from mergence.methods import Mergence, Mstm
from mergence.schedule import Counts

PATCHES = 36


@dataclass(frozen=True, kw_only=True)
class Open(Mergence):
    """A method of which calibration cannot try every value."""

    name: ClassVar[str] = "open"
    tunable: ClassVar[Mapping[str, tuple[float, ...]]] = {"top": (1, 2), "alpha": (0.5, -1)}
    top: int | None = None


@pytest.fixture
def model() -> nn.Module:
    return FAMILY.tiny()["vit"]()


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    images = torch.randn(12, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    names = [f"{i}.png" for i in range(6)]
    return [Batch(half, None, names, []) for half in images.split(6)]


def counts(result: Calibration, index: int = 0) -> tuple[int, ...]:
    schedule = result.found[index].recipe.schedule
    assert isinstance(schedule, Counts)
    return schedule.after


def test_a_calibrated_recipe_meets_its_budget_and_is_closer_than_the_methods_own(
    model: nn.Module, batches: list[Batch]
) -> None:
    shares: list[float] = []
    result = calibrate(
        model, batches, budgets=(0.7, 0.5), points=3, progress=shares.append, images=12, trials=5
    )
    assert [one.budget for one in result.found] == [0.7, 0.5]
    for index, one in enumerate(result.found):
        assert one.complete
        assert one.macs_ratio <= one.budget
        assert one.macs_ratio > one.budget - 0.05
        assert len({PATCHES, *counts(result, index)}) - 1 <= 3
        with mergence.applied(model, one.recipe):
            assert mergence.describe(model).macs_ratio == pytest.approx(one.macs_ratio)
    distances = [one.distance or 0.0 for one in result.found]
    assert 0 < distances[0] < distances[1]
    for one in result.found:
        assert one.uncalibrated is not None
    assert shares == sorted(shares)
    assert shares[-1] == 1.0
    assert result.images == 12


def test_an_option_is_followed_as_long_as_it_helps_or_brings_counts_of_its_own(
    model: nn.Module,
) -> None:
    class Valley:
        """Distances of a model that is closest with a quarter of it coarse, behind a hill."""

        def mean(self, distance: Any, method: Method, counts: Any, images: int) -> float:
            seen.append((method.coarse, method.size_attention, tuple(counts)))
            hill = float(method.coarse == 0.1)
            return 1 + hill + (method.coarse - 0.25) ** 2 + abs(method.size_attention - 0.85)

    def prices(method: Method) -> Prices:
        return _prices(model, method, 1, PATCHES)

    seen: list[tuple[float, float, tuple[int, ...]]] = []
    table = torch.linspace(1, 0, PATCHES + 1, dtype=torch.float64).expand(6, -1)
    start = best_counts(table, prices(Mergence(coarse=0.0)), 0.5, 2)
    best = Best(Valley(), prices, kl_divergence, 6, Mergence(coarse=0.0), start)  # type: ignore[arg-type]
    sizes = (0.5, 0.7, 0.85, 1.0)
    best.improve(table, 0.5, 2, 99, {"coarse": (0.1, 0.25, 0.4, 0.6), "size_attention": sizes})
    assert [c for c, _, _ in seen[:5]] == [0, 0.1, 0.25, 0.4, 0.6]
    assert [s for _, s, _ in seen[5:7]] == [0.85, 0.7]  # and not 0.5
    assert (best.method.coarse, best.method.size_attention) == (0.25, 0.85)
    for coarse, _, counts in seen:
        price = prices(Mergence(coarse=coarse))
        assert 0.45 < price.share(counts) <= 0.5
        assert max(counts) <= price.setting.tokens
    assert prices(Mergence(coarse=0.25)).setting.tokens == PATCHES - 3 * 2


def test_it_goes_on_from_the_methods_own_schedule_where_that_is_better(model: nn.Module) -> None:
    class Probe:
        def mean(self, distance: Any, method: Method, counts: Any, images: int) -> float:
            seen.append(tuple(counts))
            return float(tuple(counts) != own[1])

    def prices(method: Method) -> Prices:
        return _prices(model, method, 1, PATCHES)

    seen: list[tuple[int, ...]] = []
    method = Mergence(coarse=0.0)
    own = method, (PATCHES, 20, 20, 20, 9, 9)
    start = (PATCHES, 18, 18, 18, 10, 10)
    best = Best(Probe(), prices, kl_divergence, 6, method, start)  # type: ignore[arg-type]
    table = torch.linspace(1, 0, PATCHES + 1, dtype=torch.float64).expand(6, -1)
    best.improve(table, 0.5, 2, 4, {}, own)
    assert seen[:2] == [start, own[1]]
    assert best.trials == len(seen) == 4
    assert best.counts == own[1]


def test_a_family_that_cannot_read_coarsely_is_not_asked_to(batches: list[Batch]) -> None:
    from mergence.families.timm_eva import FAMILY as EVA

    build = next(iter(EVA.tiny().values()))
    result = calibrate(build(), batches, budgets=[0.5], points=2, images=6, trials=4)
    assert result.found[0].recipe.method.coarse == 0


def test_the_same_images_give_the_same_recipe(model: nn.Module, batches: list[Batch]) -> None:
    first, second = (
        calibrate(model, batches, budgets=[0.6], points=2, images=6, trials=2) for _ in range(2)
    )
    assert first.to_dict() == second.to_dict()


def test_what_was_applied_is_put_back(model: nn.Module, batches: list[Batch]) -> None:
    mergence.apply(model.train(), "tome", r=8)
    calibrate(model, batches, budgets=[0.7], points=1, images=6, trials=0, tune=False)
    assert mergence.recipe_of(model).method.name == "tome"
    assert all(module.training for module in model.modules())


def test_an_interrupt_keeps_the_best_so_far(model: nn.Module, batches: list[Batch]) -> None:
    def interrupt_at(limit: float) -> Callable[[float], None]:
        interrupted = False

        def progress(share: float) -> None:
            nonlocal interrupted
            if share >= limit and not interrupted:
                interrupted = True
                raise KeyboardInterrupt

        return progress

    arguments: dict[str, Any] = {"budgets": [0.7, 0.5], "points": 2, "images": 3, "trials": 30}
    with pytest.raises(KeyboardInterrupt):  # before there are curves there is nothing to keep
        calibrate(model, batches, progress=interrupt_at(0.01), **arguments)
    result = calibrate(model, batches, progress=interrupt_at(0.32), **arguments)
    first, second = result.found
    assert not first.complete
    assert first.trials > 0
    assert first.distance is None
    assert (second.complete, second.trials, second.distance) == (False, 0, None)
    for one in result.found:
        assert one.macs_ratio <= one.budget
    json.dumps(result.to_dict(), allow_nan=False)


def test_an_interrupt_between_two_budgets_keeps_the_first(
    model: nn.Module, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    improve, improved = Best.improve, False

    def improving(*arguments: Any) -> None:
        nonlocal improved
        improve(*arguments)
        improved = True

    def interrupted(*arguments: Any) -> tuple[int, ...]:
        if improved:
            raise KeyboardInterrupt
        return best_counts(*arguments)

    monkeypatch.setattr(Best, "improve", improving)
    monkeypatch.setattr("mergence.calibration.tuning.best_counts", interrupted)
    arguments: dict[str, Any] = {"points": 2, "images": 3, "trials": 1, "tune": False}
    result = calibrate(model, batches, budgets=[0.7, 0.5], **arguments)
    assert result.found[0].complete


def test_a_model_without_a_head_is_measured_by_its_features(batches: list[Batch]) -> None:
    model = FAMILY.tiny()["vit"]()
    model.reset_classifier(0)  # type: ignore[operator]
    result = calibrate(model, batches, budgets=[0.6], points=1, images=6, trials=0, tune=False)
    assert result.objective == "cosine"
    assert 0 <= (result.found[0].distance or 0) < 1


def test_a_model_of_a_single_value_is_refused(model: Any, batches: list[Batch]) -> None:
    model.reset_classifier(1)
    with pytest.raises(OptionError, match=r"a single value.*reset_classifier\(0\)"):
        calibrate(model, batches, budgets=[0.6])


def test_bad_images_are_counted_and_no_image_is_an_error(
    model: nn.Module, batches: list[Batch]
) -> None:
    bad = Batch(torch.empty(0), None, [], [Skipped("torn.png", "truncated")])
    result = calibrate(
        model, [bad, batches[0]], budgets=[0.7], points=1, images=6, trials=0, tune=False
    )
    assert [item.name for item in result.skipped] == ["torn.png"]
    with pytest.raises(DataError, match="no image to calibrate on: 1 could not be read"):
        calibrate(model, [bad], budgets=[0.7])


@pytest.mark.parametrize("side", [64, 128])
def test_images_of_another_size_than_the_models_own_are_measured_as_they_are(
    side: int, fresh: Any
) -> None:
    """As DINOv2 of transformers, whose processor makes 224 pixels and whose table is for 518."""
    model = fresh("transformers-dinov2")
    images = torch.randn(6, 3, side, side)
    batch = Batch(images, None, [f"{i}.png" for i in range(6)], [])
    arguments: dict[str, Any] = {"points": 2, "images": 6, "trials": 2, "align": 1}
    (found,) = calibrate(model, [batch], budgets=[0.7], **arguments).found
    _, reduced = evaluate(model, [batch], {"calibrated": found.recipe}).results
    assert found.distance == pytest.approx(reduced.kl, rel=1e-4)
    assert found.macs_ratio == pytest.approx(0.7, abs=0.05)


def test_images_of_two_sizes_are_refused(model: nn.Module, batches: list[Batch]) -> None:
    wide = Batch(batches[0].images[..., :64], None, batches[0].names, [])
    with pytest.raises(DataError, match="several sizes"):
        calibrate(model, [batches[0], wide], budgets=[0.7])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Say what to calibrate for"),
        ({"budgets": [0.7], "latency": 0.7}, "Say what to calibrate for"),
        ({"budgets": [1.2]}, "budgets holds 1.2"),
        ({"budgets": 0.6}, "budgets is 0.6; give a list"),
        ({"latency": 0.0}, "latency holds 0"),
        ({"budgets": [0.7], "points": 0}, "points is 0"),
        ({"budgets": [0.7], "images": 0}, "images is 0"),
        ({"budgets": [0.7], "trials": -1}, "trials is -1"),
        ({"budgets": [0.7], "method": Mstm(fusion=True)}, "module that is learned"),
        ({"budgets": [0.7], "method": Open()}, r"Open\.top is None.*tune=False"),
        ({"budgets": [0.7], "method": Open(top=2)}, r"Open\.alpha is -1"),
    ],
)
def test_wrong_arguments_are_named(
    arguments: dict[str, Any], message: str, model: nn.Module, batches: Iterable[Batch]
) -> None:
    with pytest.raises(OptionError, match=message):
        calibrate(model, batches, **arguments)


def test_what_it_is_compared_with_has_the_options_that_were_given(
    model: nn.Module, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    def improve(best: Best, *_: Any) -> None:
        best.method = dataclasses.replace(best.method, size_attention=0.3)

    monkeypatch.setattr(Best, "improve", improve)
    (found,) = calibrate(model, batches, budgets=[0.6], images=12, align=1).found
    recipe = mergence.recipe.make(macs=0.6, align=1)
    _, alone = evaluate(model, batches, {"alone": recipe}).results
    assert found.uncalibrated == pytest.approx(alone.kl, rel=1e-4)


@pytest.mark.slow
def test_the_embedded_model_gains_from_calibration() -> None:
    loaded = demo.load()
    data = loader(demo.images(loaded, limit=64), batch_size=32)
    result = calibrate(loaded.model, data, budgets=[0.5], images=64, trials=16)
    (found,) = result.found
    assert found.distance is not None
    assert found.uncalibrated is not None
    assert found.distance < found.uncalibrated
