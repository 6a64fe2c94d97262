"""Labels as the loss takes them: smoothed, and mixed together with the images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergence import family
from mergence.errors import OptionError
from mergence.train.config import Config


def classes_of(model: nn.Module) -> int:
    """How many classes a model tells apart.

    Raises:
        OptionError: It gives no class scores, so that labels say nothing about it.
    """
    classes = family.spec_of(model).classes
    if not classes:
        raise OptionError(
            f"This {type(model).__name__} gives no class scores, which are what is trained. Give "
            "it a classifier."
        )
    return classes


@dataclass(frozen=True)
class Targets:
    """timm's mixup, CutMix and label smoothing, for batches of any size.

    Attributes:
        classes: Number of classes.
        smoothing: Label smoothing.
        mixup: timm's `Mixup`, or None.
    """

    classes: int
    smoothing: float = 0.0
    mixup: Any = None

    @classmethod
    def of(cls, config: Config, classes: int, world: int = 1) -> Targets:
        """What a configuration asks for.

        Args:
            config: The configuration.
            classes: Number of classes.
            world: Number of processes, each of which mixes the images of its own pieces.

        Raises:
            OptionError: Each image would be alone.
        """
        if not (config.mixup or config.cutmix):
            return cls(classes, config.smoothing)
        if config.batch_size // (world * config.accumulate) < 2:
            raise OptionError(
                f"mixup and cutmix pair the images of a piece, and batch_size {config.batch_size} "
                f"over {world * config.accumulate} (processes times accumulate) makes pieces of "
                "one image. Raise batch_size, or lower accumulate."
            )
        from timm.data import Mixup

        mixup = Mixup(
            mixup_alpha=config.mixup,
            cutmix_alpha=config.cutmix,
            label_smoothing=config.smoothing,
            num_classes=classes,
        )
        return cls(classes, config.smoothing, mixup)

    def __call__(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Mix.

        Args:
            images: `[B, C, H, W]`.
            labels: `[B]` class indices.

        Returns:
            Images, and `[B, K]` a distribution over the classes for each.
        """
        from timm.data.mixup import mixup_target

        # timm mixes pairs: of an odd number, the last image stays as it is.
        pairs = len(images) // 2 * 2 if self.mixup is not None else 0
        plain = mixup_target(labels[pairs:], self.classes, 1.0, self.smoothing)
        if not pairs:
            return images, plain
        mixed, soft = self.mixup(images[:pairs].clone(), labels[:pairs])
        return torch.cat((mixed, images[pairs:])), torch.cat((soft, plain))
