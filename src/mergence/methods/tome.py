"""ToMe: bipartite merging of similar tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from mergence.method import Method, register
from mergence.plan import MergePlan, Partition, TokenView
from mergence.schedule import Constant, Schedule


@register("tome")
@dataclass(frozen=True, kw_only=True)
class ToMe(Method):
    """Split tokens into two alternating sets and merge the most similar pairs across them.

    Bolya et al., *Token Merging: Your ViT But Faster*, arXiv 2210.09461, section 3. Departures: the
    merged sequence stays in raster order (the paper concatenates the two sets), and the sets
    alternate over patch tokens, so that several prefix tokens do not shift them.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    shape: ClassVar[Schedule] = Constant()

    def plan(self, tokens: TokenView, slots: int) -> MergePlan:
        """See `Method.plan`."""
        metric = F.normalize(tokens.keys.float(), dim=2)
        # With one class token in front the paper's set a, which gives, are the odd patches.
        givers, takers = metric[:, 1::2], metric[:, 0::2]
        best, partner = (givers @ takers.transpose(1, 2)).max(dim=2)
        total = tokens.size.shape[1]
        leaving = best.argsort(dim=1, descending=True)[:, : total - slots].sort(dim=1).values
        removed = 2 * leaving + 1
        position = torch.arange(total, device=removed.device)
        gone = (removed.unsqueeze(1) == position.unsqueeze(1)).any(dim=2)
        kept = gone.to(torch.uint8).argsort(dim=1, stable=True)[:, :slots]
        rank = (~gone).cumsum(dim=1) - 1
        target = rank.gather(1, 2 * partner.gather(1, leaving))
        return Partition(kept, removed).plan(target, tokens.size)

    def fewest_slots(self, tokens: int) -> int:
        """A pair needs one of each set, so at most half can leave."""
        return tokens - tokens // 2

    def plan_macs(self, tokens: int, slots: int, dim: int, head_dim: int) -> int:
        """Similarity between the two halves."""
        return (tokens // 2) * (tokens - tokens // 2) * head_dim
