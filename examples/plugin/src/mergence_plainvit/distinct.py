"""Keep what differs from the average token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.nn import functional as F

from mergence import KeepRate, MergePlan, Method, TokenView, register
from mergence.method import check_range
from mergence.planning import keep_highest


@register("distinct")
@dataclass(frozen=True, kw_only=True)
class Distinct(Method):
    """Keep the tokens that are least like the average token; merge each other one into its nearest.

    No class token is needed. An example, not a published method.

    Attributes:
        size_power: How much a token that stands for many patches is preferred; 0 is not at all.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    shape: ClassVar[KeepRate] = KeepRate()

    size_power: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "size_power", 0, 4)

    def plan(self, tokens: TokenView, slots: int) -> MergePlan:
        """See `Method.plan`."""
        keys = F.normalize(tokens.keys.float(), dim=2)  # [B, N, D]
        average = F.normalize(keys.mean(dim=1, keepdim=True), dim=2)  # [B, 1, D]
        difference = 1 - (keys * average).sum(dim=2)  # [B, N], 0 to 2
        score = difference * tokens.size**self.size_power
        return keep_highest(score, slots).merge_to_nearest(keys, tokens.size)

    def plan_macs(self, tokens: int, slots: int, dim: int, head_dim: int) -> int:
        """Similarity to the average, and of those that leave to those that stay."""
        return tokens * head_dim + (tokens - slots) * slots * head_dim
