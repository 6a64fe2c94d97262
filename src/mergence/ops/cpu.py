"""The operators for CPUs, eager or compiled: tokens are added to their slots, and ranks compared.

Written to be read as well: the other implementations are tested against these.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mergence.ops import dense, products
from mergence.plan import MergePlan, rows

__all__ = ["Cosines", "attend", "attention_of_row", "merge", "split"]

TINY = torch.finfo(torch.float32).tiny
BLOCK = 256
"""Cosines of more tokens than this are computed in blocks, which then fit into the cache."""


def merge(x: Tensor, size: Tensor, plan: MergePlan, prefix: int = 0) -> tuple[Tensor, Tensor]:
    """Merge tokens into the slots of a plan; see `mergence.ops.merge`."""
    batch, _, channels = x.shape
    # One slot more than asked for collects what is dropped.
    slot = torch.where(plan.slot < 0, plan.slots, plan.slot)
    weight = plan.weight.float()
    counts = (weight > 0).float()
    sums = torch.zeros(3, batch, plan.slots + 1, device=x.device)
    merged_size, total, count = sums.scatter_add(
        2, slot.expand(3, -1, -1), torch.stack((size, weight, counts))
    ).unbind()
    # Normalised first: a token alone in its slot then has weight exactly 1 and passes unchanged.
    share = weight / total.clamp(min=TINY).gather(1, slot)
    weighted = x[:, prefix:] * share.unsqueeze(2)

    rows = prefix + plan.slots + 1
    merged = weighted.new_zeros(batch, rows, channels)
    merged[:, :prefix] = x[:, :prefix]
    first = torch.arange(prefix, batch * rows, rows, device=x.device).unsqueeze(1)
    merged.view(-1, channels).index_add_(0, (first + slot).flatten(), weighted.flatten(0, 1))
    if plan.keep_norm:
        norm = torch.linalg.vector_norm(x[:, prefix:], dim=2, dtype=weighted.dtype) * counts
        largest = torch.zeros_like(total, dtype=norm.dtype).scatter_reduce(1, slot, norm, "amax")
        length = merged[:, prefix:].norm(dim=2)
        # Shared slots only, so that a token alone in its slot still passes unchanged.
        shared = (count > 1) & (length > 0)
        scale = torch.where(shared, largest / length.clamp(min=TINY), 1.0)
        merged = merged * F.pad(scale, (prefix, 0), value=1.0).unsqueeze(2)
    return merged[:, :-1].to(x.dtype), merged_size[:, :-1]


def split(score: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Split tokens by score; see `mergence.ops.split`."""
    score = torch.nan_to_num(score.detach(), nan=float("-inf"))
    tokens = score.shape[1]
    ranked = score.argsort(dim=1, descending=True, stable=True)
    # Behind all others for a moment, so that one sort puts both parts in raster order.
    ranked[:, kept:] += tokens
    order = ranked.sort(dim=1).values % tokens
    position = torch.arange(tokens, device=score.device).expand_as(order)
    return order, torch.empty_like(order).scatter_(1, order, position)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float) -> Tensor:
    """Attention with a bias; see `mergence.ops.attend`."""
    graph = torch.compiler.is_compiling()
    if (
        bias is None
        or not dense.on_keys(bias)
        or dropout
        or q.dtype != torch.bfloat16
        or not products.VECTORS
        or (graph and dense.recorded(q, k, v))  # the operator has no gradient
    ):
        return dense.attend(q, k, v, bias, dropout)
    y: Tensor = (products.in_graph if graph else products.attend)(q, k, v, bias)
    return y


def attention_of_row(q: Tensor, k: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Attention of one query to all keys; see `mergence.ops.attention_of_row`."""
    # Half the time of a product with one row, which needs the keys of a head side by side.
    logits: Tensor = torch.linalg.vecdot(k, q).unsqueeze(2).float() * scale
    return dense.attention_of_logits(logits, bias)


class Cosines(dense.Cosines):
    """The same, from differences of ranks instead of comparisons of scores."""

    def to_nearest_above(self, score: Tensor) -> Tensor:
        """See `mergence.ops.dense.Cosines`."""
        inf = torch.inf
        score = torch.nan_to_num(score.detach(), nan=-inf, posinf=inf, neginf=-inf)
        # Among equals the earlier token comes first.
        order = score.argsort(dim=1, descending=True, stable=True)
        if score.shape[1] > BLOCK:
            return self._in_blocks(order)
        # 0 for the highest, 4 for the next, and so on.
        rank = 4.0 * order.argsort(dim=1)
        # 0 where the other token is above, and -4 elsewhere.
        behind = ((rank - 4).unsqueeze(2) - rank.unsqueeze(1)).clamp_(-4, 0)
        return behind.add_(self._all()).amax(dim=2).clamp(-1, 1)

    def _in_blocks(self, order: Tensor) -> Tensor:
        """The same from the highest token down, so that half of the cosines are never computed.

        That takes half the time for many tokens, and for few ones longer.
        """
        metric = rows(self._metric, order)
        not_above = torch.full((BLOCK, BLOCK), -4.0, dtype=metric.dtype, device=order.device).triu()
        found = []
        for first in range(0, order.shape[1], BLOCK):
            block = metric[:, first : first + BLOCK]
            cosine = block @ metric[:, : first + block.shape[1]].mT
            cosine[:, :, first:] += not_above[: block.shape[1], : block.shape[1]]
            found.append(cosine.amax(dim=2))
        nearest = torch.cat(found, dim=1).float().clamp(-1, 1)
        return torch.empty_like(nearest).scatter_(1, order, nearest)
