"""Models of timm, by name or from a folder in its hub layout."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from torch import nn

from mergence.errors import (
    CheckpointError,
    MergenceError,
    UnknownNameError,
    UnsupportedModelError,
)
from mergence.models._loaded import Built, LoadedModel, source_of
from mergence.models._weights import first_line

DEMO_MODEL = Path(__file__).parents[1] / "assets" / "vit_fashion_mnist"
_HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


def named(name: str, checkpoint: Path | None) -> Built:
    """`timm:NAME`, with its pretrained weights or those of a file."""
    import timm

    _check_timm_name(name)
    if checkpoint is not None:
        return Built(timm.create_model(name), checkpoint, _describe)
    try:
        return Built(timm.create_model(name, pretrained=True), None, _describe)
    except Exception as error:  # whatever timm, the hub client and the network raise
        raise CheckpointError(
            f"The pretrained weights of 'timm:{name}' cannot be had: {first_line(error)} "
            f"Pass a local file with --checkpoint F (in Python: checkpoint=F), or use "
            f"'timm-random:{name}' if random weights will do."
        ) from error


def random(name: str, checkpoint: Path | None) -> Built:
    """`timm-random:NAME`, with random weights."""
    import timm

    _check_timm_name(name)
    return Built(timm.create_model(name), checkpoint, _describe)


def local_dir(path: str, checkpoint: Path | None) -> Built:
    """`local-dir:PATH`, a folder in timm's hub layout."""
    import timm

    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"'{folder}' has no config.json. Pass a folder in timm's hub layout: config.json, "
            f"which names the architecture, and {_HUB_WEIGHTS[0]}."
        )
    if source_of(folder) == "hf":
        raise CheckpointError(f"'{folder}' holds a model of transformers. Use 'hf:{path}'.")
    try:
        model: nn.Module = timm.create_model(f"local-dir:{folder}")
    except Exception as error:  # whatever timm makes of a file that can hold anything
        raise CheckpointError(
            f"'{folder / 'config.json'}' describes no model that timm can build "
            f"({type(error).__name__}: {first_line(error)}). Correct it, or save the model again "
            "with timm.models.save_for_hf."
        ) from error
    files = (folder / file for file in _HUB_WEIGHTS)
    file = checkpoint or next((f for f in files if f.exists()), folder / _HUB_WEIGHTS[0])
    return Built(model, file, _describe_file)


def demo(name: str, checkpoint: Path | None) -> Built:
    """The embedded Fashion-MNIST model."""
    return local_dir(str(DEMO_MODEL), checkpoint)


def _check_timm_name(name: str) -> None:
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        names = (
            timm.list_models(f"{architecture}*")[:3]
            or timm.list_models(f"*{architecture}*")[:3]
            or difflib.get_close_matches(architecture, timm.list_models(), n=3)
        )
        hint = f"Did you mean {' or '.join(names)}?" if names else "timm.list_models() lists them."
        raise UnknownNameError(f"timm has no model called '{architecture}'. {hint}")
    tags = timm.list_pretrained(f"{architecture}.*")
    if tag and name not in tags:
        raise UnknownNameError(
            f"timm has no weights '{tag}' for '{architecture}'. "
            f"It has {', '.join(tags) or 'none'}. Leave the part after the dot out for the default."
        )


def _describe_file(model: nn.Module, spec: str) -> LoadedModel:
    try:
        return _describe(model, spec)
    except MergenceError:
        raise
    except Exception as error:  # whatever timm makes of values that can be anything
        raise CheckpointError(
            f"What '{spec}' says of its images cannot be used ({type(error).__name__}: "
            f"{first_line(error)}). Correct pretrained_cfg (mean, std, crop_pct, "
            "interpolation) and label_names in its config.json."
        ) from error


def _describe(model: nn.Module, spec: str) -> LoadedModel:
    from timm.data import create_transform, resolve_data_config

    config = resolve_data_config({}, model=model)
    channels, height, width = config["input_size"]
    modes = {1: "L", 3: "RGB"}
    if channels not in modes:
        raise UnsupportedModelError(
            f"'{spec}' takes images of {channels} channels. Use one with 1 (grey) or 3 (RGB)."
        )
    names = _label_names(model)
    if names is not None and len(names) != model.num_classes:
        raise CheckpointError(
            f"The configuration of '{spec}' has {len(names)} label_names for {model.num_classes} "
            "classes. Correct its config.json: one name for each output, or no names."
        )
    transform = create_transform(**config, is_training=False)
    return LoadedModel(
        model=model,
        name=spec,
        transform=transform,
        mode=modes[channels],
        label_names=names,
        input_size=(channels, height, width),
        mean=tuple(config["mean"]),
        std=tuple(config["std"]),
    )


def _label_names(model: nn.Module) -> tuple[str, ...] | None:
    from timm.data import ImageNetInfo, infer_imagenet_subset

    configuration: Any = model.pretrained_cfg
    if names := configuration.get("label_names"):
        return tuple(names)
    # ImageNet's folders are called by synset, which lets a few of its classes be evaluated, too.
    subset = infer_imagenet_subset(model)
    return tuple(ImageNetInfo(subset).label_names()) if subset else None
