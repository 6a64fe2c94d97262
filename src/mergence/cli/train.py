"""mergence train: its flags are the fields of `mergence.train.Config`."""

from __future__ import annotations

import dataclasses
import inspect
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from mergence.cli import options as o
from mergence.cli.output import check_json, console, errors, skipped_names, table_of, write_json
from mergence.train.config import Config, read_yaml

if TYPE_CHECKING:
    from mergence.train import Status, Summary

SECONDS = 30.0
"""Time between two lines in a log file."""


def train(**flags: Any) -> None:
    """Fine-tune a model, or train it from scratch, with reduction on."""
    json, resume, file = (flags.pop(name) for name in ("json", "resume", "config"))
    check_json(json)
    given = {key: value for key, value in flags.items() if value not in (None, [])}
    if "set" in given:
        given["set"] = o.settings_of(given["set"])
    config = Config.from_dict(_values(file, given, resume) | given, "The command")
    from mergence.train import fit

    with _progress() as report:
        summary = fit(config, resume=resume, report=report)
    if os.environ.get("RANK", "0") == "0":
        try:  # first, because printing may fail as well
            write_json(json, dataclasses.asdict(summary) | {"model": str(summary.model)})
        finally:
            _table(summary)


def _values(file: Path | None, given: dict[str, Any], resume: bool) -> dict[str, Any]:
    """What a YAML file says: the one given, or that of the run to go on with."""
    if file is None and resume and "out" in given:
        written = Path(given["out"]).expanduser() / "config.yaml"
        file = written if written.exists() else None
    if file is None:
        return {}
    values = read_yaml(file)
    unknown = values.keys() - set(Config.names())
    if unknown:  # named here with its file; otherwise the command would be blamed
        Config.from_dict({**values, "model": "", "data": [], "out": ""}, f"'{file}'")
    return values


@contextmanager
def _progress() -> Iterator[Callable[[Status], None]]:
    """The epoch, loss, speed and time left: a bar in a terminal, now and then a line elsewhere."""
    if not errors.is_terminal:
        yield _lines()
        return
    columns = (
        TextColumn("epoch {task.fields[epoch]}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("loss {task.fields[loss]:.4f}  {task.fields[speed]:.0f} images/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task("training", total=None, visible=False, epoch="", loss=0.0, speed=0.0)

        def report(status: Status) -> None:
            bar.update(
                task,
                completed=status.update,
                total=status.updates,
                visible=True,
                epoch=f"{status.epoch}/{status.epochs}",
                loss=status.loss,
                speed=status.images_per_s,
            )

        yield report


def _lines() -> Callable[[Status], None]:
    due = 0.0

    def report(status: Status) -> None:
        nonlocal due
        now = time.monotonic()
        if now < due and status.update < status.updates:
            return
        due = now + SECONDS
        errors.print(
            f"epoch {status.epoch}/{status.epochs}, step {status.update}/{status.updates}: "
            f"loss {status.loss:.4f}, {status.images_per_s:.1f} images/s, "
            f"{timedelta(seconds=round(status.seconds_left))} left",
            highlight=False,
            soft_wrap=True,
        )

    return report


def _table(summary: Summary) -> None:
    table = table_of("What the run did")
    # How near the answers are to the teacher's matters where there was a fixed one.
    ends = (" top1", " kl") if "dense kl" in summary.history[-1] else (" top1",)
    digits = {"epoch": 0, "loss": 4} | {
        key: 2 if key.endswith(" top1") else 4 for key in summary.history[-1] if key.endswith(ends)
    }
    for key in digits:
        # A path's divergence stands beside its accuracy, and need not name it again.
        heading = "KL" if key.endswith(" kl") else key.replace(" top1", " top-1")
        table.add_column(heading, justify="right")
    for row in summary.history:
        values = ((row.get(key), n) for key, n in digits.items())
        table.add_row(*("–" if value is None else f"{value:.{n}f}" for value, n in values))
    console.print(table)
    console.print(
        f"{summary.seconds:.0f} s, {summary.images_per_s:.1f} images/s. The trained model is in "
        f"{summary.model}, with its recipe; mergence.load reads both.",
        style="dim",
        markup=False,
    )
    skipped_names(summary.skipped)


def _flag(field: dataclasses.Field[Any], kind: Any) -> inspect.Parameter:
    """A field of the configuration as a parameter that typer understands; None is "not given"."""
    option = next((k for k in _options(kind) if k is not NoneType), kind)
    base = get_origin(option) or option
    plain: Any = {dict: list[str], Literal: str}.get(base, option)
    if base is tuple:
        plain = list[get_args(option)[0]]  # type: ignore[misc]
    default = field.default if field.default not in (dataclasses.MISSING, None, ()) else None
    help_, shown = field.metadata["help"], str(default) if default else False
    extra: Any = typer.Option(help=help_, show_default=shown)
    if field.name == "model":
        extra = typer.Argument(metavar="MODEL", help=help_, show_default=False)
    elif base is dict:
        extra = typer.Option(metavar="KEY=VALUE", help=help_, show_default=False)
    annotation = Annotated[plain | None, extra]
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _options(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) is UnionType else (kind,)


def _signature() -> inspect.Signature:
    kinds = get_type_hints(Config)
    parameters = [_flag(field, kinds[field.name]) for field in dataclasses.fields(Config)]
    beside = {
        "config": (
            Annotated[Path | None, typer.Option(help="A YAML file of these options; flags win.")],
            None,
        ),
        "resume": (
            Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint.")],
            False,
        ),
        "json": (o.Json, None),
    }
    parameters += [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)
        for name, (kind, default) in beside.items()
    ]
    return inspect.Signature(parameters)


_SIGNATURE = _signature()
train.__signature__ = _SIGNATURE  # type: ignore[attr-defined]
train.__annotations__ = {name: one.annotation for name, one in _SIGNATURE.parameters.items()}
