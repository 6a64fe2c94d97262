"""Attention as two products, on CPUs on which torch's fused attention takes longer.

In bfloat16 on an AMD EPYC with AVX-512 that takes up to two and a half times as long; see
docs/benchmarking.md.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

# Intel's AMX multiplies tiles, and torch's fused attention uses it.
VECTORS = torch.cpu._is_avx512_bf16_supported() and not torch.cpu._is_amx_tile_supported()
"""Whether the processor multiplies vectors of bfloat16 and no tiles of them."""
AT_A_TIME = 1 << 21
"""Bytes of logits that are computed at a time, which then stay in the cache."""


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """See `mergence.ops.attend`.

    Args:
        q: `[B, H, N, D]`.
        k: The same shape.
        v: The same shape.
        bias: On the keys, `[B, 1, 1, N]`.
    """
    batch, heads, tokens, dim = q.shape
    q, k, v = (x.reshape(batch * heads, tokens, dim) for x in (q, k, v))
    bias = bias.to(q.dtype).expand(batch, heads, 1, tokens).reshape(batch * heads, 1, tokens)
    number = max(1, AT_A_TIME // (tokens * tokens * q.element_size()))
    found = []
    for first in range(0, batch * heads, number):
        part = slice(first, first + number)
        logits = torch.baddbmm(bias[part], q[part], k[part].mT, alpha=dim**-0.5)
        found.append(logits.softmax(dim=-1) @ v[part])
    return torch.cat(found).view(batch, heads, tokens, dim)


@custom_op("mergence::attend_by_products", mutates_args=())
def in_graph(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """The same where torch.compile makes a graph, which then holds for any number of images."""
    return attend(q, k, v, bias)


@in_graph.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    return q.new_empty(q.shape)
