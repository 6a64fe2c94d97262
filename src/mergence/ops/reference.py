"""The readable operators, which the fast ones are tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from mergence.plan import MergePlan


def merge(x: Tensor, size: Tensor, plan: MergePlan) -> tuple[Tensor, Tensor]:
    """Merge tokens into the slots of a plan; see `mergence.ops.dense.merge`."""
    batch, _, channels = x.shape
    # One slot more than asked for collects what is dropped.
    slot = torch.where(plan.slot < 0, plan.slots, plan.slot)
    weight = plan.weight.float()

    total = torch.zeros(batch, plan.slots + 1, device=x.device).scatter_add(1, slot, weight)
    merged_size = torch.zeros_like(total).scatter_add(1, slot, size)
    weighted_sum = torch.zeros(batch, plan.slots + 1, channels, device=x.device).scatter_add(
        1, slot.unsqueeze(2).expand_as(x), x.float() * weight.unsqueeze(2)
    )
    mean = weighted_sum / torch.where(total > 0, total, 1.0).unsqueeze(2)
    if plan.keep_norm:
        norm = torch.where(weight > 0, x.float().norm(dim=2), 0.0)
        largest = torch.zeros_like(total).scatter_reduce(1, slot, norm, "amax").unsqueeze(2)
        length = mean.norm(dim=2, keepdim=True)
        mean = torch.where(length > 0, mean * largest / length, mean)
    return mean[:, :-1].to(x.dtype), merged_size[:, :-1]
