"""The speed benchmark, from timing to the page, on one model at one batch."""

from __future__ import annotations

import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parents[1] / "benchmarks" / "speed"


@pytest.mark.slow
def test_timings_become_a_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "results" / "this-machine.json"
    run = runpy.run_path(str(HERE / "run.py"))
    few = run["Case"]("deit_tiny_patch16_224", (1,), (torch.float32,), ("eager",))
    main = run["main"]
    main.__globals__["SUITES"] = {"cpu": (few,)}
    what = ("--device", "cpu", "--seconds", "0", "--rounds", "2", "--out", str(out))
    monkeypatch.setattr(sys, "argv", ["run.py", *what])
    main()
    result = json.loads(out.read_text())
    assert result["align"] == 1
    rows = result["tables"][0]["rows"]
    assert [row["name"] for row in rows] == ["dense"] + [
        f"{method}@{budget}" for budget in ("0.67", "0.5") for method in run["METHODS"]
    ]
    assert all(abs(r["macs_ratio"] - 0.67) < 0.02 for r in rows if r["name"].endswith("0.67"))
    readme = tmp_path / "README.md"
    mark = "<!-- {}speed{} -->".format
    start, end = mark("", ": made by benchmarks/speed/render.py"), mark("/", "")
    readme.write_text(f"before\n{start}\nold\n{end}\nafter\n")
    folders = ("--results", str(out.parent), "--docs", str(tmp_path), "--readme", str(readme))
    monkeypatch.setattr(sys, "argv", ["render.py", *folders])
    runpy.run_path(str(HERE / "render.py"), run_name="__main__")
    page = (tmp_path / "speed.md").read_text()
    assert "| 0.67 of the MACs | dense ms | `mergence` | `mstm` | `tome` | `evit` |" in page
    assert "| float32, eager, batch 1 |" in page
    costs = r"\d+\.\d \+ \d+\.\d \+ \d+\.\d %"
    assert re.search(rf"\| reducing, float32, batch 1 \| \| {costs} \|", page)
    text = readme.read_text()
    assert text.startswith(f"before\n{start}\nEach cell says how many times faster")
    speeds = re.search(
        r"\| \| cpu \(.*\n\|---\|---\|\n\| `deit_tiny_patch16_224`, batch 1 \| (.*) \|", text
    )
    own = [row["speedup"] for row in rows if row["name"].startswith("mergence@")]
    assert speeds
    assert speeds[1] == " / ".join(f"{speedup:.2f}" for speedup in own)
    assert text.endswith(f"{end}\nafter\n")
    assert "old" not in text


def rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *names: str) -> tuple[str, str]:
    """The page and the README that are made of some of the committed results."""
    results = tmp_path / "results"
    results.mkdir()
    for name in names:
        (results / name).write_text((HERE / "results" / name).read_text())
    readme = tmp_path / "README.md"
    readme.write_text("<!-- speed: made by benchmarks/speed/render.py -->\n<!-- /speed -->\n")
    folders = ("--results", str(results), "--docs", str(tmp_path), "--readme", str(readme))
    monkeypatch.setattr(sys, "argv", ["render.py", *folders])
    runpy.run_path(str(HERE / "render.py"), run_name="__main__")
    return (tmp_path / "speed.md").read_text(), readme.read_text()


def test_a_page_says_what_was_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, _ = rendered(tmp_path, monkeypatch, "h200-parts.json")
    assert json.loads((HERE / "results" / "h200-parts.json").read_text())["note"] in page
    (compiled, *_) = [line for line in page.splitlines() if "compile, batch 128" in line]
    assert compiled.endswith("| – | – |")  # two methods of four


def test_the_readme_has_the_setting_in_which_the_dense_model_is_fastest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("avx512-amx-intel-compiled.json", "avx512-amx-intel-eager.json", "h200-parts.json")
    page, readme = rendered(tmp_path, monkeypatch, *names)
    assert page.count("## avx512 amx intel") == 2
    assert page.count("token counts in multiples of 1 (16 in bfloat16)") == 2
    rows = {
        line.split(" | ")[0]: line.split(" | ")[1:] for line in readme.splitlines() if " | " in line
    }
    assert len(rows["|"]) == 2  # two files of one machine, one of another
    # At batch 1 the dense model is faster compiled (20.0 ms, eager 22.4), at batch 8 it is not.
    assert rows["| `deit_small_patch16_224`, batch 1"] == ["1.15 / 1.36", "– |"]
    assert rows["| `deit_small_patch16_224`, batch 8"] == ["1.12 / 1.36", "– |"]
    assert rows["| `vit_base_patch16_224`, batch 8"] == ["–", "0.42 / 0.38 |"]


def test_without_results_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["render.py", "--results", str(tmp_path / "none")])
    with pytest.raises(SystemExit):
        runpy.run_path(str(HERE / "render.py"), run_name="__main__")
    assert "make one with run.py" in capsys.readouterr().err


def test_operators_are_timed_one_by_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = "--batch-size 1 --tokens 12 --channels 32 --head-dim 16 --device cpu --rounds 2"
    monkeypatch.setattr(sys, "argv", ["kernels.py", *sizes.split()])
    runpy.run_path(str(HERE / "kernels.py"), run_name="__main__")
    head, *rows = capsys.readouterr().out.splitlines()
    assert head.split() == ["microseconds", "cpu", "dense"]
    assert len(rows) == 8
    assert all(float(row.split()[-1]) > 0 for row in rows)


@pytest.mark.slow
def test_other_runtimes_are_timed_beside_torch(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few = "--types int8 --batch-sizes 2 --methods evit --budgets 0.5 --seconds 0 --rounds 2"
    monkeypatch.setattr(sys, "argv", ["in_runtimes.py", "onnxruntime", "test_vit", *few.split()])
    runpy.run_path(str(HERE / "in_runtimes.py"), run_name="__main__")
    found = re.fullmatch(
        r"int8, batch 2: dense [\d.]+ ms \([\d.]+ in torch\), evit 0.5 ([\d.]+) \(([\d.]+)\)\n",
        capsys.readouterr().out,
    )
    assert found
    faster, of_ideal = map(float, found.groups())
    assert of_ideal == pytest.approx(faster / 2, abs=0.02 + 0.02 * faster)
    monkeypatch.setattr(sys, "argv", ["in_runtimes.py", "openvino", "test_vit", "--types", "int8"])
    with pytest.raises(SystemExit, match="--types f32 bf16, not int8"):
        runpy.run_path(str(HERE / "in_runtimes.py"), run_name="__main__")
