"""EViT: keep the attentive tokens, fuse the inattentive ones into one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mergence.method import Method, register
from mergence.plan import MergePlan, TokenView, without_nan
from mergence.planning import keep_highest
from mergence.schedule import KeepRate, Schedule


@register("evit")
@dataclass(frozen=True, kw_only=True)
class EViT(Method):
    """Keep the tokens that the class token attends to and fuse all others into one extra token.

    Liang et al., *Not All Patches are What You Need: Expediting Vision Transformers via Token
    Reorganizations*, arXiv 2202.07800, section 3. The fused token is the mean of the others
    weighted by importance; it is a token like any other at the next reduction. Departures: the
    paper's sum is not divided by the sum of the weights (the next layer norm makes the two nearly
    the same), and a schedule counts the fused token as one of the slots.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"importance"})
    shape: ClassVar[Schedule] = KeepRate()

    size_attention: float = 0.0

    def plan(self, tokens: TokenView, slots: int) -> MergePlan:
        """See `Method.plan`."""
        importance = without_nan(tokens.importance, 0.0).clamp(min=1e-12)
        attentive = keep_highest(importance, slots - 1)
        plan = attentive.plan(torch.full_like(attentive.removed, slots - 1), importance)
        return MergePlan(plan.slot, plan.weight, slots)
