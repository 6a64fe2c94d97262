"""How much the model looks at each token, in O(N): one query row, never an N x N map."""

from __future__ import annotations

from torch import Tensor


def attention_from(query: Tensor, keys: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Attention that one query pays to every token, averaged over heads.

    With the class token's query this is exactly row 0 of the attention map (EViT, arXiv 2202.07800,
    section 3.1). Models without a class token use the mean query of all tokens instead, which is
    our substitute; no paper is followed there.

    Args:
        query: `[B, H, 1, D]`.
        keys: `[B, H, N, D]`.
        scale: Factor on the logits, usually `D ** -0.5`.
        bias: Size bias `[B, 1, 1, N]` that the block's own attention uses, or None.

    Returns:
        `[B, N]` float32, each row sums to 1.
    """
    logits = (query @ keys.transpose(-2, -1)).float() * scale
    if bias is not None:
        logits = logits + bias
    return logits.softmax(dim=-1).mean(dim=1).squeeze(1)
