"""What a run leaves: the trained model in its library's own layout, and its recipes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from mergence import saving
from mergence.api import remove
from mergence.recipe import Recipe

WEIGHTS = "model.safetensors"


def save_model(
    folder: Path,
    model: nn.Module,
    names: Sequence[str],
    recipes: Mapping[str, Recipe],
    processor: Any = None,
) -> None:
    """Write a trained model with its recipe, as `mergence.save` does; `mergence.load` reads it.

    Libraries without a folder layout of their own (torchvision, open_clip) get the dense weights,
    for `checkpoint`, what the method has learned beside them, and the recipe.

    Args:
        folder: Where to; an empty one.
        model: The model with its trained weights, reduced by the first recipe.
        names: What its classes are called.
        recipes: The reductions that it was trained for; those after the first are written by name.
        processor: What prepares its images, where its library keeps that beside the model.
    """
    timms: Any = model
    if hasattr(model, "pretrained_cfg"):
        new = {"label_names": list(names), "num_classes": timms.num_classes}
        timms.pretrained_cfg = dict(timms.pretrained_cfg) | new
    if hasattr(model, "pretrained_cfg") or hasattr(model, "save_pretrained"):
        saving.write(model, folder)
    else:
        saving.write_reduction(model, folder)
        save_file(remove(model).state_dict(), folder / WEIGHTS)
    for name, recipe in list(recipes.items())[1:]:
        file = folder / f"{name.replace(' ', '-')}.json"
        file.write_text(recipe.to_json(), encoding="utf-8")
    if processor is not None:
        processor.save_pretrained(folder)
