"""The operators for CPUs, eager or compiled: tokens are looked up by slot, and ranks compared.

Written to be read as well: the other implementations are tested against these.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mergence.ops import dense, products
from mergence.plan import MergePlan, rows

TINY = torch.finfo(torch.float32).tiny
BLOCK = 256
"""Cosines of more tokens than this are computed in blocks, which then fit into the cache."""
WHOLE = 2048
"""Those of more tokens than this in bfloat16, too, whose square should not be in memory."""


def merge(x: Tensor, size: Tensor, plan: MergePlan, prefix: int = 0) -> tuple[Tensor, Tensor]:
    """Merge tokens into the slots of a plan; see `mergence.ops.merge`."""
    if dense.recorded(x, size, plan.weight):  # what is looked up has no second derivative
        return dense.merge(x, size, plan, prefix)
    batch, _, channels = x.shape
    # Rows of the answer, one image after the other; one more collects what is dropped.
    last = batch * (prefix + plan.slots)
    row = torch.arange(last, device=x.device).view(batch, prefix + plan.slots)
    place = torch.where(plan.slot < 0, last, plan.slot + row[:, prefix : prefix + 1])
    weight = plan.weight.float()
    counts = (weight > 0).float()
    sums = torch.zeros(3, last + 1, dtype=torch.float32, device=x.device)
    to = place.flatten().expand(3, -1)
    sums.scatter_add_(1, to, torch.stack((size, weight, counts)).flatten(1))
    merged_size, total, count = sums.unbind()
    # Normalised first: a token alone in its slot then has weight exactly 1 and passes unchanged.
    share = F.pad(weight / total.clamp(min=TINY)[place], (prefix, 0), value=1.0)
    # Sums of rows that are looked up: x is read once, and nothing of its size is written but them.
    placed, order = torch.cat((row[:, :prefix], place), dim=1).flatten().sort(stable=True)
    first = torch.searchsorted(placed, torch.arange(last + 1, device=x.device))
    merged = F.embedding_bag(
        order,
        x.flatten(0, 1),
        first,
        mode="sum",
        per_sample_weights=share.flatten()[order].to(x.dtype),
    )[:-1]
    if plan.keep_norm:
        norm = norms(x[:, prefix:]) * counts
        largest = torch.zeros_like(total, dtype=norm.dtype)
        largest = largest.scatter_reduce(0, to[0], norm.flatten(), "amax")[:-1]
        length = norms(merged)
        # Shared slots only, so that a token alone in its slot still passes unchanged.
        shared = (count[:-1] > 1) & (length > dense.LEAST)
        scale = torch.where(shared, largest / length, 1.0)
        merged = merged * scale.to(x.dtype).unsqueeze(1)
    merged_size = merged_size[:-1].view(batch, prefix + plan.slots)[:, prefix:]
    return merged.view(batch, prefix + plan.slots, channels), merged_size


def norms(x: Tensor) -> Tensor:
    """The norm of each token; see `mergence.ops.norms`.

    Those of tokens in bfloat16 are rounded to it: torch would copy all tokens to float32 otherwise,
    which takes several times as long as the norms. Float16 cannot hold every norm.
    """
    if x.dtype != torch.bfloat16:
        return dense.norms(x)
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1)
    return norm.clamp(min=dense.LEAST)


def split(score: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Split tokens by score; see `mergence.ops.split`."""
    score = torch.nan_to_num(score.detach(), nan=float("-inf"))
    ranked = score.argsort(dim=1, descending=True, stable=True)
    leaves = torch.ones_like(ranked).scatter_(1, ranked[:, :kept], 0)
    left = leaves.cumsum(dim=1)
    position = torch.arange(score.shape[1], device=score.device).expand_as(left)
    place = torch.where(leaves > 0, left + (kept - 1), position - left)
    return torch.empty_like(place).scatter_(1, place, position), place


def most_important(plan: MergePlan, importance: Tensor) -> Tensor:
    """The most important token of each slot; see `mergence.ops.most_important`."""
    importance = importance.detach()
    batch, tokens = importance.shape
    home = torch.where(plan.slot < 0, plan.slots, plan.slot)  # one more collects what is dropped
    best = importance.new_full((batch, plan.slots + 1), -torch.inf)
    best = best.scatter_reduce(1, home, importance, "amax")
    position = torch.arange(tokens, device=home.device).expand(batch, -1)
    position = torch.where(importance == best.gather(1, home), position, tokens)
    first = torch.full_like(best, tokens, dtype=torch.int64)
    first = first.scatter_reduce(1, home, position, "amin")[:, :-1]
    return first.clamp(max=tokens - 1)  # NaN is none of its slot


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
    logits = (k @ q.mT).transpose(2, 3).float() * scale
    return dense.attention_of_logits(logits, bias)


class Cosines(dense.Cosines):
    """The same, from differences of ranks instead of comparisons of scores."""

    _norms = staticmethod(norms)
    # `matmul` copies the second, which is transposed, before it multiplies in bfloat16.
    _product = staticmethod(torch.bmm)

    def to_nearest_above(self, score: Tensor) -> Tensor:
        """See `mergence.ops.dense.Cosines`."""
        inf = torch.inf
        score = torch.nan_to_num(score.detach(), nan=-inf, posinf=inf, neginf=-inf)
        # Among equals the earlier token comes first.
        order = score.argsort(dim=1, descending=True, stable=True)
        if score.shape[1] > BLOCK:
            return self._in_blocks(order)
        # 0 for the highest, 4 for the next, and so on.
        rank = torch.arange(0, 4 * order.shape[1], 4, device=order.device).float()
        rank = rank.expand_as(score)
        rank = torch.empty_like(rank).scatter_(1, order, rank)
        # 0 where the other token is above, and -4 elsewhere.
        behind = ((rank - 4).unsqueeze(2) - rank.unsqueeze(1)).clamp_(-4, 0)
        return behind.add_(self._all()).amax(dim=2).clamp(-1, 1)

    def _in_blocks(self, order: Tensor) -> Tensor:
        """The same from the highest token down, so that half of the cosines are never looked at.

        That takes half the time for many tokens, and for few ones longer.
        """
        metric = rows(self._metric, order)
        number = metric.shape[1]
        # In float32 that half is not computed. In bfloat16 computing it takes less time than the
        # copy that torch makes of a part of the tokens before it multiplies, if they are few.
        few = metric.dtype == torch.bfloat16 and number <= WHOLE
        whole = self._product(metric, metric.mT) if few else None
        not_above = torch.full((BLOCK, BLOCK), -4.0, dtype=metric.dtype, device=order.device).triu()
        found = []
        for first in range(0, number, BLOCK):
            last = min(first + BLOCK, number)
            if whole is None:
                cosine = self._product(metric[:, first:last], metric[:, :last].mT)
            else:
                cosine = whole[:, first:last, :last]
            among = cosine[:, :, first:] + not_above[: last - first, : last - first]
            best = among.amax(dim=2)
            found.append(best.maximum(cosine[:, :, :first].amax(dim=2)) if first else best)
        nearest = torch.cat(found, dim=1).float().clamp(-1, 1)
        return torch.empty_like(nearest).scatter_(1, order, nearest)
