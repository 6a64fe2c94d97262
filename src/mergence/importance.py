"""How much the model looks at each token.

Importance is O(N): one query row, never an N x N map. Attention received from all tokens needs the
map, and is here for the one baseline that is defined by it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergence import ops


def attention_from(query: Tensor, keys: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Attention that a query pays to every token, averaged over heads.

    With the class token's query this is exactly row 0 of the attention map (EViT, arXiv 2202.07800,
    section 3.1). Models without a class token use the mean query of all tokens instead, which is
    our substitute; no paper is followed there.

    Args:
        query: `[B, H, 1, D]`.
        keys: `[B, H, N, D]`.
        scale: Factor on the logits, usually `D ** -0.5`.
        bias: What the block's own attention adds to its logits, `[B, 1, 1, N]` or what else
            is broadcast to `[B, H, 1, N]`, or None.

    Returns:
        `[B, N]` float32, each row sums to 1.
    """
    return ops.attention_of_row(query, keys, scale, bias).mean(dim=1)


def attention_received(
    queries: Tensor, keys: Tensor, scale: float, bias: Tensor | None = None
) -> Tensor:
    """Attention that every token receives from all tokens, averaged over heads.

    This repeats the query-key product of the block's own attention, as fused kernels do not give
    their map away. One head at a time, so that the memory is that of one N x N map per image.

    Args:
        queries: `[B, H, N, D]`.
        keys: `[B, H, N, D]`.
        scale: As in `attention_from`.
        bias: As in `attention_from`.

    Returns:
        `[B, N]` float32, each row sums to 1.
    """

    def by(head: int) -> Tensor:
        logits = (queries[:, head] @ keys[:, head].transpose(-2, -1)).float() * scale
        if bias is not None:
            logits = logits + bias[..., head if bias.shape[-3] > 1 else 0, :, :]
        return logits.softmax(dim=-1).mean(dim=1)

    return torch.stack([by(head) for head in range(queries.shape[1])]).mean(dim=0)
