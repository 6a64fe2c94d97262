"""How much of a calibration is done, and how many images each step takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mergence.calibration.sensitivity import SHARES


@dataclass
class Work:
    """Turns what has been measured into a share of the whole, in forward passes of one image.

    Attributes:
        progress: Called with the share.
        images: How many images there are.
        trials: How many reductions are tried for each budget.
        budgets: How many budgets there are.
    """

    progress: Callable[[float], None]
    images: int
    trials: int
    budgets: int
    depth: int = 0
    done: float = 0.0

    @property
    def few(self) -> int:
        """Images that the curves are measured on."""
        return min(max(self.images // 8, 64), self.images)

    @property
    def some(self) -> int:
        """Images that the refinement is measured on."""
        return min(max(self.images // 4, 64), self.images)

    @property
    def _per_budget(self) -> float:
        return 0.5 * self.trials * self.some + 1.3 * self.images

    @property
    def _before(self) -> float:
        return self.images + 0.35 * self.depth * len(SHARES) * self.few

    def _add(self, passes: float) -> None:
        self.done += passes
        self.progress(min(self.done / (self._before + self.budgets * self._per_budget), 1.0))

    def measured_dense(self, depth: int) -> None:
        """The dense model has seen all images."""
        self.depth = depth
        self._add(self.images)

    def measured_cells(self, cells: int) -> None:
        """So many cells of the sensitivity grid are measured."""
        self._add(0.35 * cells * self.few)

    def tried(self) -> None:
        """One reduction more has been tried."""
        self._add(0.5 * self.some)

    def concluded(self, budgets: int) -> None:
        """So many budgets are done, with however few trials."""
        self.done = self._before + budgets * self._per_budget
        self._add(0)
