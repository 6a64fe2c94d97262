"""The split into tokens that stay and tokens that leave, without a sort."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mergence.ops.kernels._common import launch, power_of_2


def split(score: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Split tokens by score; see `mergence.ops.split`."""
    batch, tokens = score.shape
    order = torch.empty_like(score, dtype=torch.int64, memory_format=torch.contiguous_format)
    place = torch.empty_like(order)
    launch(
        _split,
        batch,
        score.float().contiguous(),
        order,
        place,
        tokens,
        kept,
        LENGTH=power_of_2(tokens),
        num_warps=4,
    )
    return order, place


@triton.jit
def _split(
    score: tl.tensor,
    order: tl.tensor,
    place: tl.tensor,
    tokens: tl.tensor,
    kept: tl.tensor,
    LENGTH: tl.constexpr,
) -> None:
    image = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, LENGTH)
    inside = n < tokens
    value = tl.load(score + image * tokens + n, inside, other=0.0)
    nothing = value != value  # NaN
    value = tl.where(value == 0, 0.0, value)  # -0 is not below 0
    # The bits of floats as integers of the same order; 1 is NaN, and 0 lies outside of the image.
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(nothing, 1, bits.to(tl.int64) + 2147483648)
    key = tl.where(inside, key, 0)
    # The lowest key that stays, bit by bit: the largest that enough keys reach.
    least = tl.zeros([1], tl.int64)
    for step in range(32):
        higher = least + (tl.full([1], 1, tl.int64) << (31 - step))
        reached = tl.sum((key >= higher).to(tl.int32), 0)
        least = tl.where(reached >= kept, higher, least)
    over, equal = inside & (key > least), inside & (key == least)
    left = kept - tl.sum(over.to(tl.int32), 0)
    stays = over | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= left))
    rank = tl.cumsum(stays.to(tl.int32), 0)
    to = tl.where(stays, rank - 1, kept + n - rank)
    tl.store(place + image * tokens + n, to.to(tl.int64), inside)
    tl.store(order + image * tokens + to, n.to(tl.int64), inside)
