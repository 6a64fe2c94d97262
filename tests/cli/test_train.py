"""`mergence train` and `python -m mergence.train`, as a user runs them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from mergence.cli import app, main
from mergence.train import Config
from mergence.train.config import read_yaml

SHORT = ("--data", "demo", "--limit", "2", "--batch-size", "1", "--epochs", "1", "--device", "cpu")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, arguments)], catch_exceptions=False)


def test_every_option_of_the_configuration_is_a_flag() -> None:
    text = run("--help").output
    for name in Config.names():
        assert name == "model" or f"--{name.replace('_', '-')}" in text


def test_flags_win_over_the_file(tmp_path: Path) -> None:
    file, out, json_ = tmp_path / "a.yaml", tmp_path / "run", tmp_path / "out.json"
    file.write_text("model: demo\ndata: demo\nlr: 1e-3\nepochs: 7\nmacs: 0.8\nset: {alpha: 0.1}\n")
    flags = ("--macs", "0.67", "--macs", "0.5", "--set", "alpha=0.2", "--val", "demo")
    result = run(
        *("--config", file, *SHORT, "--out", out, *flags, "--val-limit", "1", "--json", json_)
    )
    assert result.exit_code == 0, result.output
    written = read_yaml(out / "config.yaml")
    assert (written["lr"], written["epochs"], written["macs"]) == (1e-3, 1, [0.67, 0.5])
    assert written["set"] == {"alpha": 0.2}
    assert "mergence 0.67 top-1" in " ".join(result.output.split())
    data = json.loads(json_.read_text())
    assert data["model"] == str(out / "model")
    assert len(data["history"]) == 2


def test_a_log_file_gets_lines_in_place_of_the_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = ("demo", *SHORT, "--limit", "4", "--macs", "0.67")
    text = run(*steps, "--out", tmp_path / "a").stderr
    first, last = [line for line in text.splitlines() if "loss" in line]
    assert first.startswith("epoch 1/1, step 1/4: loss ")
    assert last.startswith("epoch 1/1, step 4/4: loss ")
    assert last.endswith("images/s, 0:00:00 left")

    monkeypatch.setattr("mergence.cli.train.SECONDS", 0.0)
    assert run(*steps, "--out", tmp_path / "b").stderr.count("loss ") == 4


def test_an_unknown_key_is_blamed_on_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("epoch: 3\n")
    monkeypatch.setattr("sys.argv", ["mergence", "train", "demo", "--config", str(file)])
    with pytest.raises(SystemExit):
        main()
    text = "".join(capsys.readouterr().err.split())
    assert "a.yaml'hasanunknownkey'epoch'.Didyoumean'epochs'?" in text


@pytest.mark.slow
def test_the_module_runs_the_command(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mergence.train", "demo", *SHORT, "--macs", "0.67"],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "lacks out" in " ".join(done.stderr.split())
