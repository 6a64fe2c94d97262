"""The operators without scatter or sort, for exported graphs.

As few as will do: for one image a runtime takes about as long to begin an operator as to carry it
out. Only those that the converters of other runtimes know, as `tests/contract/test_jit_trace.py`
and `test_export.py` see to.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from mergence.plan import MergePlan, ascending, rows, without_nan

LEAST = 2.0**-40
"""Shorter tokens count as this long, so that one can divide by it."""


def merge(x: Tensor, size: Tensor, plan: MergePlan, prefix: int = 0) -> tuple[Tensor, Tensor]:
    """Merge tokens into the slots of a plan; see `mergence.ops.merge`."""
    tokens, weight = x[:, prefix:], plan.weight.float()
    index = torch.arange(plan.slots, device=x.device).unsqueeze(1)
    member = (plan.slot.unsqueeze(1) == index).float()
    counts = (weight > 0).float()
    merged_size, count = (torch.stack((size, counts), dim=1) @ member.transpose(1, 2)).unbind(dim=1)
    # Normalised in float32 before the cast: a token alone in its slot then has weight exactly 1 and
    # passes unchanged, in bfloat16 too. Not by that product, which may be one of TensorFloat-32.
    share = member * weight.unsqueeze(1)
    total = share.sum(dim=2, keepdim=True)
    share = share / torch.where(total > 0, total, 1.0)
    merged = share.to(x.dtype) @ tokens
    if plan.keep_norm:
        exact = torch.promote_types(x.dtype, torch.float32)
        largest = (member * (counts * tokens.to(exact).norm(dim=2)).unsqueeze(1)).amax(dim=2)
        norm = merged.to(exact).norm(dim=2)
        # Shared slots only, so that a token alone in its slot still passes unchanged.
        shared = torch.logical_and(count > 1, norm > 0)
        scale = torch.where(shared, largest / torch.where(norm > 0, norm, 1.0), 1.0)
        merged = (merged * scale.unsqueeze(2)).to(x.dtype)
    return torch.cat((x[:, :prefix], merged), dim=1), merged_size


def norms(x: Tensor) -> Tensor:
    """The norm of each token; see `mergence.ops.norms`."""
    exact = torch.promote_types(x.dtype, torch.float32)
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, dtype=exact)
    return norm.clamp(min=LEAST)


class Cosines:
    """The cosines between all tokens, as one matrix; see `mergence.ops.cosines`."""

    _norms = staticmethod(norms)
    _product: Callable[[Tensor, Tensor], Tensor] = staticmethod(torch.matmul)

    def __init__(self, x: Tensor) -> None:
        x = x.detach()
        self._metric = (x / self._norms(x).unsqueeze(2)).to(x.dtype)
        self._matrix: Tensor | None = None

    def _all(self) -> Tensor:
        if self._matrix is None:
            self._matrix = self._product(self._metric, self._metric.transpose(1, 2))
        return self._matrix

    def to_nearest_above(self, score: Tensor) -> Tensor:
        """The cosine of each token to the nearest one of higher score.

        Among equal scores the earlier token counts as higher, and NaN as the lowest score: a strict
        order, so that of two copies exactly one has the other above it.

        Args:
            score: `[B, N]` float32.

        Returns:
            `[B, N]` float32, from -1 to 1; -1 for the token that none is above.
        """
        score = without_nan(score, -torch.inf)
        own, other = score.unsqueeze(2), score.unsqueeze(1)
        position = torch.arange(score.shape[1], device=score.device)
        # Not by a stable sort, which ONNX does not have.
        tied = torch.logical_and(other == own, position < position.unsqueeze(1))
        above = torch.logical_or(other > own, tied)
        return torch.where(above, self._all(), -1.0).amax(dim=2).float().clamp(-1, 1)

    def nearest(self, of: Tensor, among: Tensor) -> Tensor:
        """The nearest of some tokens to each of others.

        Args:
            of: `[B, R]` positions of the others.
            among: `[B, K]` positions of those to choose from, K at least 1.

        Returns:
            `[B, R]` int64 indices into `among`; the first of those that are equally near.
        """
        if self._matrix is None:
            other = rows(self._metric, among).transpose(1, 2)
            cosine = self._product(rows(self._metric, of), other)
        else:
            cosine = rows(self._matrix, of)
            cosine = cosine.gather(2, among.unsqueeze(1).expand(-1, of.shape[1], -1))
        return cosine.max(dim=2).indices


def split(score: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Split tokens by score; see `mergence.ops.split`."""
    score = without_nan(score.detach(), -torch.inf)
    # By the lowest score that stays, not by the indices of top-k: among equals these differ from
    # device to device.
    least = score.topk(max(kept, 1), dim=1).values[:, -1:]
    over, equal = score > least, score == least
    left = kept - over.sum(dim=1, keepdim=True)
    stays = torch.logical_or(over, torch.logical_and(equal, equal.long().cumsum(dim=1) <= left))
    position = torch.arange(score.shape[1], device=score.device)
    rank = stays.long().cumsum(dim=1)
    place = torch.where(stays, rank - 1, kept + position - rank)
    # A gather instead of a scatter, which exporters like.
    return ascending(place), place


def most_important(plan: MergePlan, importance: Tensor) -> Tensor:
    """The most important token of each slot; see `mergence.ops.most_important`."""
    slots = torch.arange(plan.slots, device=plan.slot.device).unsqueeze(1)
    member = plan.slot.unsqueeze(1) == slots
    return torch.where(member, importance.unsqueeze(1), -torch.inf).argmax(dim=2)


def attention_of_row(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Attention of one query to all keys; see `mergence.ops.attention_of_row`."""
    return attention_of_logits((q @ k.transpose(2, 3)).float() * scale, bias)


def attention_of_logits(logits: Tensor, bias: Tensor | None) -> Tensor:
    """The attention `[B, H, N]` of logits `[B, H, 1, N]`."""
    logits = logits if bias is None else logits + bias
    return logits.softmax(dim=-1).squeeze(2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """Attention with a bias; see `mergence.ops.attend`."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)


def recorded(*tensors: Tensor) -> bool:
    """Whether autograd follows one of some tensors."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def on_keys(bias: Tensor | None) -> bool:
    """Whether a bias is the same for all heads and queries, `[B, 1, 1, N]`."""
    return bias is None or bias.shape[1:3] == (1, 1)
