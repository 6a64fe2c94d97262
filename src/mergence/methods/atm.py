"""ATM: merge the pairs that lose least, and late in the network never two large tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from mergence.method import BipartiteMethod, check_range, register
from mergence.plan import MergePlan, TokenView, ascending, rows
from mergence.planning import alternate, best_pairs, join
from mergence.schedule import Constant, Schedule


@register("atm")
@dataclass(frozen=True, kw_only=True)
class ATM(BipartiteMethod):
    """Merge the pairs of least error n_i n_j / (n_i + n_j) * (1 - cos(i, j)), n being sizes.

    Lee and Choi, *Lossless Token Merging Even Without Fine-Tuning in Vision Transformers*,
    arXiv 2505.15160. Pairs are made across two sets: alternating tokens early, the half of the
    smaller tokens and the half of the larger ones late, where small ones join large ones.
    Departures: the schedule fixes how many merge, where the paper merges all pairs above a
    threshold that falls with depth; where late begins is not visible to us and an option; pairs are
    chosen and ranked by the error, as the paper's ranking within a batch is not visible; slots keep
    raster order.

    Attributes:
        early: The share of the blocks that count as early.
    """

    shape: ClassVar[Schedule] = Constant()
    tunable: ClassVar[Mapping[str, tuple[float, ...]]] = {
        **BipartiteMethod.tunable,
        "early": (0.5, 0.75, 1.0),
    }

    early: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "early", 0, 1)

    def plan(self, tokens: TokenView, slots: int) -> MergePlan:
        """See `Method.plan`."""
        total = tokens.size.shape[1]
        givers, takers = alternate(tokens.size)
        if tokens.block > self.early * tokens.depth:
            # Among equal sizes odd patches count as smaller: where nothing has merged yet, these
            # are the alternating sets again.
            position = torch.arange(total, device=givers.device)
            even = 1 - position % 2
            # Whole numbers with the position as the last criterion: stable sorts do not export.
            order = ascending((2 * tokens.size.long() + even) * total + position)
            givers, takers = order[:, : total // 2], order[:, total // 2 :]
        metric, size = F.normalize(tokens.x.float(), dim=2), tokens.size
        similarity = rows(metric, givers) @ rows(metric, takers).transpose(1, 2)
        own, other = size.gather(1, givers).unsqueeze(2), size.gather(1, takers).unsqueeze(1)
        error = own * other / (own + other) * (1 - similarity)
        moves = best_pairs(-error, givers, takers, count=total - slots, tokens=total)
        return join(moves, size, slots)

    def plan_macs(self, tokens: int, slots: int, dim: int, head_dim: int) -> int:
        """Similarity between the two halves."""
        return (tokens // 2) * (tokens - tokens // 2) * dim
