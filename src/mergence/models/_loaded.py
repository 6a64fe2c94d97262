"""What loading a model gives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mergence.files import read_json

if TYPE_CHECKING:
    from PIL.Image import Image


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
        processor: What prepares its images, of a library that keeps that beside the model.
    """

    model: nn.Module
    name: str
    transform: Callable[[Image], Tensor]
    mode: str
    label_names: tuple[str, ...] | None
    input_size: tuple[int, int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    processor: Any = None

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


@dataclass(frozen=True)
class Built:
    """A model as its source built it.

    Attributes:
        model: The network.
        weights: The file that its weights are still to be read from; None: they are in it.
        describe: Says what the network expects of its images, once it has its weights.
    """

    model: nn.Module
    weights: Path | None
    describe: Callable[[nn.Module, str], LoadedModel]


def source_of(folder: Path) -> str | None:
    """The source that loads the model of a folder, by its config.json; None where it says none."""
    try:
        config = read_json(folder / "config.json")
    except (OSError, ValueError):
        return None
    keys = config.keys() if isinstance(config, dict) else ()
    # A timm model that transformers wraps has both.
    return "hf" if "architectures" in keys else "local-dir" if "architecture" in keys else None
