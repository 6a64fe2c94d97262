"""The best schedule and options for one budget so far, and how it gets better."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from torch import Tensor

from mergence.calibration.probe import Probe
from mergence.calibration.search import Prices, neighbours, predicted
from mergence.distances import Distance
from mergence.method import Method

STEPS = (0.15, 0.07)
"""Relative changes of a count that are tried: first the large one, and when it helps no more the
small one."""


@dataclass
class Best:
    """The best reduction for one budget so far.

    Attributes:
        probe: Model and images.
        measure: The distance that trials are compared by.
        images: How many images each trial takes.
        method: The method with the best options so far.
        counts: The best counts so far.
        tried: Called after each trial.
        distance: The mean of that distance for the best.
        trials: How many were measured.
    """

    probe: Probe
    measure: Distance
    images: int
    method: Method
    counts: tuple[int, ...]
    tried: Callable[[], None] = lambda: None
    distance: float = field(init=False, default=float("inf"))
    trials: int = field(init=False, default=0)

    def improve(
        self, table: Tensor, prices: Prices, budget: float, trials: int, *, tune: bool
    ) -> None:
        """Try options, then neighbouring schedules, the most promising first, and keep what helps.

        Args:
            table: See `Curves.table`; it says what promises most.
            prices: What counts cost.
            budget: Share of the dense MACs.
            trials: How many reductions to measure, options and schedules together.
            tune: Whether to try options as well.
        """
        for method in self._options() if tune else [self.method]:
            if self.trials < trials:
                self._try(method, self.counts)
        seen = {self.counts}
        for step in STEPS:
            improved = True
            while improved:
                improved = False
                around = set(neighbours(self.counts, prices, budget, step)) - seen
                for counts in sorted(around, key=lambda counts: predicted(table, counts)):
                    if self.trials >= trials:
                        return
                    seen.add(counts)
                    improved = self._try(self.method, counts)
                    if improved:
                        break

    def _options(self) -> Iterator[Method]:
        """The method as it is, then with one option changed, each change on top of the best."""
        yield self.method
        for name, values in self.method.tunable.items():
            for value in values:
                if value != getattr(self.method, name):
                    yield dataclasses.replace(self.method, **{name: value})

    def _try(self, method: Method, counts: tuple[int, ...]) -> bool:
        distance = self.probe.mean(self.measure, method, counts, self.images)
        self.trials += 1
        self.tried()
        if distance < self.distance:
            self.method, self.counts, self.distance = method, counts, distance
            return True
        return False
