"""The operators as Triton kernels, for CUDA.

The kernels, and Triton with them, are imported when one first runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mergence.ops import cpu, dense
from mergence.plan import MergePlan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types that the kernels know."""

norms = dense.norms  # of what no kernel reads
most_important = cpu.most_important


def merge(x: Tensor, size: Tensor, plan: MergePlan, prefix: int = 0) -> tuple[Tensor, Tensor]:
    """Merge tokens into the slots of a plan; see `mergence.ops.merge`."""
    tensors = x, size, plan.slot, plan.weight
    run = _kernels(graph=dense.recorded(*tensors))
    merged: tuple[Tensor, Tensor] = run.merge(*tensors, plan.slots, prefix, plan.keep_norm)
    return merged


class Cosines:
    """The cosines between tokens, never written to memory; see `mergence.ops.dense.Cosines`."""

    def __init__(self, x: Tensor) -> None:
        self._x = x.detach()
        self._scale: Tensor = _kernels().scales(self._x)

    def to_nearest_above(self, score: Tensor) -> Tensor:
        """See `mergence.ops.dense.Cosines`."""
        cosine: Tensor = _kernels().nearest_above(self._x, self._scale, score.detach())
        return cosine

    def nearest(self, of: Tensor, among: Tensor) -> Tensor:
        """See `mergence.ops.dense.Cosines`."""
        found: Tensor = _kernels().nearest(self._x, self._scale, of, among)
        return found


def split(score: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Split tokens by score; see `mergence.ops.split`."""
    parts: tuple[Tensor, Tensor] = _kernels().split(score.detach(), kept)
    return parts


def attention_of_row(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Attention of one query to all keys; see `mergence.ops.attention_of_row`."""
    if dense.recorded(q, k) or not dense.on_keys(bias):
        return dense.attention_of_row(q, k, scale, bias)
    row: Tensor = _kernels().attention_of_row(q, k, bias, scale)
    return row


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """Attention with a bias; see `mergence.ops.attend`.

    Torch's own where that is as fast or the only one: without a bias or with one for each pair of
    tokens, in training, in float32, for wide heads.
    """
    if (
        bias is None
        or not dense.on_keys(bias)
        or dropout
        or dense.recorded(q, k, v)
        or q.dtype == torch.float32
        or q.shape[3] > 128
    ):
        return dense.attend(q, k, v, bias, dropout)
    y: Tensor = _kernels().attend(q, k, v, bias)
    return y


def _kernels(graph: bool = False) -> Any:
    """The kernels; where torch makes a graph, to compile or to differentiate, as operators."""
    if graph or torch.compiler.is_compiling():
        from mergence.ops import operators

        return operators
    from mergence.ops import kernels

    return kernels
