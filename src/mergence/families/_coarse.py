"""How a family reads patches coarsely: two modules on the way to the first block take part.

Where a patch embedding `can_read_coarsely`, the family adds both to the parts of its `ModelSpec`.
What they do is in `mergence.coarse`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mergence.coarse import SIDE
from mergence.program import Program

HALF = (torch.bfloat16, torch.float16)


class CoarseStem:
    """Mixed into a patch embedding, a convolution: it embeds the image at half size as well.

    Where tokens leave it embeds by `as_product`: this part of a forward is as long as before.
    """

    def forward(self: Any, image: Tensor) -> Tensor:
        """The convolution's forward; what it found of the image at half size is in the run."""
        dense: Any = super(CoarseStem, self)
        program: Program = self._mergence
        y: Tensor = dense.forward(image)
        program.read(image, y, dense.forward, self.stride)
        return y

    def _conv_forward(self: Any, image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        program: Program = self._mergence
        if embeds_by_product(program, image):
            return as_product(image, weight, bias)
        dense: Any = super(CoarseStem, self)
        y: Tensor = dense._conv_forward(image, weight, bias)
        return y


class CoarseTokens:
    """Mixed into a module that gives out all tokens after positions were added to them."""

    def forward(self: Any, *inputs: Any, **options: Any) -> Tensor:
        """The module's forward, after which the patches that are read coarsely have joined."""
        dense: Any = super(CoarseTokens, self)
        program: Program = self._mergence
        return program.coarsened(dense.forward(*inputs, **options))


def embeds_by_product(program: Program, image: Tensor) -> bool:
    """Whether patches are embedded by a product: in half precision, where tokens leave."""
    return image.dtype in HALF and program.reduces and not program.run.disabled


def can_read_coarsely(stem: nn.Module, grid: tuple[int, int]) -> bool:
    """Whether a patch embedding can read regions of four patches as one.

    It has to be one convolution whose patches do not overlap, so that a region at half the
    resolution is a patch to it; and a line of patches has no regions.

    Args:
        stem: The patch embedding.
        grid: Patch rows and columns at the model's own input size.
    """
    return (
        isinstance(stem, nn.Conv2d)
        and min(grid) >= SIDE
        and stem.kernel_size == stem.stride
        and stem.padding in ("valid", (0, 0))
        and stem.dilation == (1, 1)
        and stem.groups == 1
    )


def as_product(image: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution whose patches do not overlap, as a product of patches and weights.

    In half precision this is what takes the least time: on CUDA cuDNN has no fast convolution of
    three channels (docs/benchmarking.md), on CPUs it saves a copy.

    Args:
        image: `[B, C, H, W]`; pixels beyond the last whole patch are left out.
        weight: `[D, C, height, width]`, the last two those of a patch.
        bias: `[D]`.

    Returns:
        `[B, D, rows, columns]`, with D next to each other in memory.
    """
    batch, channels = image.shape[:2]
    height, width = weight.shape[2:]
    rows, columns = image.shape[2] // height, image.shape[3] // width
    image = image[:, :, : rows * height, : columns * width]
    image = image.reshape(batch, channels, rows, height, columns, width)
    # The pixels of a patch in the order in which they are in memory.
    if image.stride(1) == 1:
        image, weight = image.permute(0, 2, 4, 3, 5, 1), weight.permute(0, 2, 3, 1)
    else:
        image = image.permute(0, 2, 4, 1, 3, 5)
    y = F.linear(image.flatten(3).flatten(1, 2), weight.flatten(1), bias)
    return y.reshape(batch, rows, columns, -1).permute(0, 3, 1, 2)
