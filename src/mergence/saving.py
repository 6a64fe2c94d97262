"""Recipes that travel with models: a folder in the library's own layout, and the recipe beside."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import partial
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergence import surgery
from mergence.api import apply, recipe_of
from mergence.errors import (
    CheckpointError,
    MissingExtraError,
    OptionError,
    RecipeError,
    UnsupportedModelError,
    few,
)
from mergence.family import registry
from mergence.files import read_json, staged
from mergence.models import build_model
from mergence.models._loaded import source_of
from mergence.models._weights import not_floating, require_weights
from mergence.recipe import Recipe

RECIPE = "mergence.json"
LEARNED_WEIGHTS = "mergence.safetensors"
# What an earlier save may have left behind, and a loader would prefer to the new weights.
_WEIGHTS = re.compile(
    r"(model|pytorch_model)(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?"
    rf"|{re.escape(LEARNED_WEIGHTS)}"
)


def save(model: nn.Module, folder: str | Path) -> None:
    """Save a reduced model in its library's own layout, with its recipe beside.

    The library's own function writes the dense model: timm's hub layout, or what `save_pretrained`
    of a transformers model writes. Without mergence the folder is that model and nothing else. The
    recipe goes into `mergence.json`, what the method has learned into `mergence.safetensors`.

    All files are written elsewhere first and then moved, the recipe last; other files in the folder
    are left alone, but for weights of an earlier save.

    Args:
        model: A model that `apply` reduced.
        folder: The folder; made where it is missing.

    Raises:
        MergenceError: The model is not reduced.
        UnsupportedModelError: Its library has no layout of a folder, or cannot rebuild the model
            from it.
        OptionError: The folder cannot be made there, or has no room for the files.
    """
    recipe_of(model)  # a dense one is refused
    folder = Path(folder).expanduser()
    _check_library(model)
    if folder.exists() and not folder.is_dir():
        raise OptionError(
            f"'{folder}' is a file. Name a folder, which is made where it is missing."
        )
    if not folder.absolute().parent.is_dir():
        raise OptionError(f"There is no folder '{folder.absolute().parent}'. Make it first.")
    with staged(folder, last=RECIPE) as temporary:
        write(model, temporary)
        written = {file.name for file in temporary.iterdir()}
    for file in folder.iterdir():
        if _WEIGHTS.fullmatch(file.name) and file.name not in written and file.is_file():
            file.unlink()


def write(model: nn.Module, folder: Path) -> None:
    """Write what `save` does, file by file, into an empty folder."""
    write_reduction(model, folder)
    back = surgery.bookmark(model)
    surgery.restore(model)
    try:
        _save_dense(model, folder)
    finally:
        back()


def write_reduction(model: nn.Module, folder: Path) -> None:
    """Write the recipe of a reduced model, and what its method has learned, into a folder."""
    (folder / RECIPE).write_text(recipe_of(model).to_json(), encoding="utf-8")
    if learned := learned_by(model):
        save_file(learned, folder / LEARNED_WEIGHTS)


def load(folder: str | Path) -> nn.Module:
    """Load a model that `save` wrote, reduced by its recipe, in evaluation mode.

    Raises:
        RecipeError: The folder has no recipe, or one that cannot be read.
        CheckpointError: The weights are missing, damaged or do not fit.
        MissingExtraError: The model's library is not installed.
    """
    folder = Path(folder).expanduser()
    if not (folder / RECIPE).is_file():
        raise RecipeError(
            f"'{folder}' has no {RECIPE}: mergence.save did not write it. Load the model with its "
            "own library and call mergence.apply."
        )
    return reduce_as_saved(_load_dense(folder), folder)


def reduce_as_saved(model: nn.Module, folder: Path) -> nn.Module:
    """Apply the recipe of a folder to the model that was loaded from it, what was learned included.

    Raises:
        RecipeError: The recipe cannot be read.
        CheckpointError: What was learned is missing, damaged or does not fit.
        MergenceError: The recipe does not fit the model.
    """
    apply(model, Recipe.load(folder / RECIPE))
    file = folder / LEARNED_WEIGHTS
    if (learned_by(model) or file.exists()) and (misfit := load_learned(model, file)):
        raise CheckpointError(
            f"'{file}' does not fit the recipe beside it: {misfit}. Both files must come from the "
            "same mergence.save."
        )
    return model


def learned_by(model: nn.Module) -> dict[str, Tensor]:
    """What a method has learned in a reduced model, by its names in the state of the model."""
    part = f".{surgery.LEARNED}."
    return {name: value for name, value in model.state_dict().items() if part in f".{name}"}


def load_learned(model: nn.Module, file: Path) -> str | None:
    """Give a reduced model what its method has learned, or say what does not fit.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    try:
        found = load_file(file)
    except Exception as error:  # damaged bytes fail in as many ways as the reader has
        raise CheckpointError(
            f"What the method has learned cannot be read from '{file}' ({type(error).__name__}: "
            f"{error}). Copy the whole folder again."
        ) from error
    own = learned_by(model)
    has, learns = _shapes(found), _shapes(own)
    if has != learns:
        return f"it has {has}, and the method learns {learns}"
    if other := not_floating(found, own):
        return f"it has values of another type ({few(other)})"
    model.load_state_dict(found, strict=False)
    return None


