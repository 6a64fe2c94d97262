"""What long work found is kept, whatever becomes of printing it."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

from mergence.calibration import Calibration
from mergence.calibration.latency import Latency
from mergence.calibration.outcome import Found
from mergence.calibration.sensitivity import Curves
from mergence.cli import app, main, output
from mergence.errors import MissingExtraError, OptionError
from mergence.exporting import checked
from mergence.exporting.agreement import Agreement
from mergence.exporting.checked import Export
from mergence.recipe import make

SHORT = ("--macs", "0.7", "--images", "2", "--trials", "0", "--points", "1", "--no-tune")
COMMANDS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "list": (("list", "methods"), ()),
    "eval": (("eval", "demo", "--data", "demo", "--limit", "2", "--macs", "0.5"), ()),
    "bench": (("bench", "demo", "--macs", "0.5", "--batch-size", "1", "--seconds", "0"), ()),
    "visualize": (("visualize", "demo", "one.png", "--macs", "0.5", "--out", "a.png"), ("a.png",)),
    "calibrate": (("calibrate", "demo", "--data", "demo", *SHORT, "--out", "r.json"), ("r.json",)),
    "export": (("export", "demo", "--images", "2", "--macs", "0.5", "--out", "a.pt2"), ("a.pt2",)),
    "demo": (("demo", "--limit", "1", "--out", "d.png"), ("d.png",)),
}
SLOW = {"calibrate", "demo"}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] if n in SLOW else []) for n in COMMANDS]
)
def test_files_are_there_before_anything_is_printed(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def closed(*_: Any, **__: Any) -> None:
        raise BrokenPipeError

    def exported(model: object, path: Path, images: Tensor, **_: object) -> Export:
        path.write_bytes(bytes(200))
        return Export(str(path), "pt2", None, (1, 28, 28), "", Agreement(2, 0, 0, 0, 2, 1e-3), {})

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(output.console, "print", closed)
    monkeypatch.setattr(checked, "export", exported)  # which takes long
    Image.effect_noise((28, 28), 50).save("one.png")
    command, files = COMMANDS[name]
    CliRunner().invoke(app, [*command, "--json", "result.json"])
    for file in (*files, "result.json"):
        assert Path(file).stat().st_size > 100


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("eval", "GMACs"),
        ("bench", "speed-up"),
        pytest.param("calibrate", "own schedule", marks=pytest.mark.slow),
    ],
)
def test_what_was_measured_is_shown_where_the_disk_is_full(
    name: str, table: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("result.json").symlink_to("/dev/full")
    done = CliRunner().invoke(app, [*COMMANDS[name][0], "--json", "result.json"])
    assert table in done.output
    assert isinstance(done.exception, OptionError)
    assert "result.json' cannot be written: No space left" in str(done.exception)


@pytest.mark.parametrize(
    ("command", "file"),
    [
        (("calibrate", "demo", "--data", "demo", "--macs", "0.7"), "recipe.json"),
        (("calibrate", "demo", "--data", "demo", "--budgets", "0.7,0.5"), "recipe-0.5.json"),
        (("calibrate", "demo", "--data", "demo", "--budgets", "0.7,0.5"), "recipe-frontier.png"),
        (("demo",), "demo.png"),
        (("visualize", "demo", "one.png", "--macs", "0.5", "--out", "a.png"), "a.png"),
        (("export", "demo", "--macs", "0.5", "--out", "a.pt2"), "a.pt2"),
        (("eval", "demo", "--data", "demo", "--recipe", "mine.json"), "mine.json"),
        (("bench", "demo", "--recipe", "mine.json"), "mine.json"),
    ],
)
def test_json_takes_no_other_files_place(
    command: tuple[str, ...], file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OptionError, match=r"--json .* reads or writes"):
        CliRunner().invoke(app, [*command, "--json", f"./{file}"], catch_exceptions=False)


@pytest.mark.parametrize(
    "command",
    [
        ("demo",),
        ("visualize", "demo", "one.png", "--macs", "0.5", "--out", "a.png"),
    ],
)
def test_what_a_picture_needs_is_asked_for_before_the_work(
    command: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr("mergence.models.load_model", never)
    monkeypatch.setattr("mergence.demo.load_model", never)
    with pytest.raises(MissingExtraError, match=r"'\.\[viz\]'"):
        CliRunner().invoke(app, command, catch_exceptions=False)


def test_an_interrupt_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mergence.demo.load", interrupted)
    monkeypatch.setattr(sys, "argv", ["mergence", "demo"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 130
    assert capsys.readouterr().err.strip() == "Interrupted."


@pytest.mark.parametrize(
    ("given", "told"),
    [("--nothing", "No such option:? '?--nothing"), (None, "Missing argument 'MODEL'")],
)
def test_a_wrong_use_is_told(
    given: str | None,
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["mergence", "eval", *([given] if given else [])])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    assert re.search(told, capsys.readouterr().err)


@pytest.mark.parametrize("drawing", [True, False])
def test_recipes_do_not_wait_for_a_picture(
    drawing: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither where nothing was measured yet nor where matplotlib is missing."""
    recipe = make(schedule=[196] * 12, coarse=0.0)
    found = tuple(Found(macs, macs, recipe, None, None, 0, complete=False) for macs in (0.7, 0.5))
    result = Calibration(found, Curves(196, ()), "kl", 2)
    monkeypatch.setattr("mergence.calibration.calibrate", lambda *_, **__: result)
    monkeypatch.chdir(tmp_path)
    command = ("calibrate", "demo", "--data", "demo", "--budgets", "0.7,0.5")
    if drawing:
        done = CliRunner().invoke(app, command, catch_exceptions=False)
    else:
        monkeypatch.setitem(sys.modules, "matplotlib", None)
        with pytest.warns(UserWarning, match=r"'matplotlib', which is not .* is left out"):
            done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert done.output.count("interrupted") == 2
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "recipe-0.5.json",
        "recipe-0.7.json",
    ]


def test_a_calibration_for_a_time_says_which_is_reached_and_where_that_is_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make(schedule=[196] * 12, coarse=0.0)
    latency = Latency(0.7, 2, "cpu (some)", "float32", reached=0.74)
    found = Found(0.6, 0.59, recipe, None, None, 0, latency=latency)
    result = Calibration((found,), Curves(196, ()), "kl", 2)
    monkeypatch.setattr("mergence.calibration.calibrate", lambda *_, **__: result)
    monkeypatch.chdir(tmp_path)
    command = ("calibrate", "demo", "--data", "demo", "--latency", "0.7")
    done = CliRunner().invoke(app, command, catch_exceptions=False)
    assert "time" in done.output
    assert "74%" in done.output
    assert "70% was asked for" in " ".join(done.output.split())
    assert "takes longer than was asked for" in " ".join(done.output.split())


def test_a_console_shows_what_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream, encoding="ascii"))
    command = ("eval", "demo", "--data", "demo", "--limit", "2", "--macs", "0.5")
    monkeypatch.setattr(sys, "argv", ["mergence", *command])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    shown = stream.getvalue().decode("ascii")
    assert "top-1" in shown
    assert "? in points" in shown  # what a Greek letter is there


def test_a_picture_takes_no_images_place(tmp_path: Path) -> None:
    image = tmp_path / "one.png"
    Image.effect_noise((28, 28), 50).save(image)
    before = image.read_bytes()
    command = ["visualize", "demo", str(image), "--macs", "0.5", "--out", str(image)]
    with pytest.raises(OptionError, match="an image to draw"):
        CliRunner().invoke(app, command, catch_exceptions=False)
    assert image.read_bytes() == before
