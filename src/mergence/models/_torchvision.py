"""Models of torchvision, by name."""

from __future__ import annotations

import difflib
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from mergence.errors import CheckpointError, UnknownNameError
from mergence.models._loaded import Built, LoadedModel
from mergence.models._weights import first_line


def named(name: str, checkpoint: Path | None) -> Built:
    """`torchvision:NAME` or `torchvision:NAME.WEIGHTS`, for example vit_b_16.IMAGENET1K_V1.

    Raises:
        UnknownNameError: torchvision has no such model or no such weights.
        CheckpointError: The weights cannot be had.
    """
    from torchvision import models

    architecture, _, tag = name.partition(".")
    known = models.list_models(module=models)
    if architecture not in known:
        close = difflib.get_close_matches(architecture, known, n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else "It has vit_b_16 and others."
        raise UnknownNameError(f"torchvision has no model called '{architecture}'. {hint}")
    offered = models.get_model_weights(architecture)
    if tag and tag not in offered.__members__:
        raise UnknownNameError(
            f"torchvision has no weights '{tag}' for '{architecture}'. "
            f"It has {', '.join(offered.__members__)}. Leave the part after the dot out for the "
            "default."
        )
    weights: Any = offered[tag or "DEFAULT"]
    describe = partial(_describe, weights=weights)
    if checkpoint is not None:
        # Only Vision Transformers are built for one size of images.
        vit = architecture.startswith("vit_")
        options = {"image_size": weights.meta["min_size"][0]} if vit else {}
        return Built(models.get_model(architecture, **options), checkpoint, describe)
    try:
        return Built(models.get_model(architecture, weights=weights), None, describe)
    except Exception as error:  # whatever torch.hub and the network raise
        raise CheckpointError(
            f"The weights of 'torchvision:{name}' cannot be had: {first_line(error)} "
            "Pass a local file with --checkpoint F (in Python: checkpoint=F)."
        ) from error


def _describe(model: nn.Module, spec: str, *, weights: Any) -> LoadedModel:
    transform = weights.transforms()
    (side,) = transform.crop_size
    names = tuple(weights.meta["categories"])
    return LoadedModel(
        model=model,
        name=spec,
        transform=transform,
        mode="RGB",
        label_names=names,
        input_size=(3, side, side),
        mean=tuple(transform.mean),
        std=tuple(transform.std),
    )
