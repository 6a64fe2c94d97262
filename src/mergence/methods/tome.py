"""ToMe: bipartite merging of similar tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mergence.method import BipartiteMethod, register
from mergence.plan import MergePlan, TokenView
from mergence.planning import join, most_similar_pairs
from mergence.schedule import Constant, Schedule


@register("tome")
@dataclass(frozen=True, kw_only=True)
class ToMe(BipartiteMethod):
    """Split tokens into two alternating sets and merge the most similar pairs across them.

    Bolya et al., *Token Merging: Your ViT But Faster*, arXiv 2210.09461, section 3. Departures: the
    merged sequence stays in raster order (the paper concatenates the two sets), and the sets
    alternate over patch tokens, so that several prefix tokens do not shift them.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"keys"})
    shape: ClassVar[Schedule] = Constant()

    def plan(self, tokens: TokenView, slots: int) -> MergePlan:
        """See `Method.plan`."""
        moves = most_similar_pairs(tokens.keys, tokens.size.shape[1] - slots)
        return join(moves, tokens.size, slots)
