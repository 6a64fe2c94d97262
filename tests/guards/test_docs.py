"""The documentation names what exists: public names, methods, commands and their options."""

from __future__ import annotations

import dataclasses
import importlib
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import mergence
from mergence import method

ROOT = Path(__file__).resolve().parents[2]
SRC = ROOT / "src" / "mergence"
DOCS = ROOT / "docs"
SECTIONS = (
    "How it works",
    "When to use it",
    "When not",
    "Measured",
    "Departures from the paper",
)
SEPARATORS = {"|", "||", "&&", ";", "&", "(", ")", "<", ">", ">>"}
FENCE = re.compile(
    r"^(?P<fence>```+|~~~+)\s*(?:sh|bash|shell|console)\b[^\n]*\n(?P<code>.*?)^(?P=fence)\s*$",
    re.MULTILINE | re.DOTALL,
)


def pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "examples" / "README.md", *sorted(DOCS.rglob("*.md"))]


def test_every_public_name_is_documented() -> None:
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages())
    missing = [
        name
        for name in mergence.__all__
        if not name.startswith("__") and not re.search(rf"\b{re.escape(name)}\b", text)
    ]
    assert not missing, f"in mergence.__all__, but neither in README.md nor in docs/: {missing}"


def test_every_dotted_name_is_found_by_a_fresh_process() -> None:
    # Whatever was imported before hides one that is not.
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages())
    names = sorted(set(re.findall(r"\bmergence(?:\.[a-z_]+)+\.[A-Za-z_]+\b(?!\.)", text)))
    assert "mergence.recipe.make" in names
    code = f"import mergence\nfor name in {names}:\n    eval(name)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_every_public_name_exists() -> None:
    missing = [name for name in mergence.__all__ if not hasattr(mergence, name)]
    assert not missing, f"in mergence.__all__, but not there: {missing}"


def test_every_method_has_its_page() -> None:
    problems = []
    for name in method.names():
        page = DOCS / "methods" / f"{name}.md"
        text = page.read_text(encoding="utf-8") if page.is_file() else ""
        lacks = [s for s in SECTIONS if not re.search(rf"^##+ {s}\s*$", text, re.MULTILINE)]
        if lacks:
            problems.append(f"docs/methods/{name}.md lacks the sections {lacks}")
    assert not problems, "every method has its page:\n" + "\n".join(problems)