def _shapes(state: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in state.items()}


def _check_library(model: nn.Module) -> None:
    if not hasattr(model, "save_pretrained") and not hasattr(model, "pretrained_cfg"):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no folder layout of its own (timm's and transformers' "
            "models have). Save model.state_dict() your way, and the recipe beside it: "
            "mergence.recipe_of(model).save('recipe.json')."
        )


def _save_dense(model: Any, folder: Path) -> None:
    transformers = hasattr(model, "save_pretrained")
    library, what = "transformers" if transformers else "timm", f"this {type(model).__name__}"
    try:
        again = (_as_transformers if transformers else _as_timm)(model, folder)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UnsupportedModelError(
            f"{library} cannot write a folder that builds {what} again ({error}). Make the model "
            "with its library's own functions, from plain arguments, and quantize it after "
            "loading. Where it needs another argument, such as a class, save model.state_dict() "
            "your way and the recipe beside it: mergence.recipe_of(model).save('recipe.json'). "
            "Then make the model in code again, apply the recipe and load the weights."
        ) from error
    if other := again and _differing(_shapes(model.state_dict()), again):
        raise UnsupportedModelError(
            f"{library} builds another model from the config.json that it writes for {what} "
            f"({other}): it was changed after it was made. Take off what was put on (peft: "
            "merge_and_unload; torch's pruning and parametrizations: their remove), or save "
            "model.state_dict() your way. (timm before 1.0.31 does not note a model's arguments.)"
        )


def _as_timm(model: Any, folder: Path) -> dict[str, list[int]]:
    import timm

    timm.models.save_for_hf(model, str(folder), safe_serialization=True)
    with torch.device("meta"):
        return _shapes(timm.create_model(f"local-dir:{folder}").state_dict())


def _as_transformers(model: Any, folder: Path) -> dict[str, list[int]] | None:
    """The weights of the model that will be built; None where only the library can tell."""
    model.save_pretrained(folder)
    if getattr(model, "hf_quantizer", None) is not None:
        return None
    cls = surgery.original_class(model)
    try:
        with torch.device("meta"):
            return _shapes(cls(model.config, **_beside(cls, model.state_dict())).state_dict())
    except Exception:  # a class of somebody's own, which is built in its own way
        return None


def _beside(cls: Any, weights: Iterable[str]) -> dict[str, bool]:
    """What a tower of transformers was built with beside its config, by the weights it has."""
    names = list(weights)
    found = {
        "add_pooling_layer": any(name.startswith("pooler.") for name in names),
        "use_mask_token": any(name.endswith(".mask_token") for name in names),
    }
    return {name: value for name, value in found.items() if name in signature(cls).parameters}


def _differing(has: Mapping[str, list[int]], other: Mapping[str, list[int]]) -> str:
    """The first weight that is not of one shape in both, "" where all are."""
    for name in {**has, **other}:
        one, two = has.get(name, "missing"), other.get(name, "missing")
        if one != two:
            return f"{name} is {one} in it and {two} in the other"
    return ""


def _load_dense(folder: Path) -> nn.Module:
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"'{folder / 'config.json'}' cannot be read ({error}). It says which model this is; "
            "copy the whole folder again."
        ) from error
    if source_of(folder) == "local-dir":
        return build_model(f"local-dir:{folder}").model
    config = config if isinstance(config, dict) else {}
    if find_spec("transformers") is None:
        raise MissingExtraError("transformers", "transformers", f"Loading '{folder}'")
    import transformers

    found = config.get("architectures")
    name: Any = found[0] if isinstance(found, list) and found else found
    # Nothing but the models that `save` can have written is looked up by a name from a file.
    known = {model for family in registry().values() for model in family.models}
    if not any(model.startswith("transformers.") and model.endswith(f".{name}") for model in known):
        raise CheckpointError(
            f"'{folder / 'config.json'}' names no model of timm ('architecture') or transformers "
            f"('architectures'): found {name!r}. Correct it, or save the model again."
        )
    try:
        # Weights that are pickled are never read.
        cls = getattr(transformers, name)
        read = partial(cls.from_pretrained, folder, local_files_only=True, use_safetensors=True)
        model, info = read(output_loading_info=True)
        weights = model.state_dict().keys() - info["missing_keys"] | set(info["unexpected_keys"])
        told = _beside(cls, weights)
        if told != _beside(cls, model.state_dict()):
            model, info = read(output_loading_info=True, **told)
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(f"transformers cannot load '{folder}': {error}") from error
    require_weights(info, str(folder), name)
    dense: nn.Module = model.eval()
    return dense
