"""mergence calibrate."""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergence.cli import options as o
from mergence.cli.output import check_json, console, progress, skipped, table_of, write_json
from mergence.errors import MissingExtraError, OptionError
from mergence.files import check_target

if TYPE_CHECKING:
    from mergence.calibration import Calibration


def calibrate(
    model: o.Model,
    data: Annotated[
        str,
        typer.Option(
            metavar="DIR", help="A folder or a .zip of images, or demo. Labels are not looked at."
        ),
    ],
    macs: o.ManyMacs = None,
    latency: Annotated[
        float | None,
        typer.Option(help="Share of the dense time on this device to meet instead, in eager mode."),
    ] = None,
    budgets: Annotated[
        str | None,
        typer.Option(metavar="R,R,...", help="Several shares of the MACs: a family of recipes."),
    ] = None,
    out: Annotated[Path, typer.Option(help="The recipe to write.")] = Path("recipe.json"),
    method: o.OneMethod = None,
    set_: o.Set = None,
    points: Annotated[
        int, typer.Option(min=1, help="How many blocks may reduce; each costs time.")
    ] = 4,
    align: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Token counts, prefix included, in multiples of this. Default: what the "
            "device is fast at.",
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Use so many images.")] = 512,
    trials: Annotated[
        int, typer.Option(min=0, help="Options and schedules to try for each budget.")
    ] = 24,
    tune: Annotated[bool, typer.Option(help="Try the method's options as well.")] = True,
    checkpoint: o.Checkpoint = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "float32",
    batch_size: o.BatchSize = 32,
    seed: o.Seed = 0,
    workers: o.Workers = 0,
    json: o.Json = None,
) -> None:
    """Find the recipe that changes a model's answers least, from images without labels."""
    shares = _shares(macs, latency, budgets)
    recipes, picture = [out], None
    if len(shares) > 1:
        recipes = [_named(out, f"{share:g}") for share in shares]
        picture = _named(out, "frontier").with_suffix(".png")
    for path in recipes:
        check_target(path, f"--out {path}")
    check_json(json, *recipes, picture)
    chosen, type_, place = o.method_of(method, set_), o.dtype_of(dtype), o.device_of(device)
    from mergence.calibration import calibrate
    from mergence.data import loader, open_images
    from mergence.models import load_model
    from mergence.visualize import check_path

    if picture:
        try:
            check_path(picture)
        except MissingExtraError as missing:  # it was not asked for
            warnings.warn(f"{missing} The picture '{picture}' is left out.", stacklevel=1)
            picture = None
    loaded = load_model(model, checkpoint=checkpoint)
    found = open_images(data, transform=loaded.transform, mode=loaded.mode, limit=images, seed=seed)
    with progress("calibrating", 100) as advance:
        done = 0.0

        def show(share: float) -> None:
            nonlocal done
            advance(100 * share - done)
            done = 100 * share

        result = calibrate(
            loaded.model.to(device=place, dtype=type_),
            loader(found, batch_size=batch_size, workers=workers),
            budgets=shares,
            latency=latency,
            method=chosen,
            points=points,
            align=align,
            images=images,
            trials=trials,
            tune=tune,
            progress=show,
        )
    source = {"model": model, "data": data, "seed": seed}
    try:  # first, because printing may fail as well
        for one, path in zip(result.found, recipes, strict=True):
            notes = source | dict(one.recipe.notes)
            dataclasses.replace(one.recipe, notes=notes).save(path)
        drawn = [picture] if picture and _plot(result, model, picture) else []
        write_json(json, source | result.to_dict())
        for path in recipes + drawn:
            console.print(f"Wrote {path}", highlight=False)
    finally:
        _table(result, model)


def _shares(macs: list[float] | None, latency: float | None, budgets: str | None) -> list[float]:
    given = {"--macs": macs or None, "--latency": latency, "--budgets": budgets}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        raise OptionError(
            f"{' and '.join(named) or 'Nothing'} says how much work may be left. Give exactly one "
            "of --macs 0.67, --latency 0.7 or --budgets 0.8,0.67,0.5."
        )
    if budgets is None:
        return list(dict.fromkeys(macs or ()))
    try:
        return list(dict.fromkeys(float(part) for part in budgets.split(",") if part.strip()))
    except ValueError as problem:
        raise OptionError(
            f"--budgets {budgets} is no list of numbers; give shares such as 0.8,0.67,0.5."
        ) from problem


def _named(out: Path, what: str) -> Path:
    return out.with_name(f"{out.stem}-{what}{out.suffix}")


def _table(result: Calibration, model: str) -> None:
    title = f"{model} on {result.images} images without labels"
    table = table_of(title)
    name = {"kl": "KL", "cosine": "1 − cos"}[result.objective]
    timed = [one.latency for one in result.found if one.latency is not None]
    for heading in (*(["time"] if timed else []), "MACs", name, "own schedule", "tried"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("options")
    table.add_column("patch tokens after each block")
    for one in result.found:
        schedule = one.recipe.schedule.to_dict()
        options = one.recipe.method.to_dict()
        table.add_row(
            *(_number(latency.reached, ".0%") for latency in timed),
            f"{one.macs_ratio:.0%}",
            _number(one.distance) + ("" if one.complete else " (interrupted)"),
            _number(one.uncalibrated),
            str(one.trials),
            ", ".join(f"{k}={_short(options[k])}" for k in one.recipe.method.tunable),
            " ".join(map(str, schedule["after"])),
        )
    console.print(table)
    console.print(
        f"{name}: mean distance to the dense model, of the recipe and of the method's own schedule "
        "at the same MACs.",
        style="dim",
    )
    for latency in timed:
        console.print(
            f"time: share of the dense model's, in eager mode at batch {latency.batch} in "
            f"{latency.dtype} on {latency.device}; {latency.asked:.0%} was asked for.",
            style="dim",
        )
        if latency.missed:
            console.print(
                "The recipe takes longer than was asked for: what met the time when the search "
                "began does not meet it any more. Ask for less time, or try again on a quieter "
                "machine.",
                style="yellow",
            )
    skipped(result.skipped)


def _short(value: object) -> str:
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _number(value: float | None, form: str = ".4f") -> str:
    return "–" if value is None else format(value, form)


def _plot(result: Calibration, model: str, path: Path) -> bool:
    """Draw what the budgets cost; False where an interrupt came before that was measured."""
    from mergence.frontier import draw_frontier
    from mergence.visualize import save

    lines = {
        "calibrated": [(f.macs_ratio, f.distance) for f in result.found if f.distance],
        "own schedule": [(f.budget, f.uncalibrated) for f in result.found if f.uncalibrated],
    }
    lines = {name: points for name, points in lines.items() if points}
    if not lines:
        return False
    title = f"{model}, {result.images} images"
    name = {"kl": "KL to the dense model, nats", "cosine": "cosine distance to the dense model"}
    figure = draw_frontier(
        lines, ylabel=name[result.objective], title=title, log=True, bold="calibrated"
    )
    save(figure, path)
    return True
