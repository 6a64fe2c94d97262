"""MSTM, the seed: multi-scale and token mergence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mergence.method import Learned, Method, check_flag, register
from mergence.multiscale import MultiScaleFusion
from mergence.plan import MergePlan, TokenView
from mergence.planning import keep_highest
from mergence.schedule import KeepRate, Schedule


@register("mstm")
@dataclass(frozen=True, kw_only=True)
class Mstm(Method):
    """Keep the most important tokens; merge each other one into the crucial token it resembles.

    Bian, Wang, Han, Wang, *Multi-Scale And Token Mergence: Make Your ViT More Efficient*,
    arXiv 2306.04897. Only the abstract is public to us. Our reading where it is silent: importance
    is class attention, resemblance is the cosine of block features, blocks 4, 7 and 10 as in EViT,
    size-weighted means, size attention.

    Attributes:
        fusion: Insert `MultiScaleFusion` before the first reduction; no effect until trained.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"importance"})
    shape: ClassVar[Schedule] = KeepRate()

    fusion: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(self, "fusion")

    def plan(self, tokens: TokenView, slots: int) -> MergePlan:
        """See `Method.plan`."""
        crucial = keep_highest(tokens.importance, slots)
        return crucial.merge_to_nearest(tokens.x, tokens.size)

    def plan_macs(self, tokens: int, slots: int, dim: int, head_dim: int) -> int:
        """Similarity between non-crucial and crucial tokens."""
        return (tokens - slots) * slots * dim

    def learned(self, dim: int) -> Learned | None:
        """The multi-scale fusion, if asked for."""
        return MultiScaleFusion(dim) if self.fusion else None
