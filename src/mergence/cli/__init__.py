"""The command line: parse, call the function, print a table or JSON.

Nothing here imports torch before a command runs, so that `--help` answers at once.
"""

from __future__ import annotations

import io
import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from mergence._version import __version__
from mergence.cli import bench, calibrate, demo, evaluate, export, listing, train, visualize
from mergence.cli.output import error, interrupted, warning
from mergence.errors import MergenceError


class _Commands(TyperGroup):
    """The commands, of which an interrupted one says so: typer ends it without a word."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            interrupted()
            raise typer.Exit(130) from None


app = typer.Typer(
    name="mergence",
    cls=_Commands,
    help="Make a trained Vision Transformer do less work per image and keep its answer.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("demo")(demo.demo)
app.command("list")(listing.list_known)
app.command("eval")(evaluate.evaluate)
app.command("bench")(bench.bench)
app.command("calibrate")(calibrate.calibrate)
app.command("export")(export.export)
app.command("train")(train.train)
app.command("visualize")(visualize.visualize)


def _tell_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_tell_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; errors that mergence raises on purpose become one paragraph."""
    warnings.showwarning = warning
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that it lacks ends no command
        sys.stdout.reconfigure(errors="replace")
    try:
        app()
    except MergenceError as problem:
        error(str(problem))
        sys.exit(1)
