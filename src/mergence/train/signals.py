"""Ctrl-C and a scheduler's request to end, heard between two steps instead of within one."""

from __future__ import annotations

import signal
import threading
import time
from functools import cached_property
from types import FrameType, TracebackType
from typing import Any, Self

SAME = 2.0
"""Seconds in which what comes after the first signal is the same request: torchrun passes on to
each process what a scheduler has sent to all of them."""


class _First:
    """When the first signal came."""

    def __init__(self) -> None:
        self._came: float | None = None

    def is_over(self) -> bool:
        """Asked at each signal: whether it is another request than the first one."""
        now = time.monotonic()
        if self._came is None:
            self._came = now
            return False
        return now - self._came >= SAME


class Requests:
    """Context manager: notes the first SIGINT or SIGTERM, and lets a later one act at once.

    Attributes:
        name: The signal that came, or None.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._first = _First()
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():  # only there may it be done
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.name = self.name or signal.Signals(number).name
        if self._first.is_over():
            self._restore()
            signal.raise_signal(number)

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._restore()


def outlive_first(worker: int) -> None:
    """For a DataLoader: let a process that reads images survive the first SIGINT or SIGTERM.

    Terminals and schedulers send it to all processes of a run, which needs images until the end of
    its step. torch's own handler ends a worker at once, and the run with it.
    """
    first = _First()

    def note(number: int, frame: FrameType | None) -> None:
        if first.is_over():
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)


class Readers:
    """Mixed into a feed: ends the processes that read for it.

    At its exit Python sends them one signal, which they outlive, and waits for them for ever. It is
    reached with them alive where an error leaves a run, whose traceback holds the iterator.
    """

    @cached_property
    def _readers(self) -> list[Any]:
        """The iterator of a DataLoader that is read from now."""
        return []

    def close(self) -> None:
        """End the processes that read images; there is no epoch after this."""
        for one in self._readers:
            if hasattr(one, "_shutdown_workers"):  # torch has no public way; Lightning's is this
                one._shutdown_workers()
            for worker in getattr(one, "_workers", ()):  # it gave them five seconds
                if worker.is_alive():
                    worker.kill()
