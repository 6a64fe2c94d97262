"""The merge: one program makes one row of the output."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mergence.ops.kernels._common import launch, power_of_2, rowwise


def merge(
    x: Tensor, size: Tensor, slot: Tensor, weight: Tensor, slots: int, prefix: int, keep_norm: bool
) -> tuple[Tensor, Tensor]:
    """Merge tokens; see `mergence.ops.merge`."""
    batch, tokens, channels = x.shape
    x = rowwise(x)
    merged = x.new_empty(batch, prefix + slots, channels)
    merged_size = size.new_empty(batch, slots)
    width = power_of_2(channels)
    length = power_of_2(tokens - prefix)
    launch(
        _merge,
        (prefix + slots) * batch,
        x,
        size.contiguous(),
        slot.contiguous(),
        weight.contiguous(),
        merged,
        merged_size,
        tokens - prefix,
        slots,
        prefix,
        channels,
        x.stride(0),
        x.stride(1),
        LENGTH=length,
        WIDTH=width,
        KEEP_NORM=keep_norm,
        # Within one warp sums are cheap, and most slots hold one or two tokens.
        num_warps=1 if max(width, length) <= 1024 else 4,
    )
    return merged, merged_size


@triton.jit
def _merge(
    x: tl.tensor,
    size: tl.tensor,
    slot: tl.tensor,
    weight: tl.tensor,
    merged: tl.tensor,
    merged_size: tl.tensor,
    tokens: tl.tensor,
    slots: tl.tensor,
    prefix: tl.tensor,
    channels: tl.tensor,
    image_stride: tl.tensor,
    token_stride: tl.tensor,
    LENGTH: tl.constexpr,
    WIDTH: tl.constexpr,
    KEEP_NORM: tl.constexpr,
) -> None:
    """One row of the output: a prefix token, or the mean of one slot."""
    rows = prefix + slots
    row, image = tl.program_id(0) % rows, (tl.program_id(0) // rows).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    inside = channel < channels
    x += image * image_stride + channel
    merged += (image * rows + row) * channels + channel
    if row < prefix:
        tl.store(merged, tl.load(x + row.to(tl.int64) * token_stride, inside), inside)
    else:
        n = tl.arange(0, LENGTH)
        at = image * tokens + n
        member = tl.load(slot + at, n < tokens, other=-1) == row - prefix
        patches = tl.sum(tl.load(size + at, member, other=0.0), 0)
        tl.store(merged_size + image * slots + row - prefix, patches)

        share = tl.load(weight + at, member, other=0.0).to(tl.float32)
        positive = tl.sum((share > 0).to(tl.int32), 0)
        # Normalised first: a token alone in its slot has share 1 and passes unchanged.
        total = tl.sum(share, 0)
        share = share / tl.where(total > 0, total, 1.0)
        mean = tl.zeros([WIDTH], tl.float32)
        largest = 0.0
        last = -1
        for _ in range(positive):
            last = tl.min(tl.where((share > 0) & (n > last), n, LENGTH), 0)
            ahead = (prefix + last).to(tl.int64) * token_stride
            token = tl.load(x + ahead, inside, other=0.0).to(tl.float32)
            mean += tl.sum(tl.where(n == last, share, 0.0), 0) * token
            if KEEP_NORM:
                largest = tl.maximum(largest, tl.sum(token * token, 0))
        if KEEP_NORM:
            square = tl.sum(mean * mean, 0)
            scale = tl.sqrt(largest) / tl.sqrt(tl.where(square > 0, square, 1.0))
            mean = tl.where((positive > 1) & (square > 0), mean * scale, mean)
        tl.store(merged, mean.to(merged.dtype.element_ty), inside)
