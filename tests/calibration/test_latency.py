"""Calibration for a share of the time: the MACs that meet it, and the time of what is written."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergence
from mergence import demo
from mergence.calibration import calibrate
from mergence.calibration.latency import budget_for
from mergence.calibration.refining import Best
from mergence.data import loader
from mergence.errors import ScheduleError
from mergence.evaluation import evaluate
from mergence.families.timm import FAMILY
from mergence.methods import Mstm

REFINED = {"alpha": 0.9}


def test_a_latency_becomes_the_largest_budget_that_meets_it() -> None:
    def recipe(macs: float) -> mergence.Recipe:
        if macs < 0.3:
            raise ScheduleError("too few points")
        return mergence.Recipe(Mstm(), mergence.Macs(macs=macs, shape=mergence.KeepRate()))

    def time(recipe: mergence.Recipe) -> float:
        return 0.2 + 0.8 * float(recipe.schedule.macs)  # type: ignore[attr-defined]

    assert budget_for(0.8, recipe, time) == pytest.approx(0.75, abs=0.02)
    with pytest.raises(
        ScheduleError, match=r"latency=0\.3 is out of reach.*0\.60 of the time at 0"
    ):
        budget_for(0.3, recipe, time)


@pytest.mark.parametrize(
    ("longer", "kept"),
    [(0.01, True), (0.3, False), (-0.3, True)],
    ids=["within the noise", "too long", "shorter"],
)
def test_what_is_written_is_timed_and_takes_no_longer_than_asked(
    longer: float, kept: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def improve(best: Best, *_: Any) -> None:
        best.method = dataclasses.replace(best.method, **REFINED)

    def time(model: nn.Module, images: Tensor, recipe: mergence.Recipe) -> float:
        """Of a machine on which time is MACs, and what is refined has a price of its own."""
        refined = vars(recipe.method).items() >= REFINED.items()
        with mergence.applied(model, recipe):
            return mergence.describe(model).macs_ratio + longer * refined

    monkeypatch.setattr(Best, "improve", improve)
    monkeypatch.setattr("mergence.calibration.tuning.share_of_time", time)
    model, images = FAMILY.tiny()["vit"](), torch.randn(6, 3, 96, 96)
    result = calibrate(model, [images], latency=0.5, points=2, images=6)
    (found,) = result.found
    assert (vars(found.recipe.method).items() >= REFINED.items()) == kept
    assert found.latency is not None
    assert found.latency.reached == pytest.approx(time(model, images, found.recipe))
    assert (found.latency.asked, found.latency.batch, found.latency.dtype) == (0.5, 6, "float32")
    assert not found.latency.missed
    _, alone = evaluate(model, [images], {"alone": found.recipe}).results
    assert found.distance == pytest.approx(alone.kl, rel=1e-4)
    assert found.recipe.notes["calibration"]["latency"] == dataclasses.asdict(found.latency)
    assert json.loads(json.dumps(result.to_dict()))["found"][0]["latency"]["asked"] == 0.5


@pytest.mark.slow
def test_a_latency_is_measured_on_this_machine() -> None:
    loaded = demo.load()
    data = loader(demo.images(loaded, limit=8), batch_size=8)
    result = calibrate(loaded.model, data, latency=0.9, images=8, trials=0, tune=False)
    (found,) = result.found
    assert 0 < found.macs_ratio < 1
    assert found.latency is not None
    assert 0 < (found.latency.reached or 0) < 1
