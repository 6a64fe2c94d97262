"""Multi-scale feature fusion, the second half of the seed paper."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mergence.method import Learned


class MultiScaleFusion(Learned):
    """Enrich each patch token with its surroundings at several scales before tokens leave.

    Three depth-wise branches look at a patch's direct neighbours, at a dilated neighbourhood and at
    a coarser grid; each is added through a gate of its own per channel. Gates start at zero, so the
    module is exactly the identity when it is inserted and must be trained to have an effect.

    The seed (arXiv 2306.04897) says that multi-scale features are fused before tokens are pruned;
    scales, operator and position are not public. All of them are our reading.

    Args:
        dim: Channels of a token.
    """

    def __init__(self, dim: int) -> None:
        super().__init__()

        def depthwise(dilation: int) -> nn.Conv2d:
            return nn.Conv2d(dim, dim, 3, padding=dilation, dilation=dilation, groups=dim)

        self.fine = depthwise(1)
        self.wide = depthwise(2)
        self.coarse = depthwise(1)
        self.gates = nn.Parameter(torch.zeros(3, dim, 1, 1))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Fuse.

        Args:
            x: `[B, N, C]` patch tokens in raster order.
            grid: Patch rows and columns; their product is N.

        Returns:
            `[B, N, C]`.
        """
        batch, tokens, channels = x.shape
        image = x.transpose(1, 2).reshape(batch, channels, *grid)
        half = F.avg_pool2d(image, 2, ceil_mode=True, count_include_pad=False)
        coarse = F.interpolate(self.coarse(half), size=grid, mode="nearest")
        fused: Tensor = (
            self.gates[0] * self.fine(image)
            + self.gates[1] * self.wide(image)
            + self.gates[2] * coarse
        )
        return x + fused.reshape(batch, channels, tokens).transpose(1, 2).to(x.dtype)

    def macs(self, tokens: int) -> int:
        """Multiply-adds for one image of so many patches."""
        channels = self.gates.shape[1]
        # Two full-resolution 3 x 3 branches, one at a quarter of it, and three gates.
        return channels * (2 * 9 * tokens + 9 * tokens // 4 + 3 * tokens)
