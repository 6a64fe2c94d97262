"""Requests to end: which of two signals is the same request, and which one acts at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from mergence.train import signals
from mergence.train.signals import Readers, Requests, outlive_first


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As at a terminal; what a shell starts in the background ignores SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
def test_what_comes_twice_within_moments_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchrun passes on to each process what a scheduler has sent to all of them."""
    with Requests() as requests:
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
        assert requests.name == "SIGTERM"
        monkeypatch.setattr(signals, "SAME", 0.0)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def reader(ready: Any, same: float) -> None:
    signals.SAME = same
    outlive_first(0)
    ready.set()
    time.sleep(60)


def started(same: float) -> Any:
    context = multiprocessing.get_context("forkserver")
    ready = context.Event()
    process = context.Process(target=reader, args=(ready, same), daemon=True)
    process.start()
    assert ready.wait(60)
    return process


@pytest.mark.parametrize("same", [60.0, 0.0])
def test_a_process_that_reads_images_outlives_it_as_well(same: float) -> None:
    process = started(same)
    pid = process.pid
    os.kill(pid, signal.SIGTERM)
    time.sleep(0.3)  # or the two would arrive as one
    os.kill(pid, signal.SIGTERM)
    process.join(2)
    assert process.exitcode == (None if same else -signal.SIGTERM)
    process.kill()
    process.join()


def test_one_that_does_not_end_is_ended() -> None:
    """The signals that torch and Python send it might be one request to it, and they wait."""
    process = started(60.0)
    readers = Readers()
    readers._readers[:] = [SimpleNamespace(_shutdown_workers=process.terminate, _workers=[process])]
    readers.close()
    process.join(2)
    assert process.exitcode == -signal.SIGKILL
