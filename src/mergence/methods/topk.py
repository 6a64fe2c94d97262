"""Top-k pruning by importance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mergence.method import Method, register
from mergence.plan import MergePlan, TokenView
from mergence.planning import keep_highest
from mergence.schedule import KeepRate, Schedule


@register("topk")
@dataclass(frozen=True, kw_only=True)
class TopK(Method):
    """Keep the most important tokens and drop the rest.

    The plain baseline of the field (Haurum et al., *Which Tokens to Use?*, arXiv 2308.04657): class
    attention as importance, blocks 4, 7 and 10.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"importance"})
    shape: ClassVar[Schedule] = KeepRate()

    size_attention: float = 0.0

    def plan(self, tokens: TokenView, slots: int) -> MergePlan:
        """See `Method.plan`."""
        return keep_highest(tokens.importance, slots).drop(tokens.size)
