"""The best schedule and options for one budget so far, and how it gets better."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from mergence.calibration.probe import Probe
from mergence.calibration.search import Prices, best_counts, neighbours, predicted
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
        prices: What counts cost with a method.
        measure: The distance that trials are compared by.
        images: How many images each trial takes.
        method: The method with the best options so far.
        counts: The best counts so far.
        tried: Called after each trial.
        distance: The mean of that distance for the best.
        trials: How many were measured.
    """

    probe: Probe
    prices: Callable[[Method], Prices]
    measure: Distance
    images: int
    method: Method
    counts: tuple[int, ...]
    tried: Callable[[], None] = lambda: None
    distance: float = field(init=False, default=float("inf"))
    trials: int = field(init=False, default=0)

    def improve(
        self,
        table: Tensor,
        budget: float,
        points: int,
        trials: int,
        options: Mapping[str, Sequence[float]],
        own: tuple[Method, tuple[int, ...]] | None = None,
    ) -> None:
        """Try options, then neighbouring schedules, the most promising first, and keep what helps.

        From the value that an option has, larger ones are tried as long as they help, then smaller
        ones. One with which another number of tokens enters the first block comes with a schedule
        of its own, so that the next may help where it did not.

        Args:
            table: See `Curves.table`; it says what promises most.
            budget: Share of the dense MACs.
            points: How many blocks may reduce.
            trials: How many reductions to measure, options and schedules together.
            options: Values of the method's options to try.
            own: Where else to start, if that is better.
        """
        for start in filter(None, ((self.method, self.counts), own)):
            if self.trials < trials:
                self._try(*start)
        for name, direction in self._directions(options):
            for other in direction:
                if self.trials >= trials:
                    break
                method = dataclasses.replace(self.method, **{name: other})
                prices, counts = self.prices(method), self.counts
                others = prices.setting.tokens != self.prices(self.method).setting.tokens
                if others:  # must leave, at places that need not be near those of a smaller value
                    counts = best_counts(table, prices, budget, points)
                if not self._try(method, counts) and not others:
                    break
        prices = self.prices(self.method)
        seen = {self.counts}

        def promise(counts: tuple[int, ...]) -> float:
            return predicted(table, counts, prices.setting.tokens)

        for step in STEPS:
            improved = True
            while improved:
                improved = False
                around = set(neighbours(self.counts, prices, budget, step)) - seen
                for counts in sorted(around, key=promise):
                    if self.trials >= trials:
                        return
                    seen.add(counts)
                    improved = self._try(self.method, counts)
                    if improved:
                        break

    def _directions(
        self, options: Mapping[str, Sequence[float]]
    ) -> Iterator[tuple[str, list[float]]]:
        """For each option the larger values, then the smaller ones, the nearest first."""
        for name, values in options.items():
            value = getattr(self.method, name)
            yield name, sorted(v for v in values if v > value)
            yield name, sorted((v for v in values if v < value), reverse=True)

    def _try(self, method: Method, counts: tuple[int, ...]) -> bool:
        distance = self.probe.mean(self.measure, method, counts, self.images)
        self.trials += 1
        self.tried()
        if distance < self.distance:
            self.method, self.counts, self.distance = method, counts, distance
            return True
        return False
