"""The segmentation probe: restored tokens serve a head that was fitted on dense ones."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest
import torch

from mergence.models import load_model

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "dense" / "probe.py"


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT))


def test_the_head_and_the_metric_are_right_on_what_can_be_counted(script: Any) -> None:
    labels = torch.tensor([[True, True, False, False, False, False]])
    features = torch.where(labels, 1.0, -1.0).unsqueeze(2) * torch.tensor([1.0, 0.5])
    head = script["fit"](features, labels)
    assert script["mean_iou"](features, labels, head) == 100
    # One of two foreground patches found: IoU 1/2 and 4/5.
    seen = features.clone()
    seen[0, 1] = features[0, 2]
    assert script["mean_iou"](seen, labels, head) == pytest.approx(65)


def test_a_patch_is_foreground_by_the_mean_of_its_pixels(script: Any) -> None:
    pixels = torch.zeros(1, 1, 4, 4)
    pixels[0, 0, :2, 2:] = torch.tensor([[0.9, 0.0], [0.0, 0.0]])
    pixels[0, 0, 3, 0] = 0.3
    assert script["foreground"](pixels, (2, 2), 0.1).tolist() == [[False, True, False, False]]


@pytest.mark.slow
def test_restored_tokens_lose_little_and_dropped_ones_more(
    script: Any, tmp_path: Path, capsys: Any
) -> None:
    out = tmp_path / "results" / "probe.json"
    arguments = ["--images", "60", "--blocks", "12", "--methods", "mergence", "topk"]
    script["main"]([*arguments, "--out", str(out)])
    rows = {row["run"]: row for row in json.loads(out.read_text())["rows"]}
    dense = rows["dense"]["same_head"]
    assert dense > 94
    for budget, loss in (("0.67", 2), ("0.5", 3)):
        row = rows[f"mergence {budget}"]
        # The embedded model was trained with merged tokens: they can serve as well as dense ones.
        assert abs(dense - row["same_head"]) < loss
        assert abs(dense - row["own_head"]) < loss
        # Dropped patches have the values that they had then.
        assert loss / 2 < dense - rows[f"topk {budget}"]["same_head"] < 2 * loss
    assert f"| `dense` | 12 | {dense:.1f} |" in capsys.readouterr().out


def test_every_patch_is_labelled_in_raster_order(script: Any) -> None:
    # A head on dense tokens finds the foreground, so tokens and labels lie on the same grid.
    rows = script["probe"](load_model("demo"), {}, images=30, blocks=[6])
    assert [row["run"] for row in rows] == ["dense"]
    assert rows[0]["same_head"] > 93
