"""The kernels as operators of torch, which torch.compile sees through, and autograd.

Importing this module imports Triton; see `mergence.ops.fused`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.library import triton_op

from mergence.ops import dense, kernels
from mergence.plan import MergePlan


@triton_op("mergence::merge", mutates_args=())
def merge(
    x: Tensor, size: Tensor, slot: Tensor, weight: Tensor, slots: int, prefix: int, keep_norm: bool
) -> tuple[Tensor, Tensor]:
    """See `mergence.ops.merge`."""
    return kernels.merge(x, size, slot, weight, slots, prefix, keep_norm)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, size, slot, weight, *ctx.options = inputs
    ctx.save_for_backward(x, size, slot, weight)


def _gradients(ctx: Any, grad: Tensor, grad_size: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the dense operator, which is run again for them.

    They can be differentiated again where torch records a backward.
    """
    slots, prefix, keep_norm = ctx.options
    record = torch.is_grad_enabled()
    x, size, slot, weight = ctx.saved_tensors
    with torch.enable_grad():
        # Views lead on to what was saved, whose own hooks are not for a gradient in between.
        inputs = [t.view_as(t).requires_grad_() for t in (x, size, weight)]
        plan = MergePlan(slot, inputs[2], slots, keep_norm)
        outputs = dense.merge(inputs[0], inputs[1], plan, prefix)
    x_grad, size_grad, weight_grad = torch.autograd.grad(
        outputs, inputs, (grad, grad_size), create_graph=record
    )
    return x_grad, size_grad, None, weight_grad, None, None, None


merge.register_autograd(_gradients, setup_context=_remember)


@triton_op("mergence::scales", mutates_args=())
def scales(x: Tensor) -> Tensor:
    """One over the norm of each token `[B, N, C]`, `[B, N]` float32."""
    return kernels.scales(x)


@triton_op("mergence::nearest_above", mutates_args=())
def nearest_above(x: Tensor, scale: Tensor, score: Tensor) -> Tensor:
    """The cosine of each token to the nearest that scores above it, `[B, N]` float32.

    Among equal scores the earlier token is above, and NaN is the lowest; where none is above, -1.

    Args:
        x: `[B, N, C]` tokens.
        scale: `[B, N]` float32, one over the norm of each.
        score: `[B, N]` float32.
    """
    return kernels.nearest_above(x, scale, score)


@triton_op("mergence::nearest", mutates_args=())
def nearest(x: Tensor, scale: Tensor, of: Tensor, among: Tensor) -> Tensor:
    """Which of the tokens at `among [B, K]` is nearest to each one at `of [B, R]`: `[B, R]` int64.

    `x` and `scale` as above. The first among equals.
    """
    return kernels.nearest(x, scale, of, among)


@triton_op("mergence::split", mutates_args=())
def split(score: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """See `mergence.ops.split`."""
    return kernels.split(score, kept)


@triton_op("mergence::attention_of_row", mutates_args=())
def attention_of_row(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """See `mergence.ops.attention_of_row`."""
    return kernels.attention_of_row(q, k, bias, scale)


@triton_op("mergence::attend", mutates_args=())
def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """See `mergence.ops.attend`."""
    return kernels.attend(q, k, v, bias)
