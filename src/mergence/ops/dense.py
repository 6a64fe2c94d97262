"""The operators without scatter or sort, for exported graphs: matrix products and arithmetic.

Arithmetic, because comparing and selecting over N x N elements takes torch ten times as long on a
CPU as adding and multiplying them.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mergence.plan import MergePlan


def merge(x: Tensor, size: Tensor, plan: MergePlan, prefix: int = 0) -> tuple[Tensor, Tensor]:
    """Merge tokens into the slots of a plan; see `mergence.ops.merge`."""
    # Prefix tokens have the first slots for themselves, so that one product makes all rows.
    index = torch.arange(prefix + plan.slots, device=x.device).unsqueeze(1)
    slot = torch.where(plan.slot < 0, -1, plan.slot + prefix)
    slot = torch.cat((index[:prefix].mT.expand(slot.shape[0], -1), slot), dim=1)
    weight = F.pad(plan.weight.float(), (prefix, 0), value=1.0)
    size = F.pad(size, (prefix, 0))

    # 1 where the token is in the slot, and 0 or less, then 0, elsewhere.
    member = slot.float().unsqueeze(1) - index.float()
    member.square_().neg_().add_(1).clamp_(min=0)
    counts = (weight > 0).float()
    merged_size, count = (torch.stack((size, counts), dim=1) @ member.mT).unbind(dim=1)
    # Normalised in float32 before the cast: a token alone in its slot then has weight exactly 1 and
    # passes unchanged, in bfloat16 too.
    share = member * weight.unsqueeze(1)
    total = share.sum(dim=2, keepdim=True)
    share = share / torch.where(total > 0, total, 1.0)
    merged = share.to(x.dtype) @ x
    if plan.keep_norm:
        largest = (member * (counts * x.float().norm(dim=2)).unsqueeze(1)).amax(dim=2)
        norm = merged.float().norm(dim=2)
        # Shared slots only, so that a token alone in its slot still passes unchanged.
        shared = (count > 1) & (norm > 0)
        scale = torch.where(shared, largest / torch.where(norm > 0, norm, 1.0), 1.0)
        merged = (merged * scale.unsqueeze(2)).to(x.dtype)
    return merged, merged_size[:, prefix:]


class Cosines:
    """The cosines between all tokens, as one matrix; see `mergence.ops.cosines`."""

    def __init__(self, x: Tensor) -> None:
        metric = F.normalize(x.detach(), dim=2)
        self._matrix = (metric @ metric.transpose(1, 2)).float()

    def to_nearest_above(self, score: Tensor) -> Tensor:
        """The cosine of each token to the nearest one of higher score.

        Among equal scores the earlier token counts as higher, and NaN as the lowest score: a strict
        order, so that of two copies exactly one has the other above it.

        Args:
            score: `[B, N]` float32.

        Returns:
            `[B, N]` float32, from -1 to 1; -1 for the token that none is above.
        """
        score = torch.where(score.isnan(), -torch.inf, score)
        own, other = score.unsqueeze(2), score.unsqueeze(1)
        position = torch.arange(score.shape[1], device=score.device)
        # Not by a stable sort, which ONNX does not have.
        above = (other > own) | ((other == own) & (position < position.unsqueeze(1)))
        candidates = above.float().sub_(1).mul_(4).add_(self._matrix)
        return candidates.amax(dim=2).clamp(-1, 1)

    def nearest_kept(self, stays: Tensor) -> Tensor:
        """The token that each one resembles most among those that stay.

        Args:
            stays: `[B, N]` bool, at least one in each row.

        Returns:
            `[B, N]` int64 positions, its own for a token that stays; the first among equals.
        """
        position = torch.arange(stays.shape[1], device=stays.device)
        nearest = (self._matrix - torch.where(stays, 0.0, 4.0).unsqueeze(1)).max(dim=2).indices
        return torch.where(stays, position, nearest)
