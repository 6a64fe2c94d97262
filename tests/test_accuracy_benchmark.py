"""The accuracy benchmark, from calibration to the page, on a few embedded images."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1] / "benchmarks" / "accuracy"


@pytest.mark.slow
def test_results_become_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "few-images.json"
    data = ("--data", "demo", "--calibrate-on", "demo", "--images", "2", "--limit", "4")
    what = ("--budgets", "0.7", "0.5", "--methods", "mergence", "tome", "--points", "2")
    monkeypatch.setattr(sys, "argv", ["run.py", "demo", *data, *what, "--out", str(out)])
    runpy.run_path(str(HERE / "run.py"), run_name="__main__")
    names = [row["name"] for row in json.loads(out.read_text())["results"]]
    assert names[:5] == [
        "dense",
        "mergence@0.7 calibrated",
        "mergence@0.7 own",
        "tome@0.7 own",
        "tome@0.7 calibrated",
    ]
    readme = tmp_path / "README.md"
    mark = "<!-- {}accuracy{} -->".format
    start, end = mark("", ": made by benchmarks/accuracy/render.py"), mark("/", "")
    readme.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    folders = ("--results", str(tmp_path), "--docs", str(tmp_path), "--readme", str(readme))
    monkeypatch.setattr(sys, "argv", ["render.py", *folders])
    runpy.run_path(str(HERE / "render.py"), run_name="__main__")
    page = (tmp_path / "accuracy.md").read_text()
    assert "| method | 0.7 | 0.5 |" in page
    assert page.count("| `tome` |") == 2
    assert (tmp_path / "accuracy-few-images-own.png").is_file()
    text = readme.read_text()
    assert text.startswith(f"before\n{start}\n| MACs |")
    assert text.endswith(f"{end}\nafter\n")
    assert "old" not in text
    assert "4 validation images" in text
