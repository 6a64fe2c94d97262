"""What installed packages add: methods and families, found by entry point."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import EntryPoint, entry_points
from traceback import walk_tb
from typing import Any

from mergence.errors import PluginError


def load(group: str) -> Iterator[tuple[str, Any]]:
    """What every installed plug-in has under a group of entry points.

    Args:
        group: `mergence.methods` or `mergence.families`.

    Yields:
        Where it comes from, for messages, and what the entry point names.

    Raises:
        PluginError: It cannot be imported.
    """
    for entry in entry_points(group=group):
        try:
            found = entry.load()
        except Exception as error:  # whatever the code of a plug-in raises
            reason = " ".join(str(error).split()).rstrip(".")
            raise PluginError(
                f"{_place(entry)} cannot be loaded{_line(entry, error)}: "
                f"{type(error).__name__}: {reason}. If it is yours, mend it; if not, install what "
                "it needs or another version of it, or uninstall it."
            ) from error
        yield _place(entry), found


def _line(entry: EntryPoint, error: Exception) -> str:
    """Where in the code of a plug-in an error comes from, if it got so far."""
    package = entry.module.partition(".")[0]
    lines = [
        f" ({frame.f_code.co_filename}, line {line})"
        for frame, line in walk_tb(error.__traceback__)
        if frame.f_globals.get("__name__", "").partition(".")[0] == package
    ]
    return lines[-1] if lines else ""


def _place(entry: EntryPoint) -> str:
    package = "of an unknown package" if entry.dist is None else f"'{entry.dist.name}'"
    return f"The plug-in {package} (entry point '{entry.name} = {entry.value}' of {entry.group})"
