"""What a calibration found."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from mergence.calibration.latency import Latency
from mergence.calibration.sensitivity import Curves
from mergence.data import Skipped
from mergence.recipe import Recipe

Objective = Literal["kl", "cosine"]


@dataclass(frozen=True)
class Found:
    """The recipe for one budget.

    Attributes:
        budget: The share of the dense MACs that was asked for, or that met the latency.
        macs_ratio: The share that the recipe needs.
        recipe: The recipe.
        distance: Mean distance to the dense model over all images; None where the search was
            interrupted before that.
        uncalibrated: The same for the method as it was given, by its own schedule for this budget;
            None where that cannot meet it.
        trials: How many schedules and options were measured for it.
        complete: False where the search was interrupted.
        latency: The time that was asked for and that of the recipe; None for a share of the MACs.
    """

    budget: float
    macs_ratio: float
    recipe: Recipe
    distance: float | None
    uncalibrated: float | None
    trials: int
    complete: bool = True
    latency: Latency | None = None


@dataclass(frozen=True)
class Calibration:
    """What a calibration found.

    Attributes:
        found: One recipe for each budget, in the order asked for.
        curves: The measured sensitivity of each block.
        objective: What was measured: `kl`, in nats, or `cosine`.
        images: How many images were used.
        skipped: Images that could not be read.
    """

    found: tuple[Found, ...]
    curves: Curves
    objective: Objective
    images: int
    skipped: tuple[Skipped, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The calibration as plain JSON values."""
        found = []
        for one in self.found:
            latency = None if one.latency is None else dataclasses.asdict(one.latency)
            found.append(vars(one) | {"recipe": one.recipe.to_dict(), "latency": latency})
        return dataclasses.asdict(dataclasses.replace(self, found=())) | {"found": found}
