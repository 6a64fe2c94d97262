"""What the commands print."""

from __future__ import annotations

import os

import pytest

from mergence.cli import output


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
