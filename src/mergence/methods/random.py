"""Random pruning: what any method must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mergence.method import Method, check_range, register
from mergence.plan import MergePlan, TokenView
from mergence.planning import keep_highest
from mergence.schedule import KeepRate, Schedule


@register("random")
@dataclass(frozen=True, kw_only=True)
class Random(Method):
    """Keep tokens at random places and drop the rest.

    The places depend on the seed, the block and the number of tokens, and on nothing else: every
    image loses the same ones, and a run can be repeated on any device.

    Attributes:
        seed: Chooses the places.
    """

    shape: ClassVar[Schedule] = KeepRate()

    size_attention: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "seed", 0, 2**31 - 1, integer=True)

    def plan(self, tokens: TokenView, slots: int) -> MergePlan:
        """See `Method.plan`."""
        place = torch.arange(tokens.size.shape[1], device=tokens.size.device)
        # A hash instead of a generator: no state, so it compiles and exports.
        mixed = (place + 1) * 2654435761 + (self.seed + 1) * 40503 + tokens.block * 69069
        for shift in (15, 13, 16):
            mixed = (mixed ^ (mixed >> shift)) * 73244475 % 2**32
        score = (mixed % 2**24).float()  # exact in float32, which every device has
        return keep_highest(score.expand_as(tokens.size), slots).drop(tokens.size)
