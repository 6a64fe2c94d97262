"""The speed benchmark, from timing to the page, on one model at one batch."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parents[1] / "benchmarks" / "speed"


@pytest.mark.slow
def test_timings_become_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "this-machine.json"
    run = runpy.run_path(str(HERE / "run.py"))
    few = run["Case"]("deit_tiny_patch16_224", (1,), (torch.float32,), ("eager",))
    main = run["main"]
    main.__globals__["SUITES"] = {"cpu": (few,)}
    what = ("--device", "cpu", "--seconds", "0", "--rounds", "2", "--out", str(out))
    monkeypatch.setattr(sys, "argv", ["run.py", *what])
    main()
    rows = json.loads(out.read_text())["tables"][0]["rows"]
    assert [row["name"] for row in rows] == ["dense"] + [
        f"{method}@{budget}" for budget in ("0.67", "0.5") for method in run["METHODS"]
    ]
    assert all(abs(r["macs_ratio"] - 0.67) < 0.02 for r in rows if r["name"].endswith("0.67"))
    folders = ("--results", str(tmp_path), "--docs", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["render.py", *folders])
    runpy.run_path(str(HERE / "render.py"), run_name="__main__")
    page = (tmp_path / "speed.md").read_text()
    assert "| 0.67 of the MACs | dense ms | `mergence` | `mstm` | `tome` | `evit` |" in page
    assert "| float32, eager, batch 1 |" in page
