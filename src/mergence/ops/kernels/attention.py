"""Attention with a bias on the keys, and one row of it."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from mergence.ops.kernels._common import INTERPRETED, blocks, launch, power_of_2, product, rowwise


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """Attention with a bias on the keys; see `mergence.ops.attend`."""
    batch, heads, tokens, dim = q.shape
    q, k, v = rowwise(q), rowwise(k), rowwise(v)
    bias = rowwise(bias.expand(batch, 1, 1, tokens))
    # Tokens before heads in memory, as the projection that follows reads them.
    out = q.new_empty(batch, tokens, heads, dim)
    # Short blocks of keys leave registers for more programs at a time: found by trying on an H200.
    rows, columns = 64 if tokens > 32 else 32, 32
    launch(
        _attend,
        blocks(tokens, rows) * batch * heads,
        q,
        k,
        v,
        bias,
        out,
        tokens,
        heads,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        bias.stride(0),
        SCALE=dim**-0.5,
        DIM=dim,
        WIDTH=max(power_of_2(dim), 16),
        ROWS=rows,
        COLUMNS=columns,
        INTERPRETED=INTERPRETED,
        num_warps=4,
        num_stages=3,
    )
    return out.transpose(1, 2)


def attention_of_row(q: Tensor, k: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """Attention of one query; see `mergence.ops.attention_of_row`."""
    batch, heads, tokens, dim = k.shape
    q, k = rowwise(q), rowwise(k)
    if bias is not None:
        bias = rowwise(bias.expand(batch, 1, 1, tokens))
    out = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)
    length = power_of_2(tokens)
    launch(
        _attention_of_row,
        heads * batch,
        q,
        k,
        q if bias is None else bias,
        out,
        tokens,
        heads,
        dim,
        q.stride(0),
        q.stride(1),
        *k.stride()[:3],
        0 if bias is None else bias.stride(0),
        SCALE=scale,
        BIASED=bias is not None,
        LENGTH=length,
        # Blocks of so many numbers fit the registers of a program.
        CHUNK=max(min(power_of_2(dim), 64, 32768 // length), 8),
        num_warps=8,
    )
    return out


@triton.jit
def _attend(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    q_image: tl.tensor,
    q_head: tl.tensor,
    q_token: tl.tensor,
    k_image: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    v_image: tl.tensor,
    v_head: tl.tensor,
    v_token: tl.tensor,
    bias_image: tl.tensor,
    SCALE: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    INTERPRETED: tl.constexpr,
) -> None:
    program, along = tl.program_id(0), tl.cdiv(tokens, ROWS)
    image, head = program // along // heads, program // along % heads
    image, head = image.to(tl.int64), head.to(tl.int64)
    i, d = program % along * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    q += image * q_image + head * q_head
    k += image * k_image + head * k_head
    v += image * v_image + head * v_head
    bias += image * bias_image
    query = _tokens(q, i, q_token, tokens, DIM, WIDTH)
    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mean = tl.zeros([ROWS, WIDTH], tl.float32)
    # Powers of 2 are what the hardware computes.
    log2e: tl.constexpr = 1.4426950408889634
    for start in range(0, tokens, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        key = tl.trans(_tokens(k, j, k_token, tokens, DIM, WIDTH))
        value = _tokens(v, j, v_token, tokens, DIM, WIDTH)
        added = tl.load(bias + j, j < tokens, other=float("-inf")).to(tl.float32) * log2e
        logits = product(query, key, tl.zeros([ROWS, COLUMNS], tl.float32), INTERPRETED)
        logits = logits * (SCALE * log2e) + added[None, :]
        above = tl.maximum(highest, tl.max(logits, 1))
        # Where all keys so far are at minus infinity, their weights are 0 instead of NaN.
        level = tl.where(above == float("-inf"), 0.0, above)
        weight = tl.exp2(logits - level[:, None])
        fade = tl.exp2(highest - level)
        total = total * fade + tl.sum(weight, 1)
        mean = product(weight.to(value.dtype), value, mean * fade[:, None], INTERPRETED)
        highest = above
    mean = mean / total[:, None]
    tl.store(
        out + ((image * tokens + i[:, None]) * heads + head) * DIM + d[None, :],
        mean.to(out.dtype.element_ty),
        (i < tokens)[:, None] & (d < DIM)[None, :],
    )


@triton.jit
def _tokens(
    x: tl.tensor,
    n: tl.tensor,
    stride: tl.tensor,
    tokens: tl.tensor,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
) -> tl.tensor:
    """Rows n of one head; zeros from `tokens` on."""
    d = tl.arange(0, WIDTH)
    there = (n < tokens)[:, None]
    if DIM < WIDTH:
        there = there & (d < DIM)[None, :]
    return tl.load(x + n[:, None].to(tl.int64) * stride + d[None, :], there, other=0.0)


@triton.jit
def _attention_of_row(
    q: tl.tensor,
    k: tl.tensor,
    bias: tl.tensor,
    out: tl.tensor,
    tokens: tl.tensor,
    heads: tl.tensor,
    dim: tl.tensor,
    q_image: tl.tensor,
    q_head: tl.tensor,
    k_image: tl.tensor,
    k_head: tl.tensor,
    k_token: tl.tensor,
    bias_image: tl.tensor,
    SCALE: tl.constexpr,
    BIASED: tl.constexpr,
    LENGTH: tl.constexpr,
    CHUNK: tl.constexpr,
) -> None:
    program = tl.program_id(0)
    image, head = (program // heads).to(tl.int64), (program % heads).to(tl.int64)
    n = tl.arange(0, LENGTH)
    there = n < tokens
    q += image * q_image + head * q_head
    k += image * k_image + head * k_head
    logits = tl.zeros([LENGTH], tl.float32)
    for first in range(0, dim, CHUNK):
        d = first + tl.arange(0, CHUNK)
        query = tl.load(q + d, d < dim, other=0.0).to(tl.float32)
        key = tl.load(
            k + n[:, None].to(tl.int64) * k_token + d[None, :],
            there[:, None] & (d < dim)[None, :],
            other=0.0,
        )
        logits += tl.sum(key.to(tl.float32) * query[None, :], 1)
    logits *= SCALE
    if BIASED:
        logits += tl.load(bias + image * bias_image + n, there, other=0.0).to(tl.float32)
    logits = tl.where(there, logits, float("-inf"))
    weight = tl.exp(logits - tl.max(logits, 0))
    tl.store(out + (image * heads + head) * tokens + n, weight / tl.sum(weight, 0), there)
