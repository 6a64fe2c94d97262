"""mergence list."""

from __future__ import annotations

from enum import StrEnum
from inspect import getdoc
from typing import Annotated, Any

import typer

from mergence.cli import options as o
from mergence.cli.output import check_json, console, table_of, write_json


class Kind(StrEnum):
    """What there is to list."""

    methods = "methods"
    families = "families"
    recipes = "recipes"


def list_known(
    kind: Annotated[Kind | None, typer.Argument(help="What to list; all of it by default.")] = None,
    json: o.Json = None,
) -> None:
    """List the methods, the model families and the recipes that come with the package."""
    check_json(json)
    kinds = list(Kind) if kind is None else [kind]
    found = {kind.value: _LISTS[kind]() for kind in kinds}
    write_json(json, found)
    for name, rows in found.items():
        if not rows:
            console.print(f"{name}: none come with this version")
            continue
        table = table_of(name)
        for column in rows[0]:
            table.add_column(column, overflow="fold")  # so that no name is cut
        for row in rows:
            table.add_row(*map(str, row.values()))
        console.print(table)


def _methods() -> list[dict[str, Any]]:
    from mergence.method import registry

    return [
        {
            "name": name,
            "what it does": (getdoc(cls) or "").partition("\n")[0],
            "options": ", ".join(cls.options()),
            "published schedule": cls.shape.kind,
        }
        for name, cls in registry().items()
    ]


def _families() -> list[dict[str, Any]]:
    from mergence.family import registry

    return [
        {"name": name, "models": family.supported, "kinds tested": ", ".join(family.tiny())}
        for name, family in registry().items()
    ]


def _recipes() -> list[dict[str, Any]]:
    return []


_LISTS = {Kind.methods: _methods, Kind.families: _families, Kind.recipes: _recipes}
