"""The default method: importance x redundancy."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from mergence import ops
from mergence.method import Method, check_range, register
from mergence.plan import MergePlan, TokenView
from mergence.planning import keep_highest
from mergence.schedule import Ramp, Schedule


@register("mergence")
@dataclass(frozen=True, kw_only=True)
class Mergence(Method):
    """Merge the tokens that matter little and are said again by a more important token.

    The cost of removing token i is

        alpha * log(importance_i) + log(1 + epsilon - max cos(i, j))

    with the maximum over the tokens j that are more important than i. The cheapest tokens leave;
    each joins the most similar token that stays, in a size-weighted mean that keeps the largest
    norm of its tokens. This project's own method: it starts from the split into crucial and
    non-crucial tokens of arXiv 2306.04897, adds redundancy to the choice, and preserves norms as
    ToFu does (arXiv 2312.01026).

    Attributes:
        alpha: Weight of importance. 0 is pure redundancy; a large value is top-k by importance.
        epsilon: What a perfect copy still costs; softens the preference for near-copies.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"importance"})
    shape: ClassVar[Schedule] = Ramp()
    tunable: ClassVar[Mapping[str, tuple[float, ...]]] = {
        **Method.tunable,
        "alpha": (0.15, 0.25, 0.4),
    }

    alpha: float = 0.25
    epsilon: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "alpha", 0)
        check_range(self, "epsilon", 1e-6)

    def plan(self, tokens: TokenView, slots: int) -> MergePlan:
        """See `Method.plan`."""
        importance = tokens.importance.clamp(min=1e-12)
        cosines = ops.cosines(tokens.x)
        redundancy = cosines.to_nearest_above(importance)
        cost = self.alpha * importance.log() + torch.log(1 + self.epsilon - redundancy)
        split = keep_highest(cost, slots)
        nearest = cosines.nearest(split.removed, split.kept)
        return split.plan(nearest, tokens.size, keep_norm=True)

    def plan_macs(self, tokens: int, slots: int, dim: int, head_dim: int) -> int:
        """One similarity between all tokens."""
        return tokens * tokens * dim
