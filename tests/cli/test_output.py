"""What the commands print."""

from __future__ import annotations

import os

import pytest

from mergence.cli import listing, output
from mergence.data import Skipped
from mergence.evaluation import Evaluation, Result


def test_names_cannot_steer_the_terminal_or_stop_the_output(
    capfdbinary: pytest.CaptureFixture[bytes],
) -> None:
    names = [
        os.fsdecode(name) for name in (b"clear\x1b[2J.png", b"no-encoding\xff.png", b"\xc3\xa4.png")
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output, "console", output.Console(width=200))
        output.skipped_names(dict.fromkeys(names, "OSError: bad\nworse"))
    shown = capfdbinary.readouterr().out.decode()
    assert "\x1b" not in shown
    for name in ("clear\\x1b[2J.png", "no-encoding\\udcff.png", "ä.png"):
        assert f"  {name}: OSError: bad" in shown


def test_square_brackets_and_colons_stay_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    name = "[b]a[/]:cat:"
    row = Result(name, None, 12.34, 1.0, 100.0, 100.0, 100.0, 0.1234, None, 1234.5)
    output.evaluation_table(Evaluation(name, name, 5, (Skipped(name, "OSError"),), (row,)))
    output.error(name)
    output.warning(name, UserWarning, "", 0)
    shown = capsys.readouterr()
    assert f"{name} on 5 images of {name}" in shown.out
    assert f"  {name}: OSError" in shown.out
    assert "".join(shown.out.split()).count(name) == 4
    assert shown.err.split("\n") == [f"Error: {name}", f"Note: {name}", ""]


def test_no_line_of_an_error_is_too_long(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "errors", output.Console(width=40, stderr=True))
    output.error("word " * 20)
    assert max(map(len, capsys.readouterr().err.splitlines())) <= 40


def test_nothing_of_a_list_is_cut_in_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(listing, "console", output.Console(width=40))
    listing.list_known()
    assert "…" not in capsys.readouterr().out


def test_numbers_are_whole_in_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(output, "console", output.Console(width=80))
    rows = [
        Result(name, None, 12.34, 1.0, 100.0, 100.0, 100.0, 0.1234, None, 1234.5)
        for name in ("dense", "mergence@0.67 calibrated")
    ]
    output.evaluation_table(Evaluation("demo", "demo", 5, (), tuple(rows)))
    printed = capsys.readouterr().out
    assert "…" not in printed
    assert printed.count("1234.5") == 2
    assert printed.count("+0.00") == 1
