"""What the command line prints."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from mergence.errors import OptionError
from mergence.files import check_target, write_text

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from mergence.benchmark import Row
    from mergence.data import Skipped
    from mergence.evaluation import Evaluation

# Names and paths are printed as they are: what looks like markup in them is none.
console = Console(markup=False, emoji=False)
errors = Console(markup=False, emoji=False, stderr=True)


def printable(text: str) -> str:
    """The text, with what a terminal would obey or cannot show written as escapes.

    Names of files and archive members can hold anything, bytes of no encoding included.
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def error(text: str) -> None:
    """Print an error to the standard error stream."""
    errors.print(Text.assemble(("Error: ", "bold red"), printable(text)))


def interrupted() -> None:
    """Say on the standard error stream that the user stopped a command."""
    errors.print("Interrupted.")


def warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning; stands in for `warnings.showwarning`."""
    errors.print(Text.assemble(("Note: ", "bold yellow"), printable(str(message))))


def table_of(title: str, *, padding: tuple[int, int, int, int] = (0, 1, 0, 1)) -> Table:
    """An empty table in the style of all of them."""
    return Table(
        title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=padding
    )


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[float], None]]:
    """Show progress on the standard error stream; yields a function that advances it."""
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=errors, transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda step: bar.advance(task, step)


def check_json(path: Path | None, *others: Path | None) -> None:
    """Check before long work that the JSON file can be written.

    Args:
        path: The file, if one was asked for.
        others: What the command reads or writes beside it.

    Raises:
        OptionError: It cannot, or it would take the place of another.
    """
    if path is None:
        return
    check_target(path, f"--json {path}")
    if path.resolve() in [other.resolve() for other in others if other is not None]:
        raise OptionError(f"--json {path}: the command reads or writes it already. Name another.")


def write_json(path: Path | None, data: Mapping[str, Any]) -> None:
    """Write a result as JSON, if a path was given.

    Raises:
        OptionError: It cannot be written.
    """
    if path is not None:
        write_text(path, json.dumps(data, indent=2) + "\n")
        console.print(f"Wrote {path}", highlight=False)


def evaluation_table(evaluation: Evaluation) -> None:
    """Print an evaluation, and what had to be skipped."""
    title = f"{evaluation.model} on {evaluation.images} images of {evaluation.data}"
    table = table_of(title)
    table.add_column("method", overflow="fold")  # so that no number is cut
    dense = evaluation.results[0]
    scores = dense.cosine is None
    compared = ("top-1", "Δ", "top-5", "agree", "KL") if scores else ("1 − cos",)
    for heading in ("GMACs", "MACs", *compared, "img/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in evaluation.results:
        drop = None if row.top1 is None or dense.top1 is None else row.top1 - dense.top1
        scored = (
            _number(row.top1),
            "" if row is dense else _number(drop, "+.2f"),
            _number(row.top5),
            _number(row.agreement),
            _number(row.kl, ".4f"),
        )
        table.add_row(
            row.name,
            f"{row.gmacs:.2f}",
            f"{row.macs_ratio:.0%}",
            *(scored if scores else (_number(row.cosine, ".4f"),)),
            f"{row.images_per_s:.1f}",
        )
    console.print(table)
    said = (
        "top-1, top-5 and agreement with the dense model in %, Δ in points, KL in nats"
        if scores
        else "1 − cos: mean distance to the dense model's features"
    )
    console.print(f"{said}; MACs at this size of images, img/s is forward time.", style="dim")
    skipped(evaluation.skipped)


def timed(row: Row) -> tuple[str, ...]:
    """The cells of a row of a benchmark under "ms", "speed-up", "MACs" and "of ideal"."""
    spread = (row.ms_high - row.ms_low) / 2
    return (
        f"{row.ms:.1f} ±{spread:.1f}",
        f"{row.speedup:.2f}",
        f"{row.macs_ratio:.0%}",
        f"{row.of_ideal:.2f}",
    )


def skipped(images: Sequence[Skipped]) -> None:
    """Print which images could not be read, if any."""
    skipped_names({item.name: item.reason for item in images})


def skipped_names(images: Mapping[str, str]) -> None:
    """Print which images could not be read, if any, with the reason of each."""
    if images:
        console.print(f"Skipped {len(images)} unreadable images:", style="yellow")
    for name, reason in list(images.items())[:10]:
        console.print(printable(f"  {name}: {reason}"), highlight=False)
    if len(images) > 10:
        console.print(f"  and {len(images) - 10} more; --json lists all")


def _number(value: float | None, form: str = ".2f") -> str:
    return "–" if value is None else format(value, form)
