"""Calibration: from a model and a few hundred images to recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mergence import surgery
from mergence.api import applied, remove
from mergence.calibration.latency import budget_for, share_of_time
from mergence.calibration.probe import (
    Distance,
    Probe,
    cosine_distance,
    kl_divergence,
    tempered_kl_divergence,
)
from mergence.calibration.refining import Best
from mergence.calibration.search import Prices, best_counts
from mergence.calibration.sensitivity import SHARES, Curves, measure
from mergence.data import Batch, Skipped
from mergence.devices import warn_of_slow_type
from mergence.errors import DataError, OptionError, ScheduleError
from mergence.method import Method, build
from mergence.recipe import Recipe
from mergence.schedule import Counts, KeepRate, Macs
from mergence.step import program_of

Objective = Literal["kl", "cosine"]
OBJECTIVES: dict[Objective, tuple[Distance, Distance]] = {
    "kl": (kl_divergence, tempered_kl_divergence),
    "cosine": (cosine_distance, cosine_distance),
}
"""What is reported, and what the search goes by."""


@dataclass(frozen=True)
class Found:
    """The recipe for one budget.

    Attributes:
        budget: The share of the dense MACs that was asked for, or that met the latency.
        macs_ratio: The share that the recipe needs.
        recipe: The recipe.
        distance: Mean distance to the dense model over all images; None where the search was
            interrupted before that.
        uncalibrated: The same for the method's own schedule at this budget; None where that cannot
            meet it.
        trials: How many schedules and options were measured for it.
        complete: False where the search was interrupted.
    """

    budget: float
    macs_ratio: float
    recipe: Recipe
    distance: float | None
    uncalibrated: float | None
    trials: int
    complete: bool = True


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
        found = [vars(one) | {"recipe": one.recipe.to_dict()} for one in self.found]
        return dataclasses.asdict(dataclasses.replace(self, found=())) | {"found": found}


def calibrate(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    budgets: Sequence[float] = (),
    latency: float | None = None,
    method: str | Method = "mergence",
    points: int = 4,
    align: int = 1,
    images: int = 512,
    trials: int = 24,
    tune: bool = True,
    objective: Objective | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    progress: Callable[[float], None] = lambda share: None,
) -> Calibration:
    """Choose how many tokens leave at which block, so that a model's answers change least.

    Each step takes more images than the one before. An eighth of them measures what it costs to
    have only n tokens from a block on. From these curves a dynamic program takes the best schedule
    for a budget and a number of reduction points. On a quarter of the images the method's options
    are tried and the schedule is refined by small steps. At last all images compare the result with
    the method's own schedule at the same budget, and the better one is the recipe. Labels are not
    looked at and nothing is random: the same images give the same recipe.

    On Ctrl-C, once the curves are there, the best recipes until then are returned.

    Args:
        model: A model of a known family. It is moved to `device` and `dtype` and left there; what
            was applied to it is taken off meanwhile and put back.
        batches: Images, as `mergence.data.loader` yields them.
        budgets: Shares of the dense MACs, each above 0 and below 1. All share one measurement.
        latency: In place of budgets: the share of the dense model's time on `device`, at the batch
            size of the first batch. The MACs that meet it are found by timing.
        method: A method, or the name of one.
        points: How many blocks may reduce. Each costs time, so few are better.
        align: Token counts, prefix included, are multiples of this.
        images: How many images to use at most.
        trials: How many options and schedules the refinement measures for each budget.
        tune: Also try the values that the method lists as `tunable`.
        objective: `kl` of the logits, or `cosine` distance of the features. None takes `kl` for a
            classifier and `cosine` for a model without a head.
        device: Where to run.
        dtype: Type of weights and images.
        progress: Called with the share of the work that is done, 0 to 1.

    Raises:
        OptionError: An argument is out of range.
        DataError: No image could be read, or the images differ in size.
        ScheduleError: A budget cannot be met with so few points.
        MergenceError: The model or the method does not fit.
    """
    method = build(method, {}) if isinstance(method, str) else method
    _check(method, budgets, latency, points, images, trials)
    warn_of_slow_type(torch.device(device), dtype)
    model = model.to(device=device, dtype=dtype).eval()
    back = surgery.bookmark(model)
    try:
        remove(model)
        objective = objective or _objective_of(model)
        distance, searched = OBJECTIVES[objective]
        pixels, skipped = _first_images(batches, images, device, dtype)
        work = _Work(progress, sum(map(len, pixels)), trials, len(budgets) or 1)
        probe = Probe(model, pixels)
        prices = _prices(model, method, align, probe.patches)
        depth = prices.setting.depth
        for budget in budgets:  # Can it be met at all? Better known before the long work.
            best_counts(torch.zeros(depth, probe.patches + 1), prices, budget, points)
        work.measured_dense(depth)
        curves = measure(
            probe, searched, method, depth, images=work.few, progress=work.measured_cells
        )
        table = curves.table()

        def recipe(
            method: Method, counts: tuple[int, ...], notes: Mapping[str, Any] = {}
        ) -> Recipe:
            return Recipe(method, Counts(after=counts, of=probe.patches), align, notes)

        if latency is not None:
            budget = budget_for(
                latency,
                lambda macs: recipe(method, best_counts(table, prices, macs, points)),
                lambda candidate: share_of_time(model, pixels[0], candidate),
            )
            budgets = (budget,)
        found: list[Found] = []
        interrupted = False
        for budget in budgets:
            counts = best_counts(table, prices, budget, points)
            best = Best(probe, searched, work.some, method, counts, work.tried)
            calibrated = uncalibrated = None
            try:
                if not interrupted:
                    best.improve(table, prices, budget, trials, tune=tune)
                    calibrated = probe.mean(distance, best.method, best.counts)
                    own = _own(best.method, prices, budget)
                    if own is not None:
                        uncalibrated = probe.mean(distance, best.method, own)
                        if uncalibrated < calibrated and len({probe.patches, *own}) - 1 <= points:
                            best.counts, calibrated = own, uncalibrated
                    work.concluded(len(found) + 1)
            except KeyboardInterrupt:
                interrupted = True
            measured = {objective: calibrated, "images": probe.images, "points": points}
            found.append(
                Found(
                    budget=budget,
                    macs_ratio=prices.setting.share(best.counts),
                    recipe=recipe(best.method, best.counts, {"calibration": measured}),
                    distance=calibrated,
                    uncalibrated=uncalibrated,
                    trials=best.trials,
                    complete=not interrupted,
                )
            )
        return Calibration(tuple(found), curves, objective, probe.images, tuple(skipped))
    finally:
        back()


@dataclass
class _Work:
    """Turns what has been measured into a share of the whole, in forward passes of one image."""

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
        self.depth = depth
        self._add(self.images)

    def measured_cells(self, cells: int) -> None:
        self._add(0.35 * cells * self.few)

    def tried(self) -> None:
        self._add(0.5 * self.some)

    def concluded(self, budgets: int) -> None:
        self.done = self._before + budgets * self._per_budget
        self._add(0)


def _first_images(
    batches: Iterable[Batch], images: int, device: str | torch.device, dtype: torch.dtype
) -> tuple[list[Tensor], list[Skipped]]:
    pixels: list[Tensor] = []
    skipped: list[Skipped] = []
    for batch in batches:
        skipped += batch.skipped
        left = images - sum(map(len, pixels))
        if batch:
            pixels.append(batch.images[:left].to(device=device, dtype=dtype))
        if left <= len(batch):
            break
    if not pixels:
        raise DataError(
            f"There is no image to calibrate on: {len(skipped)} could not be read, and no other "
            "was given."
        )
    sizes = {tuple(batch.shape[-2:]) for batch in pixels}
    if len(sizes) > 1:
        raise DataError(f"The images are of several sizes ({sizes}); calibration needs one.")
    return pixels, skipped


def _prices(model: nn.Module, method: Method, align: int, patches: int) -> Prices:
    with applied(model, Recipe(method, KeepRate(keep_rate=1.0), align)):
        program = program_of(model)
        return Prices(program.cost, program.reduction, program.setting(patches))


def _own(method: Method, prices: Prices, budget: float) -> tuple[int, ...] | None:
    """The method's own schedule at a budget, if it can meet it."""
    try:
        return Macs(macs=budget, shape=method.shape).counts(prices.setting)
    except ScheduleError:
        return None


def _objective_of(model: nn.Module) -> Objective:
    return "kl" if getattr(model, "num_classes", 0) > 1 else "cosine"


def _check(
    method: Method,
    budgets: Sequence[float],
    latency: float | None,
    points: int,
    images: int,
    trials: int,
) -> None:
    if bool(budgets) == (latency is not None):
        raise OptionError(
            "Say what to calibrate for: either budgets, shares of the dense MACs such as 0.67, or "
            "a latency, a share of the dense model's time."
        )
    for name, shares in (("budgets", budgets), ("latency", () if latency is None else (latency,))):
        for share in shares:
            if not 0 < share < 1:
                raise OptionError(f"{name} holds {share}; give shares above 0 and below 1.")
    for name, number in (("points", points), ("images", images)):
        if number < 1:
            raise OptionError(f"{name} is {number}; give at least 1.")
    if trials < 0:
        raise OptionError(f"trials is {trials}; give 0 or more.")
    if method.learned(1) is not None:
        raise OptionError(
            f"This {type(method).__name__} has a module that is learned, and calibration knows no "
            "weights for it. Calibrate without it, or train with the schedule that came out."
        )
