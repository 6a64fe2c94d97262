"""Evaluation and calibration read every library's outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergence
from mergence.calibration.probe import Probe
from mergence.data import Batch
from mergence.distances import cosine_distance, kl_divergence
from mergence.method import build
from mergence.program import program_of


@torch.no_grad()
def test_evaluation_compares_answers(
    dense: nn.Module, image: Tensor, output: Any, spec: Any
) -> None:
    expected = output(dense, image).flatten(1)
    labels = expected.argmax(dim=1)
    found = spec(dense)
    recipe = mergence.recipe_of(mergence.apply(dense, macs=0.67))
    mergence.remove(dense)
    batch = Batch(image, labels, names=["one", "two"], skipped=[])
    before, after = mergence.evaluate(dense, [batch], {"reduced": recipe}).results
    if not found.classes:
        with mergence.applied(dense, recipe):
            features = output(dense, image).flatten(1)
        distance = float(1 - torch.cosine_similarity(expected, features).mean())
        assert before.cosine == pytest.approx(0, abs=1e-6)
        assert after.cosine == pytest.approx(distance, abs=1e-6)
        assert {after.top1, after.top5, after.agreement, after.kl} == {None}
        return
    assert after.cosine is None
    assert found.classes == expected.shape[1]
    assert before.top1 == 100
    assert before.kl == pytest.approx(0, abs=1e-6)
    assert after.kl > 1e-6


@torch.no_grad()
def test_a_measurement_that_starts_late_is_that_of_the_whole_model(
    dense: nn.Module, image: Tensor, output: Any
) -> None:
    counts = [36, 36, 20, 20, 9, 9]
    probe, expected = Probe(dense, [image]), output(dense, image)
    with mergence.applied(dense, "mergence", schedule=counts):
        distance = kl_divergence if expected.ndim == 2 else cosine_distance  # of a backbone's maps
        direct = float(distance(expected, output(dense, image)).mean())
    found = probe.mean(distance, build("mergence", {}), counts)
    assert found == pytest.approx(direct, abs=1e-6)
    assert direct > 0


@torch.no_grad()
def test_profiling_finds_the_parts_of_every_block_and_changes_no_answer(
    dense: nn.Module, image: Tensor, output: Any
) -> None:
    mergence.apply(dense, schedule=[36, 36, 20, 20, 9, 9])
    expected = output(dense, image)
    run, laps = program_of(dense).run, list[str]()
    run.clock = laps.append
    try:
        found = output(dense, image)
    finally:
        run.clock = None
    torch.testing.assert_close(found, expected)
    gentle = ["rest", "attention", "mlp"]
    reducing = ["rest", "attention", "scoring", "planning", "merging", "mlp"]
    assert laps == [*gentle, *gentle, *reducing, *gentle, *reducing, *gentle]
