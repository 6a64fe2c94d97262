"""Imports go one way: each part of mergence uses only what lies below it."""

from __future__ import annotations

import ast
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src" / "mergence"

# Lowest first. A part is a module or a whole sub-package directly under src/mergence. It may import
# parts of its own layer and of those before it, never of a later one, and never in a circle. An
# import inside a function or under TYPE_CHECKING counts as well: it is the direction that matters.
# `__init__` stands for the public names, so that nothing below the command line leans on them.
LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "arguments", "files", "outputs", "_version", "assets"),
    ("plan", "plugins"),
    ("ops",),
    ("planning", "importance"),
    ("coarse",),
    ("macs", "setting"),
    ("schedule",),
    ("declaration",),
    ("method", "family"),
    ("multiscale",),
    ("methods",),
    ("state", "surgery", "report"),
    ("restoring",),
    ("program",),
    ("step",),
    ("families", "tracing"),
    ("recipe",),
    ("api",),
    ("classes", "data", "sources", "devices", "distances", "models", "regions"),
    ("saving", "profiling"),
    ("benchmark", "evaluation", "calibration", "frontier", "visualize", "train", "demo"),
    ("exporting",),
    ("__init__",),
    ("cli", "__main__"),
)

# A registry walks a package for what is registered, when first asked: the only imports upwards.
DISCOVERY = {("method", "methods"), ("family", "families")}

RANK = {part: rank for rank, layer in enumerate(LAYERS) for part in layer}

# A method is one file that can be read alone, and operators know tensors only: all they may use.
ONLY: dict[str, set[str]] = {
    "ops": {"plan", "errors"},
    "methods": {
        "plan",
        "planning",
        "ops",
        "errors",
        "method",
        "schedule",
        "importance",
        "multiscale",
    },
}
ONLY_OUTSIDE: dict[str, set[str]] = {"ops": {"torch", "triton"}, "methods": {"torch"}}


def part_of(file: Path) -> str:
    """The part a file belongs to: `ops` for ops/dense.py, `plan` for plan.py.

    What `python -m` runs is a command line, in whatever package it lies.
    """
    if file.name == "__main__.py":
        return "__main__"
    return file.relative_to(SRC).parts[0].removesuffix(".py")


@cache
def files() -> list[Path]:
    return sorted(SRC.rglob("*.py"))


@cache
def imported(file: Path) -> list[tuple[int, tuple[str, ...]]]:
    """Every import of a file as (line, absolute dotted name), relative ones resolved."""
    package = ("mergence", *file.relative_to(SRC).parts[:-1])
    found: list[tuple[int, tuple[str, ...]]] = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"), str(file))):
        if isinstance(node, ast.Import):
            found += [(node.lineno, tuple(alias.name.split("."))) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            found += [(node.lineno, (*base, alias.name)) for alias in node.names]
    return found


def ours(name: tuple[str, ...]) -> str | None:
    """The part that a dotted name belongs to, or None for another library."""
    if name[0] != "mergence":
        return None
    # `from mergence import apply` takes a public name, `from mergence import api` a part.
    return name[1] if len(name) > 1 and name[1] in parts() else "__init__"


@cache
def parts() -> set[str]:
    return {part_of(file) for file in files()} | RANK.keys()


def uses() -> list[tuple[str, str, str]]:
    """Every import of one part by another: (where, importing part, imported part)."""
    found = []
    for file in files():
        part = part_of(file)
        for line, name in imported(file):
            target = ours(name)
            if target not in (None, part) and (part, target) not in DISCOVERY:
                found.append((f"{file.relative_to(SRC.parents[1])}:{line}", part, str(target)))
    return found


def test_every_part_has_a_layer() -> None:
    unplaced = sorted({part_of(file) for file in files()} - RANK.keys())
    assert not unplaced, (
        f"{unplaced} lie in src/mergence but in no layer: put each into LAYERS in {__file__}, "
        "as low as its imports allow, or into a sub-package that has a layer"
    )


def test_no_part_imports_from_a_later_layer() -> None:
    wrong = [
        f"{where}: {part} (layer {RANK[part]}) imports {target} (layer {RANK[target]})"
        for where, part, target in uses()
        if part in RANK and target in RANK and RANK[target] > RANK[part]
    ]
    assert not wrong, "imports go one way, see LAYERS:\n" + "\n".join(wrong)


def test_no_part_imports_in_a_circle() -> None:
    graph: dict[str, set[str]] = {}
    for _, part, target in uses():
        graph.setdefault(part, set()).add(target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail("parts import each other in a circle: " + " <- ".join(error.args[1]))


@pytest.mark.parametrize("package", sorted(ONLY))
def test_narrow_packages_use_nothing_else_of_ours(package: str) -> None:
    wrong = [
        f"{where}: imports {target}"
        for where, part, target in uses()
        if part == package and target not in ONLY[package]
    ]
    assert not wrong, f"{package} may use only {sorted(ONLY[package])} of ours:\n" + "\n".join(
        wrong
    )


@pytest.mark.parametrize("package", sorted(ONLY_OUTSIDE))
def test_narrow_packages_use_torch_alone(package: str) -> None:
    allowed = ONLY_OUTSIDE[package] | sys.stdlib_module_names | {"mergence"}
    wrong = [
        f"{file.relative_to(SRC.parents[1])}:{line}: imports {name[0]}"
        for file in files()
        if part_of(file) == package
        for line, name in imported(file)
        if name[0] not in allowed
    ]
    assert not wrong, f"{package} may use only {sorted(ONLY_OUTSIDE[package])}:\n" + "\n".join(
        wrong
    )


def test_a_super_that_is_kept_has_its_arguments() -> None:
    """torch.compile does not take `dense = super()` on Python 3.12 (torch 2.11, seen on a GPU)."""
    bare = [
        f"{file.relative_to(SRC)}:{node.lineno}"
        for file in files()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None
        if ast.unparse(node.value) == "super()"
    ]
    assert not bare, "write super(Class, self) instead:\n" + "\n".join(bare)
