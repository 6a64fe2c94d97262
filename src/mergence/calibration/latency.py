"""From a share of the time to a share of the MACs, by timing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from mergence.benchmark import SLOWER, bench
from mergence.errors import ScheduleError
from mergence.recipe import Recipe

_STEPS = 6


@dataclass(frozen=True)
class Latency:
    """The time of a recipe as a share of the dense model's, in eager mode.

    Attributes:
        asked: The share that was asked for.
        batch: Images in a batch.
        device: What it was timed on.
        dtype: Type of weights and images.
        reached: The share that the recipe takes; None where the search was interrupted before that
            was timed.
    """

    asked: float
    batch: int
    device: str
    dtype: str
    reached: float | None = None

    @property
    def missed(self) -> bool:
        """Whether the recipe takes longer than was asked for, by more than two timings differ."""
        return self.reached is not None and self.reached > self.asked / SLOWER


def budget_for(
    latency: float, recipe: Callable[[float], Recipe], time: Callable[[Recipe], float]
) -> float:
    """Find the largest share of the MACs whose recipe meets a share of the time, by bisection.

    Args:
        latency: Share of the dense model's time, above 0 and below 1.
        recipe: The recipe for a share of the MACs; raises `ScheduleError` where there is none.
        time: Measures a recipe as a share of the dense model's time.

    Raises:
        ScheduleError: No share of the MACs meets it.
    """
    best, low, high = None, 0.0, 1.0
    measured: list[str] = []
    for _ in range(_STEPS):
        macs = (low + high) / 2
        try:
            share = time(recipe(macs))
        except ScheduleError:  # so few MACs cannot be had
            low = macs
            continue
        measured.append(f"{share:.2f} of the time at {macs:.2f} of the MACs")
        if share <= latency:
            best, low = macs, macs
        else:
            high = macs
    if best is None:
        raise ScheduleError(
            f"latency={latency} is out of reach here: measured "
            f"{', '.join(measured) or 'nothing, as no schedule reduces so far'}. Ask for more "
            "time, a larger batch or more points."
        )
    return best


def share_of_time(model: nn.Module, images: Tensor, recipe: Recipe) -> float:
    """Time a recipe against the dense model in turns, as `mergence.bench` does, in eager mode.

    Args:
        model: A model without a reduction.
        images: A batch; its size, device and type are the ones that are timed.
        recipe: The recipe.
    """
    timed = bench(
        model,
        {"reduced": recipe},
        input_size=(images.shape[1], images.shape[2], images.shape[3]),
        batches=(len(images),),
        dtypes=(images.dtype,),
        device=images.device,
        seconds=2.0,
        rounds=3,
    )
    return 1 / timed.rows[1].speedup
