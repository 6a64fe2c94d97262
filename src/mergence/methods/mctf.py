"""MCTF: fuse tokens that are similar, uninformative and small."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.nn import functional as F

from mergence.method import Method, check_range, register
from mergence.plan import MergePlan, TokenView, compose, without_nan
from mergence.planning import alternate, best_pairs, join
from mergence.schedule import KeepRate, Schedule


@register("mctf")
@dataclass(frozen=True, kw_only=True)
class MCTF(Method):
    """Fuse pairs by similarity x informativeness x size, in both directions between two sets.

    Lee, Choi, Kim, *Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision
    Transformers*, arXiv 2403.10030, section 3.2. Tokens draw each other by

        ((cos + 1) / 2)^(1 / tau_s) * (info_i info_j)^(1 / tau_i) * (z_i z_j)^(1 / tau_z)

    with info the inverse of the attention that a token receives from all, and z the inverse of its
    size, both divided by their largest value. Half of the pairs go from one alternating set to the
    other, half back to what has stayed there. The mean is weighted by attention received times
    size. Departures: tokens are fused after the attention whose map is read and not before it, so
    the map is neither merged nor used again; there is no training with token reduction consistency;
    more than half may leave at once; slots keep raster order.

    Attributes:
        tau_s: Temperature of similarity; a large one lets it count for little.
        tau_i: Temperature of informativeness.
        tau_z: Temperature of size.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"received"})
    shape: ClassVar[Schedule] = KeepRate()

    tau_s: float = 1.0
    tau_i: float = 20.0
    tau_z: float = 40.0

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("tau_s", "tau_i", "tau_z"):
            check_range(self, field, 1e-3)

    def plan(self, tokens: TokenView, slots: int) -> MergePlan:
        """See `Method.plan`."""
        total, size = tokens.size.shape[1], tokens.size
        received = without_nan(tokens.received, 0.0).clamp(min=1e-12)
        info = received.amin(dim=1, keepdim=True) / received
        smallness = size.amin(dim=1, keepdim=True) / size
        appeal = info ** (1 / self.tau_i) * smallness ** (1 / self.tau_z)
        metric = F.normalize(tokens.x.float(), dim=2)
        cosine = metric[:, 1::2] @ metric[:, 0::2].transpose(1, 2)
        attraction = ((cosine + 1) / 2).clamp(min=0) ** (1 / self.tau_s)
        attraction = attraction * appeal[:, 1::2].unsqueeze(2) * appeal[:, 0::2].unsqueeze(1)

        odd, even = alternate(size)
        count = total - slots
        there = min(count // 2, total // 2 - 1)  # one must stay to come back to
        moves = best_pairs(attraction, odd, even, count=there, tokens=total)
        # A token that took one in may itself go on to a token of the other set that has stayed.
        gone = (moves[:, 1::2] != odd).unsqueeze(2)
        attraction = attraction.masked_fill(gone, -torch.inf).transpose(1, 2)
        back = best_pairs(attraction, even, odd, count=count - there, tokens=total)
        return join(compose(moves, back), received * size, slots)

    def plan_macs(self, tokens: int, slots: int, dim: int, head_dim: int) -> int:
        """Similarity between the two halves."""
        return (tokens // 2) * (tokens - tokens // 2) * dim
