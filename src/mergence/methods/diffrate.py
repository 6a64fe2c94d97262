"""DiffRate's rule: prune the least important tokens, merge the next ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from mergence.method import Method, check_range, register
from mergence.plan import DROPPED, MergePlan, TokenView, ascending, rows, without_nan
from mergence.planning import keep_highest
from mergence.schedule import Constant, Schedule


@register("diffrate")
@dataclass(frozen=True, kw_only=True)
class DiffRate(Method):
    """Drop the least important tokens and merge the next ones into the most similar kept ones.

    Chen et al., *DiffRate: Differentiable Compression Rate for Efficient Vision Transformers*,
    arXiv 2305.17997. Importance is class attention, similarity the cosine of features;
    the size of a merged token counts in the mean times its similarity. Departures: the paper learns
    per block how many tokens are dropped and how many merged, with three epochs of gradients; here
    the schedule gives their sum and `prune` splits it. Size attention counts patches, without
    the similarity. Slots keep raster order.

    Attributes:
        prune: The share of the removed tokens that is dropped, rounded down. The default is not
            tuned: without training, dropping costs more than merging, so merging has the most.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"importance"})
    shape: ClassVar[Schedule] = Constant()
    tunable: ClassVar[Mapping[str, tuple[float, ...]]] = {
        **Method.tunable,
        "prune": (0.0, 0.25, 0.5),
    }

    prune: float = 0.25

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "prune", 0, 1)

    def plan(self, tokens: TokenView, slots: int) -> MergePlan:
        """See `Method.plan`."""
        importance = without_nan(tokens.importance, 0.0)
        split = keep_highest(importance, slots)
        metric = F.normalize(tokens.x.float(), dim=2)
        cosine = rows(metric, split.removed) @ rows(metric, split.kept).transpose(1, 2)
        similarity, target = cosine.max(dim=2)

        rank = ascending(ascending(importance.gather(1, split.removed)))
        # The tiny addition keeps 0.29 * 100 = 28.999999999999996 from becoming 28.
        pruned = rank < int(self.prune * split.removed.shape[1] + 1e-9)
        similarity = without_nan(similarity, 0.0).clamp(min=1e-6)
        share = split.in_place(torch.ones_like(split.kept, dtype=similarity.dtype), similarity)
        return split.plan(torch.where(pruned, DROPPED, target), tokens.size * share)

    def plan_macs(self, tokens: int, slots: int, dim: int, head_dim: int) -> int:
        """Similarity between removed and kept tokens."""
        return (tokens - slots) * slots * dim
