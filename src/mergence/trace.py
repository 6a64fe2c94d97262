"""What a reduced forward did with each image, in terms of the original patches."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class ReductionPoint:
    """What one reduction did, in terms of the original patches."""

    block: int
    """Counted from 1."""
    source: Tensor
    """[B, patches] int64: patch -> slot after this point (composed over all points), -1 dropped."""
    size: Tensor
    """[B, slots] patches that each slot stands for."""
    anchor: Tensor
    """[B, slots] int64: the patch (raster order in the original grid) that represents the slot:
    its most important one."""
    importance: Tensor
    """[B, patches] float: importance of each patch at this point (its slot's score before the
    point), nan where dropped earlier."""


@dataclass(frozen=True)
class Trace:
    """What a reduced forward did with each image."""

    output: Tensor
    grid: tuple[int, int]
    """Patch rows, columns."""
    points: tuple[ReductionPoint, ...]
    method: str
