"""Merging without scatter: one one-hot matrix and one batched matrix product."""

from __future__ import annotations

import torch
from torch import Tensor

from mergence.plan import MergePlan


def merge(x: Tensor, size: Tensor, plan: MergePlan) -> tuple[Tensor, Tensor]:
    """Merge tokens into the slots of a plan.

    Args:
        x: `[B, N, C]` tokens.
        size: `[B, N]` float32, how many patches each token stands for.
        plan: A plan for these N tokens.

    Returns:
        The weighted mean of each slot, `[B, slots, C]` in the type of `x`, and the sum of the sizes
        in each slot, `[B, slots]` float32. A slot whose weights are all zero yields zeros. With
        `plan.keep_norm` the mean is scaled to the largest norm of the slot's tokens of positive
        weight.
    """
    index = torch.arange(plan.slots, device=x.device).unsqueeze(1)
    member = plan.slot.unsqueeze(1) == index
    # Normalised in float32 before the cast: a token alone in its slot then has weight exactly 1 and
    # passes unchanged, in bfloat16 too.
    weight = torch.where(member, plan.weight.float().unsqueeze(1), 0.0)
    total = weight.sum(dim=2, keepdim=True)
    share = weight / torch.where(total > 0, total, 1.0)
    merged_size = (member.to(size.dtype) @ size.unsqueeze(2)).squeeze(2)
    mean = share.to(x.dtype) @ x
    if plan.keep_norm:
        # Shared slots only, so that a token alone in its slot still passes unchanged.
        counts = weight > 0
        shared = counts.sum(dim=2) > 1
        largest = torch.where(counts, x.float().norm(dim=2).unsqueeze(1), 0.0).amax(dim=2)
        norm = mean.float().norm(dim=2)
        scale = torch.where(shared & (norm > 0), largest / torch.where(norm > 0, norm, 1.0), 1.0)
        mean = (mean * scale.unsqueeze(2)).to(x.dtype)
    return mean, merged_size