def test_every_option_is_on_its_methods_page_with_its_default() -> None:
    problems = []
    for name, cls in method.registry().items():
        text = (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8")
        line = "".join(line for line in text.splitlines() if line.startswith("Options: "))
        for field in dataclasses.fields(cls):
            if (option := f"`{field.name}={field.default!r}`") not in line:
                problems.append(f"docs/methods/{name}.md has no {option} in a line `Options: ...`")
    assert not problems, "every option is on its method's page:\n" + "\n".join(problems)


def test_counts_and_macs_on_the_pages_are_those_of_describe() -> None:
    import timm
    import torch

    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")

    def described(name: str, **how: Any) -> Any:
        return mergence.describe(mergence.apply(model, name, **how))

    def ends(name: str, **how: Any) -> str:
        found = described(name, **how)
        return f"{found.counts[-1] + 1} tokens and {found.reduced.total / 1e9:.2f} GMACs"

    tome, evit, coarse = (
        (DOCS / page).read_text(encoding="utf-8")
        for page in ("methods/tome.md", "methods/evit.md", "coarse.md")
    )
    assert f"With `r=13` DeiT-S ends with {ends('tome', r=13)}, " in tome
    assert f"with `r=16` with {ends('tome', r=16)}." in tome
    assert f"At `keep_rate=0.7` DeiT-S ends with {ends('evit', keep_rate=0.7)}." in evit
    small = described("mergence", macs=0.4)
    regions = (small.patches - small.start) // 3  # of four tokens three are gone
    assert f"{regions} of the {small.patches // 4} regions" in coarse


def test_the_layers_in_contributing_exist() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (layers,) = re.findall(r"\*\*Imports go one way\*\*: `([^`]+)`", text)
    missing = [
        part
        for part in re.findall(r"\w+", layers)
        if not (SRC / f"{part}.py").is_file() and not (SRC / part).is_dir()
    ]
    assert not missing, f"CONTRIBUTING.md names parts that do not exist: {missing}"


def commands(text: str) -> Iterator[list[str]]:
    """The `mergence ...` commands of a page's shell blocks, as words after `mergence`."""
    for block in FENCE.finditer(text):
        for line in block["code"].replace("\\\n", " ").splitlines():
            yield from of_ours(split(line.removeprefix("$ ")))


def split(line: str) -> list[str]:
    """A shell line's words, its comment left out, pipes and the like as words of their own."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    try:
        return list(lexer)
    except ValueError:  # a quotation that goes on in the next line
        return line.split()


def of_ours(words: list[str]) -> Iterator[list[str]]:
    """The parts of a command line that run mergence, split at pipes and the like."""
    found: list[str] | None = None
    previous = ""
    for word in [*words, ";"]:
        if word in SEPARATORS:
            if found is not None:
                yield found
            found = None
            previous = ""
        elif found is not None:
            found.append(word)
        elif word.rpartition("/")[2] == "mergence" and (
            previous in ("", "-m") or "=" in previous  # first, run as a module, or after A=b
        ):
            found = []
        else:
            previous = word


def problem(words: list[str], command: Any) -> str | None:
    """What is wrong with a command's words: an unknown subcommand or option, or nothing."""
    path = ["mergence"]
    while (subcommands := getattr(command, "commands", None)) is not None:
        if not words or words[0].startswith("-"):
            break
        if words[0] not in subcommands:
            return f"`{' '.join(path)}` has no command {words[0]!r}, only {sorted(subcommands)}"
        command = subcommands[words[0]]
        path.append(words[0])
        words = words[1:]
    known = {"--help"}
    for parameter in command.params:
        known.update(parameter.opts, parameter.secondary_opts)
    options = [word.partition("=")[0] for word in words if re.match(r"--?[A-Za-z]", word)]
    unknown = [option for option in options if option not in known]
    if unknown:
        return f"`{' '.join(path)}` has no option {unknown}, only {sorted(known)}"
    return None


@pytest.mark.parametrize("page", pages(), ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_shown_exists(page: Path) -> None:
    if not (SRC / "cli").exists():
        pytest.skip("there is no command line yet")
    import typer.main

    root = typer.main.get_command(importlib.import_module("mergence.cli").app)
    found = [
        f"mergence {' '.join(words)}\n    {wrong}"
        for words in commands(page.read_text(encoding="utf-8"))
        if (wrong := problem(words, root)) is not None
    ]
    assert not found, f"{page.relative_to(ROOT)} shows commands that do not exist:\n" + "\n".join(
        found
    )


def test_commands_are_read_from_shell_blocks() -> None:
    text = """
Prose with mergence eval --not-read.

```sh
pip install mergence            # nothing of ours
mergence demo                   # a picture --not-read
$ HF_HUB_OFFLINE=1 .venv/bin/mergence eval timm:x --data "a b" \\
    --macs=0.5 | tee log.txt && python -m mergence list
```

```python
mergence.apply(model)
```
"""
    assert list(commands(text)) == [
        ["demo"],
        ["eval", "timm:x", "--data", "a b", "--macs=0.5"],
        ["list"],
    ]


def test_unknown_commands_and_options_are_found() -> None:
    import typer
    import typer.main

    app = typer.Typer()

    @app.command()
    def show(model: str, data: str = typer.Option("", "--data", "-d"), fast: bool = False) -> None:
        """Do nothing."""

    @app.command("list")
    def list_() -> None:
        """Do nothing."""

    root = typer.main.get_command(app)
    good = [["show", "timm:x", "-d", "-1", "--data=x", "--no-fast"], ["list"], ["--help"], []]
    assert [problem(words, root) for words in good] == [None] * len(good)
    bad = [["list", "--data", "x"], ["show", "m", "--dat", "x"], ["shows"]]
    assert all(problem(words, root) for words in bad)
