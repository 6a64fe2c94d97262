"""Models by name: what a `MODEL` argument means, and how its weights are read and checked."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mergence.errors import (
    CheckpointError,
    MissingExtraError,
    UnknownNameError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from PIL.Image import Image

DEMO_MODEL = Path(__file__).parent / "assets" / "vit_fashion_mnist"
PLANNED_SOURCES = ("hf", "torchvision", "open_clip")
_HUB_WEIGHTS = ("model.safetensors", "pytorch_model.bin")


@dataclass(frozen=True)
class LoadedModel:
    """A model, ready to evaluate, and what it expects of its images.

    Attributes:
        model: The network, in evaluation mode and float32.
        name: The spec it was loaded from.
        transform: Turns a PIL image of `mode` into the tensor the model takes.
        mode: PIL mode of its images: "RGB", or "L" for one input channel.
        label_names: Names of its classes in output order, where known.
        input_size: Channels, height and width.
        mean: What the transform subtracts from pixels in [0, 1], a number a channel.
        std: What it divides them by afterwards.
    """

    model: nn.Module
    name: str
    transform: Callable[[Image], Tensor]
    mode: str
    label_names: tuple[str, ...] | None
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def pixels(self, images: Tensor) -> Tensor:
        """Undo the normalisation: `[B, C, H, W]` as the model takes it, to pixels in [0, 1]."""
        mean = images.new_tensor(self.mean).reshape(1, -1, 1, 1)
        std = images.new_tensor(self.std).reshape(1, -1, 1, 1)
        return (images * std + mean).clamp(0, 1)

    def label(self, index: int) -> str:
        """What a class is called by people: its short description, its name or its number."""
        if self.label_names is None:
            return f"class {index}"
        name = self.label_names[index]
        descriptions: Any = getattr(self.model, "pretrained_cfg", {}).get("label_descriptions")
        return str((descriptions or {}).get(name, name)).partition(",")[0]


def load_model(spec: str, *, checkpoint: str | Path | None = None) -> LoadedModel:
    """Load the model that `spec` names.

    * `timm:NAME` with its pretrained weights, downloaded at first use; they are not asked for
      where `checkpoint` is given.
    * `timm-random:NAME` with random weights, for speed measurements.
    * `local-dir:PATH`, a folder in timm's hub layout: config.json and model.safetensors.
    * `demo`, the embedded Fashion-MNIST model.

    Args:
        spec: Where the model comes from and what it is called.
        checkpoint: A .safetensors file, or a PyTorch file of tensors only, with weights for it.

    Raises:
        UnknownNameError: No such source, or no such model in it.
        CheckpointError: The weights are missing, damaged or do not fit the model.
        UnsupportedModelError: The model takes images of neither one nor three channels.
        MissingExtraError: timm is not installed.
    """
    source, _, name = spec.partition(":")
    if source not in _SOURCES or (source != "demo" and not name):
        raise _unknown_source(spec)
    if find_spec("timm") is None:
        raise MissingExtraError("timm", "timm", f"Loading '{spec}'")
    model, weights = _SOURCES[source](name, None if checkpoint is None else Path(checkpoint))
    if weights is not None:
        _load_weights(model, weights.expanduser(), spec)
    return _describe(model.float().eval(), spec)


def _timm(name: str, checkpoint: Path | None) -> tuple[nn.Module, Path | None]:
    import timm

    _check_timm_name(name)
    if checkpoint is not None:
        return timm.create_model(name), checkpoint
    try:
        return timm.create_model(name, pretrained=True), None
    except Exception as error:  # whatever timm, the hub client and the network raise
        raise CheckpointError(
            f"The pretrained weights of 'timm:{name}' cannot be had: {_first_line(error)} "
            f"Pass a local file with --checkpoint F (in Python: checkpoint=F), or use "
            f"'timm-random:{name}' if random weights will do."
        ) from error


def _timm_random(name: str, checkpoint: Path | None) -> tuple[nn.Module, Path | None]:
    import timm

    _check_timm_name(name)
    return timm.create_model(name), checkpoint


def _local_dir(path: str, checkpoint: Path | None) -> tuple[nn.Module, Path | None]:
    import timm

    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise CheckpointError(
            f"'{folder}' has no config.json. Pass a folder in timm's hub layout: config.json, "
            f"which names the architecture, and {_HUB_WEIGHTS[0]}."
        )
    try:
        model: nn.Module = timm.create_model(f"local-dir:{folder}")
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"'{folder / 'config.json'}' describes no model that timm can build "
            f"({type(error).__name__}: {_first_line(error)}). Correct it, or save the model again "
            "with timm.models.save_for_hf."
        ) from error
    files = (folder / file for file in _HUB_WEIGHTS)
    return model, checkpoint or next((f for f in files if f.exists()), folder / _HUB_WEIGHTS[0])


def _demo(name: str, checkpoint: Path | None) -> tuple[nn.Module, Path | None]:
    return _local_dir(str(DEMO_MODEL), checkpoint)


# A source builds the model that a name stands for and says which file its weights are still to be
# read from (None: they are in it). A new source is one function and one line here.
_SOURCES: dict[str, Callable[[str, Path | None], tuple[nn.Module, Path | None]]] = {
    "timm": _timm,
    "timm-random": _timm_random,
    "local-dir": _local_dir,
    "demo": _demo,
}


def _unknown_source(spec: str) -> UnknownNameError:
    source, colon, name = spec.partition(":")
    known = "timm:NAME, timm-random:NAME, local-dir:PATH and demo"
    if source in PLANNED_SOURCES:
        return UnknownNameError(
            f"Models from '{source}:' cannot be loaded by name in this version: '{spec}'. It has "
            f"{known}. In Python, mergence.apply takes a model object that you loaded yourself."
        )
    close = difflib.get_close_matches(source, _SOURCES, n=1)
    if Path(spec).expanduser().is_dir():
        fix = f"For this folder use 'local-dir:{spec}'."
    elif close:
        fix = f"Did you mean '{close[0]}{colon}{name}'?"
        if close[0] == source:
            fix = f"Name the model after the colon: '{source}:NAME'."
    elif not colon:
        fix = f"For a timm model use 'timm:{spec}'."
    else:
        fix = f"'{source}' is no model source."
    return UnknownNameError(
        f"'{spec}' does not say where the model comes from. {fix} Has: {known}."
    )


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


def _load_weights(model: nn.Module, file: Path, spec: str) -> None:
    import timm

    if not file.is_file():
        raise CheckpointError(
            f"The weights of '{spec}' are missing: there is no file '{file}'. "
            "Put it there, or name another one with --checkpoint F (in Python: checkpoint=F)."
        )
    try:
        state: dict[str, Any] = timm.models.load_state_dict(str(file), weights_only=True)
    except Exception as error:  # damaged bytes fail in as many ways as the readers have
        raise CheckpointError(
            f"'{file}' cannot be read as weights ({type(error).__name__}: {_first_line(error)}). "
            "It must be an undamaged .safetensors file, or a PyTorch file that holds tensors only "
            "(code in a file from elsewhere is never run). Download or save it again."
        ) from error
    own = model.state_dict()
    shapes = [
        f"{key} {list(getattr(state[key], 'shape', ()))} instead of {list(own[key].shape)}"
        for key in own.keys() & state.keys()
        if getattr(state[key], "shape", None) != own[key].shape
    ]
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": sorted(shapes),
    }
    if found := "; ".join(f"{len(p)} {what} ({_few(p)})" for what, p in problems.items() if p):
        raise CheckpointError(
            f"'{file}' does not fit '{spec}': {found}. Name the architecture that the weights were "
            "made for; for another number of classes, put them beside a config.json that says it "
            "and use local-dir:PATH."
        )
    model.load_state_dict(state)


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


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
