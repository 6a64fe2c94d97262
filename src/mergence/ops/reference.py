"""The readable operators, which the fast ones are tested against."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mergence.plan import MergePlan


def merge(x: Tensor, size: Tensor, plan: MergePlan, prefix: int = 0) -> tuple[Tensor, Tensor]:
    """Merge tokens into the slots of a plan; see `mergence.ops.merge`."""
    front, x = x[:, :prefix], x[:, prefix:]
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
    return torch.cat((front, mean[:, :-1].to(x.dtype)), dim=1), merged_size[:, :-1]


class Cosines:
    """The cosines between all tokens; see `mergence.ops.dense.Cosines`."""

    def __init__(self, x: Tensor) -> None:
        metric = F.normalize(x, dim=2).float()
        self._matrix = (metric @ metric.transpose(1, 2)).to(x.dtype).float()

    def to_nearest_above(self, score: Tensor) -> Tensor:
        """See `mergence.ops.dense.Cosines`."""
        score = torch.where(score.isnan(), -torch.inf, score)
        own, other = score.unsqueeze(2), score.unsqueeze(1)
        position = torch.arange(score.shape[1], device=score.device)
        above = (other > own) | ((other == own) & (position < position.unsqueeze(1)))
        return torch.where(above, self._matrix, -1.0).amax(dim=2).clamp(-1, 1)

    def nearest_kept(self, stays: Tensor) -> Tensor:
        """See `mergence.ops.dense.Cosines`."""
        position = torch.arange(stays.shape[1], device=stays.device)
        nearest = torch.where(stays.unsqueeze(1), self._matrix, -torch.inf).argmax(dim=2)
        return torch.where(stays, position, nearest)
