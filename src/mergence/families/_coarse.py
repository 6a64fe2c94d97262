"""How a family reads patches coarsely: two modules on the way to the first block take part.

Where a patch embedding `can_read_coarsely`, the family adds both to the parts of its `ModelSpec`.
What they do is in `mergence.coarse`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from mergence.step import Program


class CoarseStem:
    """Mixed into a patch embedding, a convolution: it embeds the image at half size as well."""

    def forward(self: Any, image: Tensor) -> Tensor:
        """The convolution's forward; what it found of the image at half size is in the run."""
        dense: Any = super(CoarseStem, self)
        program: Program = self._mergence
        y: Tensor = dense.forward(image)
        program.read(image, y, dense.forward, self.stride)
        return y


class CoarseTokens:
    """Mixed into a module that gives out all tokens after positions were added to them."""

    def forward(self: Any, *inputs: Any, **options: Any) -> Tensor:
        """The module's forward, after which the patches that are read coarsely have joined."""
        dense: Any = super(CoarseTokens, self)
        program: Program = self._mergence
        return program.coarsened(dense.forward(*inputs, **options))


def can_read_coarsely(stem: nn.Module) -> bool:
    """Whether a patch embedding can read regions of four patches as one.

    It has to be one convolution whose patches do not overlap, so that a region at half the
    resolution is a patch to it.
    """
    return isinstance(stem, nn.Conv2d) and stem.kernel_size == stem.stride
