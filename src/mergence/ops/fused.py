"""The operators as Triton kernels behind `torch.library` operators, for CUDA.

To torch.compile, CUDA graphs and autograd each is one opaque operator with known output shapes. The
kernels themselves, and Triton with them, are imported when one first runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mergence.ops import dense
from mergence.plan import MergePlan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types that the kernels know."""


def merge(x: Tensor, size: Tensor, plan: MergePlan, prefix: int = 0) -> tuple[Tensor, Tensor]:
    """Merge tokens into the slots of a plan; see `mergence.ops.merge`."""
    merged: tuple[Tensor, Tensor] = _merge(
        x, size, plan.slot, plan.weight, plan.slots, prefix, plan.keep_norm
    )
    return merged


class Cosines:
    """The cosines between all tokens, never written to memory; see `mergence.ops.dense.Cosines`."""

    def __init__(self, x: Tensor) -> None:
        self._x = x.detach()
        # As in F.normalize the norm is of the type of x.
        self._scale = self._x.norm(dim=2).float().clamp(min=1e-12).reciprocal()

    def to_nearest_above(self, score: Tensor) -> Tensor:
        """See `mergence.ops.dense.Cosines`."""
        score = torch.where(score.isnan(), -torch.inf, score.detach())
        cosine: Tensor = _nearest(self._x, self._scale, score, score)[0]
        return cosine

    def nearest_kept(self, stays: Tensor) -> Tensor:
        """See `mergence.ops.dense.Cosines`."""
        score = torch.where(stays, 1.0, 0.0)
        position: Tensor = _nearest(self._x, self._scale, score, torch.where(stays, 2.0, 0.5))[1]
        return position


@torch.library.custom_op("mergence::merge", mutates_args=())
def _merge(
    x: Tensor, size: Tensor, slot: Tensor, weight: Tensor, slots: int, prefix: int, keep_norm: bool
) -> tuple[Tensor, Tensor]:
    from mergence.ops import kernels

    return kernels.merge(x, size, MergePlan(slot, weight, slots, keep_norm), prefix)


@_merge.register_fake
def _(
    x: Tensor, size: Tensor, slot: Tensor, weight: Tensor, slots: int, prefix: int, keep_norm: bool
) -> tuple[Tensor, Tensor]:
    batch, _, channels = x.shape
    return x.new_empty(batch, prefix + slots, channels), size.new_empty(batch, slots)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, size, slot, weight, *ctx.options = inputs
    ctx.save_for_backward(x, size, slot, weight)


def _gradients(ctx: Any, grad: Tensor, grad_size: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the dense operator, which is run again for them."""
    slots, prefix, keep_norm = ctx.options
    with torch.enable_grad():
        x, size, slot, weight = (t.detach() for t in ctx.saved_tensors)
        inputs = [t.requires_grad_() for t in (x, size, weight)]
        outputs = dense.merge(x, size, MergePlan(slot, weight, slots, keep_norm), prefix)
    x_grad, size_grad, weight_grad = torch.autograd.grad(outputs, inputs, (grad, grad_size))
    return x_grad, size_grad, None, weight_grad, None, None, None


_merge.register_autograd(_gradients, setup_context=_remember)


@torch.library.custom_op("mergence::nearest", mutates_args=())
def _nearest(x: Tensor, scale: Tensor, score: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest of the tokens that score above a bound, or score the same and come earlier.

    Args:
        x: `[B, N, C]` tokens.
        scale: `[B, N]` float32, one over the norm of each.
        score: `[B, N]` float32 of each token.
        bound: `[B, N]` float32, above which a token must score to be near this one.

    Returns:
        `[B, N]` float32 cosines, -1 where there is no such token, and `[B, N]` int64 positions, the
        token's own where there is none.
    """
    from mergence.ops import kernels

    return kernels.nearest(x, scale, score, bound)


@_nearest.register_fake
def _(x: Tensor, scale: Tensor, score: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(scale), torch.empty_like(scale, dtype=torch.int64)
