"""The nearest tokens: cosines tile by tile, of which only the largest of each row is kept."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mergence.ops.kernels._common import INTERPRETED, blocks, launch, power_of_2, product, rowwise


def scales(x: Tensor) -> Tensor:
    """One over the norm of each token; see `mergence.ops.operators`."""
    batch, tokens, channels = x.shape
    x = rowwise(x)
    scale = torch.empty(batch, tokens, dtype=torch.float32, device=x.device)
    rows, width = 8, power_of_2(channels)
    launch(
        _scales,
        blocks(tokens, rows) * batch,
        x,
        scale,
        tokens,
        channels,
        x.stride(0),
        x.stride(1),
        ROWS=rows,
        WIDTH=width,
        num_warps=4,
    )
    return scale


def nearest_above(x: Tensor, scale: Tensor, score: Tensor) -> Tensor:
    """The cosine to the nearest token of higher score; see `mergence.ops.operators`."""
    batch, tokens, channels = x.shape
    x, score = rowwise(x), score.contiguous()
    cosine = torch.empty_like(scale)
    tile = _tile(x, tokens, tokens)
    launch(
        _nearest_above,
        blocks(tokens, tile["ROWS"]) * batch,
        x,
        scale,
        score,
        cosine,
        tokens,
        channels,
        x.stride(0),
        x.stride(1),
        **tile,
    )
    return cosine


def nearest(x: Tensor, scale: Tensor, of: Tensor, among: Tensor) -> Tensor:
    """The nearest of some tokens to each of others; see `mergence.ops.operators`."""
    batch, tokens, channels = x.shape
    x, of, among = rowwise(x), rowwise(of), rowwise(among)
    found = torch.empty_like(of, memory_format=torch.contiguous_format)
    if not found.numel():
        return found
    tile = _tile(x, of.shape[1], among.shape[1])
    launch(
        _nearest,
        blocks(of.shape[1], tile["ROWS"]) * batch,
        x,
        scale,
        of,
        among,
        found,
        tokens,
        of.shape[1],
        among.shape[1],
        channels,
        x.stride(0),
        x.stride(1),
        of.stride(0),
        among.stride(0),
        **tile,
    )
    return found


def _tile(x: Tensor, rows: int, columns: int) -> dict[str, int]:
    """How a kernel goes through so many rows and columns of cosines.

    Found by trying on an H200, where larger tiles are no faster.
    """
    return {
        "ROWS": 64 if rows > 32 else 32,
        "COLUMNS": 128 if columns > 64 else 64 if columns > 32 else 32,
        "STEP": 64 if x.element_size() == 2 else 32,
        "INTERPRETED": INTERPRETED,
        "num_warps": 4,
        "num_stages": 3,
    }


@triton.jit
def _scales(
    x: tl.tensor,
    scale: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    image_stride: tl.tensor,
    token_stride: tl.tensor,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
) -> None:
    block, image = _place(tokens, ROWS)
    i, c = block * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    token = tl.load(
        x + image * image_stride + i[:, None].to(tl.int64) * token_stride + c[None, :],
        (i < tokens)[:, None] & (c < channels)[None, :],
        other=0.0,
    ).to(tl.float32)
    norm = tl.sqrt(tl.sum(token * token, 1))
    tl.store(scale + image * tokens + i, 1.0 / tl.maximum(norm, 1e-12), i < tokens)


@triton.jit
def _place(n: tl.tensor, ROWS: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """Which block of n rows a program is for, and of which image."""
    along = tl.cdiv(n, ROWS)
    return tl.program_id(0) % along, (tl.program_id(0) // along).to(tl.int64)


@triton.jit
def _cosines(
    x: tl.tensor,
    scale: tl.tensor,
    i: tl.tensor,
    j: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    token_stride: tl.tensor,
    STEP: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> tl.tensor:
    """Cosines of tokens i to tokens j of one image; positions from `tokens` on yield 0.

    Rounded to the type of x like the other implementations' matrix, so that the same tokens tie.
    """
    dots = tl.zeros([i.shape[0], j.shape[0]], tl.float32)
    for first in range(0, channels, STEP):
        c = first + tl.arange(0, STEP)
        inside = c < channels
        own = tl.load(
            x + i[:, None].to(tl.int64) * token_stride + c[None, :],
            (i < tokens)[:, None] & inside[None, :],
            other=0.0,
        )
        other = tl.load(
            x + j[None, :].to(tl.int64) * token_stride + c[:, None],
            (j < tokens)[None, :] & inside[:, None],
            other=0.0,
        )
        dots = product(own, other, dots, INTERPRETED)
    dots *= tl.load(scale + i, i < tokens, other=0.0)[:, None]
    dots *= tl.load(scale + j, j < tokens, other=0.0)[None, :]
    return dots.to(x.dtype.element_ty).to(tl.float32)


@triton.jit
def _nearest_above(
    x: tl.tensor,
    scale: tl.tensor,
    score: tl.tensor,
    cosine: tl.tensor,
    tokens: tl.tensor,
    channels: tl.tensor,
    image_stride: tl.tensor,
    token_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    block, image = _place(tokens, ROWS)
    x += image * image_stride
    scale += image * tokens
    score += image * tokens
    i = block * ROWS + tl.arange(0, ROWS)
    own = tl.load(score + i, i < tokens, other=0.0)
    own = tl.where(own == own, own, float("-inf"))
    best = tl.full([ROWS], -1.0, tl.float32)
    for start in range(0, tokens, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        other = tl.load(score + j, j < tokens, other=0.0)
        other = tl.where(other == other, other, float("-inf"))
        dots = _cosines(x, scale, i, j, tokens, channels, token_stride, STEP, INTERPRETED)
        above = other[None, :] > own[:, None]
        above |= (other[None, :] == own[:, None]) & (j[None, :] < i[:, None])
        dots = tl.where(above & (j < tokens)[None, :], dots, -1.0)
        best = tl.maximum(best, tl.max(dots, 1))
    tl.store(cosine + image * tokens + i, tl.minimum(best, 1.0), i < tokens)


@triton.jit
def _nearest(
    x: tl.tensor,
    scale: tl.tensor,
    of: tl.tensor,
    among: tl.tensor,
    found: tl.tensor,
    tokens: tl.tensor,
    asked: tl.tensor,
    offered: tl.tensor,
    channels: tl.tensor,
    image_stride: tl.tensor,
    token_stride: tl.tensor,
    of_stride: tl.tensor,
    among_stride: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STEP: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    block, image = _place(asked, ROWS)
    x += image * image_stride
    scale += image * tokens
    of += image * of_stride
    among += image * among_stride
    row = block * ROWS + tl.arange(0, ROWS)
    i = tl.load(of + row, row < asked, other=tokens).to(tl.int32)
    best = tl.full([ROWS], -3.0, tl.float32)
    where = tl.zeros([ROWS], tl.int32)
    for start in range(0, offered, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        j = tl.load(among + column, column < offered, other=tokens).to(tl.int32)
        dots = _cosines(x, scale, i, j, tokens, channels, token_stride, STEP, INTERPRETED)
        dots = tl.where((column < offered)[None, :], dots, -2.0)
        here = tl.max(dots, 1)
        # The first among equals, in this block and before it.
        first = tl.min(tl.where(dots == here[:, None], column[None, :], offered), 1)
        where = tl.where(here > best, first, where)
        best = tl.maximum(best, here)
    tl.store(found + image * asked + row, where.to(tl.int64), row < asked)
