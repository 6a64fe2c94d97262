"""Models of open_clip, by architecture and weights."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from mergence.errors import CheckpointError, UnknownNameError
from mergence.models._loaded import Built, LoadedModel
from mergence.models._weights import first_line


def named(name: str, checkpoint: Path | None) -> Built:
    """`open_clip:NAME/WEIGHTS`, for example ViT-B-32/openai, or just the name with a checkpoint.

    With both, the checkpoint stands for those weights: activation and preprocessing are theirs.
    Called with images alone, the model answers with their embeddings.

    Raises:
        UnknownNameError: open_clip has no such model, or its weights are not named.
        CheckpointError: The weights cannot be had.
    """
    import open_clip

    architecture, _, tag = name.partition("/")
    if architecture not in (known := open_clip.list_models()):
        close = difflib.get_close_matches(architecture, known, n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else "It has ViT-B-32 and others."
        raise UnknownNameError(f"open_clip has no model called '{architecture}'. {hint}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if (tag or checkpoint is None) and tag not in tags:
        wrong = f"no weights '{tag}'" if tag else "several weights, or none,"
        raise UnknownNameError(
            f"open_clip has {wrong} for '{architecture}'. Name some of its own: "
            f"{', '.join(f'open_clip:{architecture}/{t}' for t in tags[:4]) or 'it has none'}; "
            "or pass a file with --checkpoint F (in Python: checkpoint=F)."
        )
    trained = open_clip.get_pretrained_cfg(architecture, tag) if tag else {}
    try:
        with nullcontext() if checkpoint is None else _weights_follow():
            model, _, transform = open_clip.create_model_and_transforms(
                architecture,
                pretrained=tag if checkpoint is None else None,
                # open_clip leaves it to the architecture, and warns where it is another.
                force_quick_gelu=bool(trained.get("quick_gelu")),
                image_mean=trained.get("mean"),
                image_std=trained.get("std"),
                image_interpolation=trained.get("interpolation"),
                image_resize_mode=trained.get("resize_mode"),
            )
    except Exception as error:  # whatever open_clip, the hub client and the network raise
        raise CheckpointError(
            f"The weights of 'open_clip:{name}' cannot be had: {first_line(error)} "
            "Pass a local file with --checkpoint F (in Python: checkpoint=F)."
        ) from error
    return Built(model, checkpoint, partial(_describe, transform=transform))


@contextmanager
def _weights_follow() -> Iterator[None]:
    """Keep open_clip from saying that the model is random, to which a file is loaded next."""

    def other(record: logging.LogRecord) -> bool:
        return "initialized randomly" not in record.getMessage()

    root = logging.getLogger()
    root.addFilter(other)
    try:
        yield
    finally:
        root.removeFilter(other)


def _describe(model: nn.Module, spec: str, *, transform: Any) -> LoadedModel:
    import open_clip

    config = open_clip.get_model_preprocess_cfg(model)
    size = config["size"]
    height, width = (size, size) if isinstance(size, int) else size
    return LoadedModel(
        model=model,
        name=spec,
        transform=transform,
        mode="RGB",
        label_names=None,
        input_size=(3, height, width),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )
