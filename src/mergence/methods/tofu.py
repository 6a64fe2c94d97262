"""ToFu: drop one of each similar pair early, merge and keep the norm late."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from mergence.method import BipartiteMethod, check_range, register
from mergence.plan import DROPPED, MergePlan, TokenView
from mergence.planning import join, most_similar_pairs
from mergence.schedule import Constant, Schedule


@register("tofu")
@dataclass(frozen=True, kw_only=True)
class ToFu(BipartiteMethod):
    """Pair tokens as ToMe does; early blocks drop the giver, late ones merge and keep the norm.

    Kim et al., *Token Fusion: Bridging the Gap between Token Pruning and Token Merging*,
    arXiv 2312.01026. Early blocks respond to a mean of tokens in no linear way, so there a pair is
    replaced by one of its tokens; in late blocks it is merged by MLERP, a mean scaled to the
    largest norm among its tokens. Departures: where early ends is not visible to us and an option;
    MLERP's mean is weighted by size; slots keep raster order.

    Attributes:
        early: The share of the blocks that count as early.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    shape: ClassVar[Schedule] = Constant()
    tunable: ClassVar[Mapping[str, tuple[float, ...]]] = {
        **BipartiteMethod.tunable,
        "early": (0.0, 0.25, 0.5),
    }

    early: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "early", 0, 1)

    def plan(self, tokens: TokenView, slots: int) -> MergePlan:
        """See `Method.plan`."""
        total = tokens.size.shape[1]
        moves = most_similar_pairs(tokens.keys, total - slots)
        if tokens.block <= self.early * tokens.depth:
            stays = moves == torch.arange(total, device=moves.device)
            return join(torch.where(stays, moves, DROPPED), tokens.size, slots)
        return join(moves, tokens.size, slots, keep_norm=True)
