"""Options that several commands share, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergence.errors import OptionError

if TYPE_CHECKING:
    import torch

    from mergence.method import Method
    from mergence.recipe import Recipe

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="timm:NAME, timm-random:NAME, local-dir:PATH (timm's hub layout), hf:NAME_OR_PATH, "
        "torchvision:NAME, open_clip:NAME/WEIGHTS or demo.",
    ),
]
Methods = Annotated[
    list[str] | None, typer.Option("--method", help="A method's name. May be given several times.")
]
Recipes = Annotated[
    list[Path] | None, typer.Option("--recipe", help="A recipe file. May be given several times.")
]
Macs = Annotated[
    float | None, typer.Option(help="Share of the dense MACs to keep, for example 0.67.")
]
KeepRate = Annotated[
    float | None, typer.Option(help="Share of the tokens to keep at blocks 4, 7 and 10 of 12.")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="An option of the methods, e.g. alpha=0.5."),
]
Checkpoint = Annotated[Path | None, typer.Option(help="Load these weights into the model.")]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, mps ...; auto takes the best.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
BatchSize = Annotated[int, typer.Option(min=1, help="Images in a batch.")]
Limit = Annotated[
    int | None, typer.Option(min=1, help="Use so many images, spread evenly over the classes.")
]
Seed = Annotated[int, typer.Option(help="Seed of what is drawn at random.")]
Workers = Annotated[int, typer.Option(min=0, help="Processes that read images.")]
Json = Annotated[Path | None, typer.Option("--json", help="Write the result to this file.")]


def device_of(name: str) -> str:
    """Turn a `--device` into a device that this machine has.

    Raises:
        OptionError: It has no such device.
    """
    import torch

    best = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return "cpu" if best is None else best.type
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as problem:
        found = "cpu" if best is None else f"cpu and {best.type}"
        raise OptionError(
            f"--device {name} cannot be used here: {str(problem).splitlines()[0]} "
            f"This machine has {found}."
        ) from problem
    return name


def dtype_of(name: str) -> torch.dtype:
    """Turn a `--dtype` into a type.

    Raises:
        OptionError: There is no such type here.
    """
    import torch

    types = {
        "float32": torch.float32,
        "fp32": torch.float32,
        "bfloat16": torch.bfloat16,
        "bf16": torch.bfloat16,
        "float16": torch.float16,
        "fp16": torch.float16,
    }
    if name not in types:
        raise OptionError(f"--dtype {name} is unknown; choose float32, bfloat16 or float16.")
    return types[name]


def method_of(name: str, settings: Sequence[str] | None) -> Method:
    """Turn a `--method` and its `--set` into a method.

    Raises:
        UnknownNameError: There is no such method.
        OptionError: An option is unknown or out of range.
    """
    from mergence.method import build

    return build(name, settings_of(settings))


def recipes_of(
    methods: Sequence[str] | None,
    files: Sequence[Path] | None,
    macs: float | None,
    keep_rate: float | None,
    settings: Sequence[str] | None,
) -> dict[str, Recipe]:
    """Turn the reduction options into recipes by name; the default method where none is named.

    Raises:
        OptionError: The options contradict each other.
    """
    from mergence.recipe import make

    options = settings_of(settings)
    recipes: dict[str, Recipe] = {}
    if not files or methods:
        for method in methods or ["mergence"]:
            recipes[method] = make(method, macs=macs, keep_rate=keep_rate, **options)
    elif macs is not None or keep_rate is not None or options:
        raise OptionError(
            "A recipe already says how much to reduce and how. Leave out --macs, --keep-rate and "
            "--set, or name a --method that they are meant for."
        )
    for file in files or ():
        if file.stem in recipes:
            raise OptionError(
                f"Two rows would be called '{file.stem}'. Rename the recipe file {file}."
            )
        recipes[file.stem] = make(file)
    return recipes


def settings_of(settings: Sequence[str] | None) -> dict[str, Any]:
    """Turn each `--set KEY=VALUE` into an option; a value is read as JSON where it is some.

    Raises:
        OptionError: One is of another form.
    """
    return dict(map(_setting, settings or ()))


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise OptionError(f"--set {text} is not of the form KEY=VALUE, for example alpha=0.5.")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value
