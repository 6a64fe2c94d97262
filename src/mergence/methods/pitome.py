"""PiToMe: protect informative tokens, merge inside large clusters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.nn import functional as F

from mergence.method import BipartiteMethod, register
from mergence.plan import MergePlan, TokenView, ascending, rows
from mergence.planning import best_pairs, join
from mergence.schedule import KeepRate, Schedule


@register("pitome")
@dataclass(frozen=True, kw_only=True)
class PiToMe(BipartiteMethod):
    """Merge tokens of high energy, those in large clusters, and protect isolated ones.

    Tran et al., *Accelerating Transformers with Spectrum-Preserving Token Merging*,
    arXiv 2405.16148. The energy of token i is mean_j ELU(cos(i, j) - m), with a margin m
    that falls from 0.75 to 0 over the depth. Tokens are sorted by energy and paired alternately:
    in the first half of the network all of them, of which the most similar pairs merge; in the
    second half the 2r of highest energy alone, so that the others are protected. Departures: size
    attention is on, and slots keep raster order.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    shape: ClassVar[Schedule] = KeepRate(every=1)

    def plan(self, tokens: TokenView, slots: int) -> MergePlan:
        """See `Method.plan`."""
        metric = F.normalize(tokens.keys.float(), dim=2)
        similarity = metric @ metric.transpose(1, 2)
        margin = 0.75 * (1 - tokens.block / tokens.depth)
        energy = F.elu(similarity - margin).mean(dim=2)

        total = metric.shape[1]
        count = total - slots
        order = ascending(-energy)
        if 2 * tokens.block > tokens.depth:
            order = order[:, : 2 * count]
        givers, takers = order[:, 0::2], order[:, 1::2]
        attraction = rows(rows(similarity, givers).transpose(1, 2), takers).transpose(1, 2)
        return join(
            best_pairs(attraction, givers, takers, count=count, tokens=total), tokens.size, slots
        )

    def plan_macs(self, tokens: int, slots: int, dim: int, head_dim: int) -> int:
        """Similarity between all tokens."""
        return tokens * tokens * head_dim
