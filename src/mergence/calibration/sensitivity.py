"""What it costs to have only n tokens from a block on: measured curves, and what lies between."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mergence.calibration.probe import Probe
from mergence.distances import Distance
from mergence.method import Method

SHARES = (0.8, 0.6, 0.42, 0.28, 0.15, 0.06)
"""Shares of the tokens at which a curve is measured."""
CEILING = 1.0
"""A curve is not followed above this distance: no useful schedule goes there."""
_SMALLEST = 1e-7


@dataclass(frozen=True)
class Curves:
    """Distance to the dense model as a function of where and how far its tokens are reduced.

    Attributes:
        patches: Patches of an image.
        measured: For each block, (tokens left, distance) with the tokens falling.
    """

    patches: int
    measured: tuple[tuple[tuple[int, float], ...], ...]

    def table(self) -> Tensor:
        """`[depth, patches + 1]` float64: the distance when n tokens are left from a block on.

        Distances are close to a power of (removed / left), so their logarithms are interpolated,
        and beyond the ends extrapolated, along the logarithm of that ratio. Fewer tokens never
        count as better.
        """
        left = torch.arange(1, self.patches, dtype=torch.float64)
        wanted = _log_ratio(left, self.patches)
        rows = []
        for points in self.measured:
            n = torch.tensor([n for n, _ in points], dtype=torch.float64)
            distance = torch.tensor([max(d, _SMALLEST) for _, d in points], dtype=torch.float64)
            row = _line(wanted, _log_ratio(n, self.patches), distance.log()).exp()
            rows.append(row.flip(0).cummax(dim=0).values.flip(0))
        return torch.nn.functional.pad(
            torch.nn.functional.pad(torch.stack(rows), (0, 1)), (1, 0), value=float("inf")
        )


def _log_ratio(left: Tensor, patches: int) -> Tensor:
    return ((patches - left) / left).log()


def _line(at: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Piecewise linear through (x, y), going on beyond both ends; a lone point rises as x does."""
    if len(x) == 1:
        return y[0] + (at - x[0])
    slope = y.diff() / x.diff()
    piece = (torch.searchsorted(x, at) - 1).clamp(0, len(slope) - 1)
    return y[piece] + slope[piece] * (at - x[piece])


def measure(
    probe: Probe,
    distance: Distance,
    method: Method,
    depth: int,
    *,
    images: int,
    progress: Callable[[int], None] = lambda cells: None,
) -> Curves:
    """Measure the curves of a model.

    In one cell of the grid all reduction happens at one block (or, where the method cannot remove
    so many at once, from that block on as fast as it can).

    Args:
        probe: Model and images.
        distance: What to measure.
        method: The method.
        depth: Number of blocks.
        images: How many images to use.
        progress: Called with the number of cells that are done.
    """
    patches = probe.patches
    levels = sorted({max(round(share * patches), 1) for share in SHARES} - {patches}, reverse=True)
    measured = []
    for block in range(depth):
        points: list[tuple[int, float]] = []
        for cell, level in enumerate(levels):
            counts, left = [patches] * block, patches
            while len(counts) < depth:
                left = max(level, min(method.fewest_slots(left), left))
                counts.append(left)
            gone = points and counts[-1] == points[-1][0]  # as far as the method gets from here
            if not gone:
                points.append((counts[-1], probe.mean(distance, method, counts, images)))
            if gone or points[-1][1] > CEILING:
                progress(len(levels) - cell)
                break
            progress(1)
        measured.append(tuple(points))
    return Curves(patches, tuple(measured))
