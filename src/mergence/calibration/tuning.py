"""Calibration: from a model and a few hundred images to recipes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mergence import family, surgery
from mergence.api import applied, remove
from mergence.arguments import check_several, is_number
from mergence.calibration.effort import Work
from mergence.calibration.latency import Latency, budget_for, share_of_time
from mergence.calibration.outcome import Calibration, Found, Objective
from mergence.calibration.probe import Probe
from mergence.calibration.refining import Best
from mergence.calibration.search import Prices, best_counts, check_budget
from mergence.calibration.sensitivity import measure
from mergence.coarse import share_of
from mergence.data import Batches, Skipped, as_batches
from mergence.devices import described, placed, stop_training, warn_of_slow_type
from mergence.distances import (
    Distance,
    check_classes,
    cosine_distance,
    kl_divergence,
    tempered_kl_divergence,
)
from mergence.errors import DataError, OptionError, ScheduleError
from mergence.method import Method, build
from mergence.program import program_of, require_images_alone
from mergence.recipe import Recipe
from mergence.schedule import Counts, KeepRate, Macs
from mergence.setting import multiple_on

OBJECTIVES: dict[Objective, tuple[Distance, Distance]] = {
    "kl": (kl_divergence, tempered_kl_divergence),
    "cosine": (cosine_distance, cosine_distance),
}
"""What is reported, and what the search goes by."""


def calibrate(
    model: nn.Module,
    batches: Batches,
    *,
    budgets: Sequence[float] = (),
    latency: float | None = None,
    method: str | Method = "mergence",
    points: int = 4,
    align: int | None = None,
    images: int = 512,
    trials: int = 24,
    tune: bool = True,
    objective: Objective | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[float], None] = lambda share: None,
) -> Calibration:
    """Choose how many tokens leave at which block, so that a model's answers change least.

    Each step takes more images than the one before. An eighth of them measures what it costs to
    have only n tokens from a block on. From these curves a dynamic program takes the best schedule
    for a budget and a number of reduction points. A quarter of the images says whether to go on
    from there or from the method's own schedule; on these the method's options are tried and the
    schedule is refined by small steps. At last all images compare the result with the method's own
    schedule at the same budget, and the better one is the recipe. Labels are not looked at and
    nothing is random: the same images give the same recipe, for a latency as far as timings do.

    On Ctrl-C, once there are the curves and for a latency the MACs that meet it, the best recipes
    until then are returned.

    Args:
        model: A model of a known family. It is left as it was. Meanwhile what was applied to it is
            taken off, unless another `device` or `dtype` is given: then a copy runs.
        batches: Images, as `mergence.data.loader` yields them.
        budgets: Shares of the dense MACs, each above 0 and below 1. All share one measurement.
        latency: In place of budgets: the share of the dense model's time on `device`, at the batch
            size of the first batch, in eager mode. The MACs that meet it are found by timing, and
            the recipe that comes out is timed as well: see `Found.latency`.
        method: A method, or the name of one.
        points: How many blocks may reduce. Each costs time, so few are better.
        align: Token counts, prefix included, are multiples of this. None takes what the
            attention of the device is fast at: 8 on CUDA, 16 in bfloat16 on CPUs with AMX, else 1.
        images: How many images to use at most.
        trials: How many options and schedules the refinement measures for each budget.
        tune: Also try the values that the method lists as `tunable`.
        objective: `kl` of the logits, or `cosine` distance of the features. None takes `kl` for a
            classifier and `cosine` for a model without a head.
        device: Where to run. None is where the model is; images are moved there.
        dtype: Type of weights and images. None is the model's.
        progress: Called with the share of the work that is done, 0 to 1.

    Raises:
        OptionError: An argument is out of range, or the model answers with a single value or with
            values that are not finite.
        DataError: No image could be read, or the images differ in size.
        ScheduleError: A budget cannot be met with so few points.
        MergenceError: The model or the method does not fit.
    """
    method = build(method, {}) if isinstance(method, str) else method
    if method.coarse is None:
        method = dataclasses.replace(method, coarse=0.0)  # recipes with counts say everything
    check_several(budgets=budgets)
    _check(method, budgets, latency, points, images, trials)
    require_images_alone(model)
    spec = family.spec_of(model)
    check_classes(spec.classes)
    model, place, type_ = placed(model, device, dtype)
    warn_of_slow_type(place, type_)
    back = surgery.bookmark(model)
    back_to_training = stop_training(model)
    try:
        remove(model)
        options = _options(method, spec.coarse) if tune else {}
        objective = objective or ("kl" if spec.classes else "cosine")
        distance, searched = OBJECTIVES[objective]
        pixels, skipped = _first_images(batches, images, place, type_)
        work = Work(progress, sum(map(len, pixels)), trials, len(budgets) or 1)
        probe = Probe(model, pixels)
        multiple = align or multiple_on(place.type, type_)

        @cache
        def prices_of(method: Method) -> Prices:
            return _prices(model, method, multiple, probe.patches)

        prices = prices_of(method)
        depth = prices.setting.depth
        for budget in budgets:  # Can it be met at all? Better known before the long work.
            check_budget(prices, budget, points)
        work.measured_dense(depth)
        curves = measure(
            probe, searched, method, depth, images=work.few, progress=work.measured_cells
        )
        table = curves.table()

        def time(recipe: Recipe) -> float:
            return share_of_time(model, pixels[0], recipe)

        spent = None
        if latency is not None:
            named = str(type_).removeprefix("torch.")
            spent = Latency(latency, len(pixels[0]), described(place), named)
            budgets = (
                budget_for(
                    latency,
                    lambda macs: _recipe(method, best_counts(table, prices, macs, points), prices),
                    time,
                ),
            )
        found: list[Found] = []
        # All of them now, so that what an interrupt would lose is done before the long work.
        starts = [best_counts(table, prices, budget, points) for budget in budgets]
        for budget, counts in zip(budgets, starts, strict=True):
            best = Best(probe, prices_of, searched, work.some, method, counts, work.tried)
            calibrated = uncalibrated = None
            complete = not found or found[-1].complete
            try:
                if complete:
                    own = _own(best, method, budget)
                    own = own if own is not None and _reductions(best, *own) <= points else None
                    best.improve(table, budget, points, trials, options, own)
                    calibrated, uncalibrated = _compared(best, distance, method, budget, points)
                    if spent is not None:
                        start = method, counts
                        calibrated, spent = _timed(best, distance, calibrated, start, spent, time)
                    work.concluded(len(found) + 1)
            except KeyboardInterrupt:
                complete = False
            final = prices_of(best.method)
            notes: dict[str, Any] = {objective: calibrated}
            notes |= {"images": probe.images, "points": points}
            if spent is not None:
                notes["latency"] = dataclasses.asdict(spent)
            found.append(
                Found(
                    budget=budget,
                    macs_ratio=final.share(best.counts),
                    recipe=_recipe(best.method, best.counts, final, {"calibration": notes}),
                    distance=calibrated,
                    uncalibrated=uncalibrated,
                    trials=best.trials,
                    complete=complete,
                    latency=spent,
                )
            )
        return Calibration(tuple(found), curves, objective, probe.images, tuple(skipped))
    finally:
        back()
        back_to_training()


def _options(method: Method, coarse: bool) -> dict[str, tuple[float, ...]]:
    """Options and their values to try, each of which the method takes."""
    options = {name: v for name, v in method.tunable.items() if coarse or name != "coarse"}
    for name, values in options.items():
        value = getattr(method, name)
        if not isinstance(value, bool) and not is_number(value):
            raise OptionError(
                f"{type(method).__name__}.{name} is {value!r}, and calibration tries larger and "
                "smaller numbers. Give a number, or calibrate with tune=False (--no-tune)."
            )
        for other in values:
            dataclasses.replace(method, **{name: other})
    return options


def _first_images(
    batches: Batches, images: int, device: torch.device, dtype: torch.dtype
) -> tuple[list[Tensor], list[Skipped]]:
    pixels: list[Tensor] = []
    skipped: list[Skipped] = []
    for batch in as_batches(batches):
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


def _recipe(
    method: Method, counts: tuple[int, ...], prices: Prices, notes: Mapping[str, Any] | None = None
) -> Recipe:
    setting = prices.setting
    return Recipe(method, Counts(after=counts, of=setting.patches), setting.align, notes or {})


def _own(best: Best, method: Method, budget: float) -> tuple[Method, tuple[int, ...]] | None:
    """A method with its own schedule for a budget, None where that is out of reach."""
    setting = best.prices(dataclasses.replace(method, coarse=None)).setting
    try:
        start, *counts = Macs(macs=budget, shape=method.shape).tokens(setting)
    except ScheduleError:
        return None
    return dataclasses.replace(method, coarse=share_of(start, setting.patches)), tuple(counts)


def _reductions(best: Best, method: Method, counts: tuple[int, ...]) -> int:
    """How many blocks of a schedule reduce."""
    return len({best.prices(method).setting.tokens, *counts}) - 1


def _compared(
    best: Best, distance: Distance, method: Method, budget: float, points: int
) -> tuple[float, float | None]:
    """Distance on all images of the best and of the method as it was given, by its own schedule.

    Keeps the better one, or that schedule with the options that were found.
    """
    calibrated, uncalibrated = best.probe.mean(distance, best.method, best.counts), None
    for given in dict.fromkeys((method, best.method)):
        if (own := _own(best, given, budget)) is None:
            continue
        found = best.probe.mean(distance, *own)
        if given == method:
            uncalibrated = found
        if found < calibrated and _reductions(best, *own) <= points:
            (best.method, best.counts), calibrated = own, found
    return calibrated, uncalibrated


def _timed(
    best: Best,
    distance: Distance,
    calibrated: float,
    start: tuple[Method, tuple[int, ...]],
    latency: Latency,
    time: Callable[[Recipe], float],
) -> tuple[float, Latency]:
    """Distance and time of the best; where it takes too long, goes back to what met the time."""

    def timed(method: Method, counts: tuple[int, ...]) -> Latency:
        recipe = _recipe(method, counts, best.prices(method))
        return dataclasses.replace(latency, reached=time(recipe))

    found = timed(best.method, best.counts)
    if not found.missed or (best.method, best.counts) == start:
        return calibrated, found
    # At equal MACs an option can take longer, such as coarse patches.
    calibrated, found = best.probe.mean(distance, *start), timed(*start)
    best.method, best.counts = start
    return calibrated, found


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
