"""The operators as Triton kernels behind `torch.library` operators, for CUDA.

To torch.compile, CUDA graphs and autograd each is one opaque operator with known output shapes. The
kernels themselves, and Triton with them, are imported when one first runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mergence.ops import dense
from mergence.plan import MergePlan

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""Types that the kernels know."""


def merge(x: Tensor, size: Tensor, plan: MergePlan, prefix: int = 0) -> tuple[Tensor, Tensor]:
    """Merge tokens into the slots of a plan; see `mergence.ops.merge`."""
    tensors = x, size, plan.slot, plan.weight
    run = _merge if _recorded(*tensors) else _run(_merge)
    merged: tuple[Tensor, Tensor] = run(*tensors, plan.slots, prefix, plan.keep_norm)
    return merged


class Cosines:
    """The cosines between tokens, never written to memory; see `mergence.ops.dense.Cosines`."""

    def __init__(self, x: Tensor) -> None:
        self._x = x.detach()
        self._scale: Tensor = _run(_scales)(self._x)

    def to_nearest_above(self, score: Tensor) -> Tensor:
        """See `mergence.ops.dense.Cosines`."""
        cosine: Tensor = _run(_nearest_above)(self._x, self._scale, score.detach())
        return cosine

    def nearest(self, of: Tensor, among: Tensor) -> Tensor:
        """See `mergence.ops.dense.Cosines`."""
        found: Tensor = _run(_nearest)(self._x, self._scale, of, among)
        return found


def split(score: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Split tokens by score; see `mergence.ops.split`."""
    parts: tuple[Tensor, Tensor] = _run(_split)(score.detach(), kept)
    return parts


def attention_of_row(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Attention of one query to all keys; see `mergence.ops.attention_of_row`."""
    if _recorded(q, k) or not _on_keys(bias):
        return dense.attention_of_row(q, k, scale, bias)
    row: Tensor = _run(_attention_of_row)(q, k, bias, scale)
    return row


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """Attention with a bias; see `mergence.ops.attend`.

    Torch's own where that is as fast or the only one: without a bias or with one for each pair of
    tokens, in training, in float32, for wide heads.
    """
    if (
        bias is None
        or not _on_keys(bias)
        or dropout
        or _recorded(q, k, v)
        or q.dtype == torch.float32
        or q.shape[3] > 128
    ):
        return dense.attend(q, k, v, bias, dropout)
    y: Tensor = _run(_attend)(q, k, v, bias)
    return y


def _recorded(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def _on_keys(bias: Tensor | None) -> bool:
    """Whether a bias is the same for all heads and queries, `[B, 1, 1, N]`."""
    return bias is None or bias.shape[1:3] == (1, 1)


def _run(operator: Any) -> Callable[..., Any]:
    """What runs an operator: outside of torch.compile its kernel itself, which is sooner begun."""
    if not torch.compiler.is_compiling():
        from mergence.ops import kernels

        operator = getattr(kernels, operator._name.removeprefix("mergence::"))
    run: Callable[..., Any] = operator
    return run


@torch.library.custom_op("mergence::merge", mutates_args=())
def _merge(
    x: Tensor, size: Tensor, slot: Tensor, weight: Tensor, slots: int, prefix: int, keep_norm: bool
) -> tuple[Tensor, Tensor]:
    from mergence.ops import kernels

    return kernels.merge(x, size, slot, weight, slots, prefix, keep_norm)


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


@torch.library.custom_op("mergence::scales", mutates_args=())
def _scales(x: Tensor) -> Tensor:
    """One over the norm of each token `[B, N, C]`, `[B, N]` float32."""
    from mergence.ops import kernels

    return kernels.scales(x)


@_scales.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty(x.shape[:2], dtype=torch.float32, device=x.device)


@torch.library.custom_op("mergence::nearest_above", mutates_args=())
def _nearest_above(x: Tensor, scale: Tensor, score: Tensor) -> Tensor:
    """The cosine of each token to the nearest that scores above it, `[B, N]` float32.

    Among equal scores the earlier token is above, and NaN is the lowest; where none is above, -1.

    Args:
        x: `[B, N, C]` tokens.
        scale: `[B, N]` float32, one over the norm of each.
        score: `[B, N]` float32.
    """
    from mergence.ops import kernels

    return kernels.nearest_above(x, scale, score)


@_nearest_above.register_fake
def _(x: Tensor, scale: Tensor, score: Tensor) -> Tensor:
    return torch.empty_like(scale)


@torch.library.custom_op("mergence::nearest", mutates_args=())
def _nearest(x: Tensor, scale: Tensor, of: Tensor, among: Tensor) -> Tensor:
    """Which of the tokens at `among [B, K]` is nearest to each one at `of [B, R]`: `[B, R]` int64.

    `x` and `scale` as above. The first among equals.
    """
    from mergence.ops import kernels

    return kernels.nearest(x, scale, of, among)


@_nearest.register_fake
def _(x: Tensor, scale: Tensor, of: Tensor, among: Tensor) -> Tensor:
    return torch.empty(of.shape, dtype=of.dtype, device=of.device)


@torch.library.custom_op("mergence::split", mutates_args=())
def _split(score: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """See `mergence.ops.split`."""
    from mergence.ops import kernels

    return kernels.split(score, kept)


@_split.register_fake
def _(score: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    order = torch.empty(score.shape, dtype=torch.int64, device=score.device)
    return order, torch.empty_like(order)


@torch.library.custom_op("mergence::attention_of_row", mutates_args=())
def _attention_of_row(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """See `mergence.ops.attention_of_row`."""
    from mergence.ops import kernels

    return kernels.attention_of_row(q, k, bias, scale)


@_attention_of_row.register_fake
def _(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    return torch.empty(k.shape[:3], dtype=torch.float32, device=k.device)


@torch.library.custom_op("mergence::attend", mutates_args=())
def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """See `mergence.ops.attend`."""
    from mergence.ops import kernels

    return kernels.attend(q, k, v, bias)


@_attend.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    batch, heads, tokens, dim = q.shape
    return q.new_empty(batch, tokens, heads, dim).transpose(1, 2)
