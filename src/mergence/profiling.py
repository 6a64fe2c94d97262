"""Where the time of a forward goes, part by part."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from mergence.devices import synchronise
from mergence.program import program_of

PARTS = ("attention", "mlp", "scoring", "planning", "merging", "learned", "rest")
"""The parts of a forward. `attention` and `mlp` are the two halves of every block, each with its
norm and its residual sum; `scoring`, `planning` and `merging` are a reduction (importance and other
scores; the method's rule; the merge and the sizes with it); `learned` is a method's learned module;
`rest` is what lies outside of the blocks."""


@dataclass(frozen=True)
class Profile:
    """Where the time of one model goes in one setting.

    Attributes:
        name: `dense`, or the name that the recipe was given.
        batch: Images in a batch.
        dtype: Type of weights and images.
        ms: Median milliseconds of each part.
        share: The same as shares of the dense forward in the same setting, so that a reduced model
            adds up to less than 1.
    """

    name: str
    batch: int
    dtype: str
    ms: dict[str, float]
    share: dict[str, float]


@dataclass
class _Clock:
    """Laps of one forward: a point in time at the end of each part, in order."""

    device: torch.device
    laps: list[tuple[str, Any]] = field(default_factory=list)

    def lap(self, part: str) -> None:
        """End a part here. On an accelerator this does not wait: it marks the place in its work."""
        if self.device.type == "cpu":
            self.laps.append((part, 1000 * time.perf_counter()))
            return
        event = torch.Event(self.device, enable_timing=True)
        event.record()
        self.laps.append((part, event))

    def parts(self) -> dict[str, float]:
        """Milliseconds of each part; the first lap only starts the clock."""
        total = dict.fromkeys(PARTS, 0.0)
        synchronise(self.device)
        for (_, start), (part, end) in pairwise(self.laps):
            total[part] += end - start if self.device.type == "cpu" else start.elapsed_time(end)
        return total


def parts_of(model: nn.Module, images: Tensor) -> dict[str, float]:
    """Run one forward and time its parts.

    All blocks run as mergence restates them, which gives the same numbers as the library's own
    code, also those before the first reduction. Apply `keep_rate=1` to profile a dense model.

    Args:
        model: A model that `apply` reduced, in eager mode.
        images: `[B, C, H, W]`.

    Returns:
        Milliseconds of each of `PARTS`; together they are the whole forward.

    Raises:
        MergenceError: The model is not reduced.
    """
    run, clock = program_of(model).run, _Clock(images.device)
    clock.lap("rest")
    run.clock = clock.lap
    try:
        model(images)
    finally:
        run.clock = None
    clock.lap("rest")
    return clock.parts()
