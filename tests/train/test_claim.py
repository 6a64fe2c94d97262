"""One run at a time in a folder."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from mergence.errors import OptionError
from mergence.train import Config, fit
from mergence.train.claim import claimed

HOLDER = """
import os, sys
from pathlib import Path
from mergence.train.claim import claimed
with claimed(Path(sys.argv[1])):
    if os.fork():
        print("held", flush=True)
    sys.stdin.read()
"""


def test_a_folder_in_use_is_refused_until_its_process_is_gone(
    config: Callable[..., Config], tmp_path: Path
) -> None:
    """The one that it has forked, as those that read images, may live a little longer."""
    folder = tmp_path / "run"
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(OptionError, match=r"Another process trains in .*--resume.*torchrun"):
            fit(config(), resume=True)
        assert not (folder / "config.yaml").exists()
        holder.kill()
        holder.wait()
        with claimed(folder):
            pass


def test_without_locks_there_is_no_protection_and_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", none)
    with claimed(tmp_path):
        pass
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    with claimed(tmp_path):
        pass
    with pytest.raises(OptionError, match="cannot be written to"), claimed(tmp_path / ".lock"):
        raise AssertionError("never held")
