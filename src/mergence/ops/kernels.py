"""Triton kernels. Importing this module imports Triton; see `mergence.ops.fused`.

Each program owns its part of the output and sums in a fixed order: there are no atomic operations,
and the same input gives the same output, bit for bit.
"""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from torch import Tensor

from mergence.plan import MergePlan

# Triton's interpreter keeps bfloat16 as integers and would multiply those.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def merge(x: Tensor, size: Tensor, plan: MergePlan, prefix: int) -> tuple[Tensor, Tensor]:
    """Merge tokens; see `mergence.ops.merge`."""
    batch, tokens, channels = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    merged = x.new_empty(batch, prefix + plan.slots, channels)
    merged_size = size.new_empty(batch, plan.slots)
    width = triton.next_power_of_2(channels)
    length = triton.next_power_of_2(tokens - prefix)
    _merge[(prefix + plan.slots, batch)](
        x,
        size.contiguous(),
        plan.slot.contiguous(),
        plan.weight.contiguous(),
        merged,
        merged_size,
        tokens - prefix,
        plan.slots,
        prefix,
        channels,
        x.stride(0),
        x.stride(1),
        LENGTH=length,
        WIDTH=width,
        KEEP_NORM=plan.keep_norm,
        # Within one warp sums are cheap, and most slots hold one or two tokens.
        num_warps=1 if max(width, length) <= 1024 else 4,
    )
    return merged, merged_size


def nearest(x: Tensor, scale: Tensor, score: Tensor, bound: Tensor) -> tuple[Tensor, Tensor]:
    """Find the nearest tokens; see `mergence.ops.fused`."""
    batch, tokens, channels = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    scale, score, bound = scale.contiguous(), score.contiguous(), bound.contiguous()
    cosine = torch.empty_like(scale)
    position = torch.empty_like(scale, dtype=torch.int64)
    block = 64 if tokens > 32 else 32
    _nearest[(triton.cdiv(tokens, block), batch)](
        x,
        scale,
        score,
        bound,
        cosine,
        position,
        tokens,
        channels,
        x.stride(0),
        x.stride(1),
        BLOCK=block,
        STEP=64 if x.element_size() == 2 else 32,
        INTERPRETED=_INTERPRETED,
        num_warps=4,
    )
    return cosine, position


@triton.jit
def _product(a: tl.tensor, b: tl.tensor, total: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


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
    row, image = tl.program_id(0), tl.program_id(1).to(tl.int64)
    channel = tl.arange(0, WIDTH)
    inside = channel < channels
    x += image * image_stride + channel
    merged += (image * (prefix + slots) + row) * channels + channel
    if row < prefix:
        tl.store(merged, tl.load(x + row * token_stride, inside), inside)
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
            token = tl.load(x + (prefix + last) * token_stride, inside, other=0.0).to(tl.float32)
            mean += tl.sum(tl.where(n == last, share, 0.0), 0) * token
            if KEEP_NORM:
                largest = tl.maximum(largest, tl.sum(token * token, 0))
        if KEEP_NORM:
            square = tl.sum(mean * mean, 0)
            scale = tl.sqrt(largest) / tl.sqrt(tl.where(square > 0, square, 1.0))
            mean = tl.where((positive > 1) & (square > 0), mean * scale, mean)
        tl.store(merged, mean.to(merged.dtype.element_ty), inside)


@triton.jit
def _nearest(
    x: tl.tensor,
    scale: tl.tensor,
    score: tl.tensor,
    bound: tl.tensor,
    cosine: tl.tensor,
    position: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    image_stride: tl.tensor,
    token_stride: tl.tensor,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    image = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = image * tokens + i
    own_scale = tl.load(scale + at, i < tokens, other=0.0)
    own_bound = tl.load(bound + at, i < tokens, other=0.0)
    best = tl.full([BLOCK], -2.0, tl.float32)
    where = i
    for start in range(0, tokens, BLOCK):
        j = start + tl.arange(0, BLOCK)
        other_scale = tl.load(scale + image * tokens + j, j < tokens, other=0.0)
        other_score = tl.load(score + image * tokens + j, j < tokens, other=0.0)
        dots = tl.zeros([BLOCK, BLOCK], tl.float32)
        for first in range(0, channels, STEP):
            c = first + tl.arange(0, STEP)
            inside = c < channels
            own = tl.load(
                x + image * image_stride + i[:, None] * token_stride + c[None, :],
                (i < tokens)[:, None] & inside[None, :],
                other=0.0,
            )
            other = tl.load(
                x + image * image_stride + j[None, :] * token_stride + c[:, None],
                (j < tokens)[None, :] & inside[:, None],
                other=0.0,
            )
            own = (own.to(tl.float32) * own_scale[:, None]).to(x.dtype.element_ty)
            other = (other.to(tl.float32) * other_scale[None, :]).to(x.dtype.element_ty)
            dots = _product(own, other, dots, INTERPRETED)
        # Rounded like the dense operator's matrix, so that the same tokens tie.
        dots = dots.to(x.dtype.element_ty).to(tl.float32)
        near = other_score[None, :] > own_bound[:, None]
        near |= (other_score[None, :] == own_bound[:, None]) & (j[None, :] < i[:, None])
        dots = tl.where(near & (j < tokens)[None, :], dots, -2.0)
        here = tl.max(dots, 1)
        # The first among equals, in this block and before it.
        first_here = tl.min(tl.where(dots == here[:, None], j[None, :], tokens), 1)
        where = tl.where(here > best, first_here, where)
        best = tl.maximum(best, here)
    tl.store(cosine + at, tl.minimum(tl.maximum(best, -1.0), 1.0), i < tokens)
    tl.store(position + at, where.to(tl.int64), i < tokens)
