"""Options that several commands share, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mergence.errors import OptionError

if TYPE_CHECKING:
    import torch

    from mergence.method import Method
    from mergence.models import LoadedModel
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
# Lists, too, so that one that is given twice is noticed: see `recipe_of` and `method_of`.
OneMethod = Annotated[
    list[str] | None, typer.Option("--method", help="A method's name; mergence if unset.")
]
OneRecipe = Annotated[list[Path] | None, typer.Option("--recipe", help="A recipe file instead.")]
Macs = Annotated[
    list[float] | None,
    typer.Option("--macs", help="Share of the dense MACs to keep, for example 0.67."),
]
ManyMacs = Annotated[
    list[float] | None,
    typer.Option(
        "--macs",
        help="Share of the dense MACs to keep, for example 0.67. May be given several times.",
    ),
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

    from mergence.devices import best_device

    best = best_device()
    if name == "auto":
        return best
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as problem:
        found = best if best == "cpu" else f"cpu and {best}"
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


def saved_in(model: str, checkpoint: Path | None = None) -> Path | None:
    """The folder that a MODEL names, where `mergence.save` or `mergence train` wrote it.

    With a `--checkpoint` the weights are others, and the folder is an architecture only.
    """
    from mergence.saving import RECIPE

    source, _, name = model.partition(":")
    folder = Path(name).expanduser()
    as_saved = checkpoint is None and source in ("local-dir", "hf")
    return folder if as_saved and (folder / RECIPE).is_file() else None


def load(model: str, checkpoint: Path | None = None) -> LoadedModel:
    """Load a MODEL, and reduce it as it was saved where a recipe lies beside it.

    What its method has learned is then there, for every recipe that has a place for it.
    """
    from mergence.models import load_model
    from mergence.saving import reduce_as_saved

    loaded = load_model(model, checkpoint=checkpoint)
    if (folder := saved_in(model, checkpoint)) is not None:
        reduce_as_saved(loaded.model, folder)
    return loaded


def method_of(names: Sequence[str] | None, settings: Sequence[str] | None) -> Method:
    """Turn the `--method` of a command that takes one, and its `--set`, into a method.

    Raises:
        UnknownNameError: There is no such method.
        OptionError: Several are named, or an option is unknown or out of range.
    """
    from mergence.method import build

    if names and len(names) > 1:
        raise OptionError(
            f"--method is given {len(names)} times ({', '.join(names)}), and this command takes "
            "one. Run it once for each, with another --out."
        )
    return build(names[0] if names else "mergence", settings_of(settings))


def recipes_of(
    methods: Sequence[str] | None,
    files: Sequence[Path] | None,
    macs: Sequence[float] | None,
    keep_rate: float | None,
    settings: Sequence[str] | None,
    saved: Path | None,
) -> dict[str, Recipe]:
    """Turn the reduction options into recipes by name.

    Where no method is named, it is the default one; where nothing is asked for at all, the recipe
    that was saved with the model. Several shares of the MACs make a recipe each for every method.

    Raises:
        OptionError: The options contradict each other.
    """
    from mergence.recipe import Recipe, make
    from mergence.saving import RECIPE

    options = settings_of(settings)
    if saved and not (methods or files or options or macs) and keep_rate is None:
        own = Recipe.load(saved / RECIPE)
        return {own.method.name: own}
    recipes: dict[str, Recipe] = {}
    if not files or methods:
        if not macs and keep_rate is None and not {"r", "schedule"} & options.keys():
            raise OptionError(
                "Nothing says how much to reduce. Give --macs 0.67 for two thirds of the work, or "
                "--keep-rate, or --recipe with a file."
            )
        shares: Sequence[float | None] = macs or [None]
        for method, share in product(methods or ["mergence"], shares):
            name = f"{method}@{share:g}" if len(shares) > 1 else method
            recipes[name] = make(method, macs=share, keep_rate=keep_rate, **options)
    elif macs or keep_rate is not None or options:
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


def recipe_of(
    methods: Sequence[str] | None,
    files: Sequence[Path] | None,
    macs: Sequence[float] | None,
    keep_rate: float | None,
    settings: Sequence[str] | None,
    saved: Path | None,
) -> Recipe:
    """Turn the reduction options of a command that takes one recipe into it; see `recipes_of`.

    Raises:
        OptionError: The options contradict each other, or are for several recipes.
    """
    if methods and files:
        raise OptionError("--method and --recipe each say how to reduce. Give only one of them.")
    recipes = recipes_of(methods, files, macs, keep_rate, settings, saved)
    if len(recipes) > 1:
        raise OptionError(
            f"The options say {len(recipes)} ways to reduce ({', '.join(recipes)}), and this "
            "command takes one. Give one --method and --macs, or one --recipe."
        )
    return next(iter(recipes.values()))


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
