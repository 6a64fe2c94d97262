"""ToMeCIS: ToMe's pairs, merged by class importance."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mergence.method import BipartiteMethod, register
from mergence.plan import MergePlan, TokenView, without_nan
from mergence.planning import join, most_similar_pairs
from mergence.schedule import Constant, Schedule


@register("tomecis")
@dataclass(frozen=True, kw_only=True)
class ToMeCIS(BipartiteMethod):
    """Pair tokens as ToMe does and weigh them in the mean by their class importance.

    Seol, Roh, Chung, *Token Merging with Class Importance Score*, IECON 2023,
    doi 10.1109/IECON51785.2023.10312420. Only the abstract is visible to us: similar tokens merge
    in an average weighted by a class importance score, so that merging many at once does not wash
    out what matters. Our reading: the score is class attention, which under size attention counts
    every patch of a merged token already, so it takes the place of the size. Departures: slots keep
    raster order.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"importance", "keys"})
    shape: ClassVar[Schedule] = Constant()

    def plan(self, tokens: TokenView, slots: int) -> MergePlan:
        """See `Method.plan`."""
        importance = without_nan(tokens.importance, 0.0).clamp(min=1e-12)
        moves = most_similar_pairs(tokens.keys, tokens.size.shape[1] - slots)
        return join(moves, importance, slots)
