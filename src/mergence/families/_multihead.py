"""torch's `nn.MultiheadAttention`, which torchvision and open_clip have in their blocks."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.prune import BasePruningMethod

from mergence import ops
from mergence.errors import ReducedOutputError
from mergence.family import qualified_names

MULTIHEAD = "torch.nn.modules.activation.MultiheadAttention"


def attention(attn: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`nn.MultiheadAttention` of `x` with itself, restated because it does not give out q and k.

    It is bit-identical to what torch does where gradients may be needed. Without gradients and
    without a mask torch takes a fused kernel of its own, which sums in another order.

    Args:
        attn: The module, batch first.
        x: `[B, N, C]`.
        bias: `[B, 1, 1, N]`, added to the logits, or None.

    Returns:
        The attention's output `[B, N, C]`, its queries and its keys `[B, H, N, D]`.

    Raises:
        ReducedOutputError: The module is not torch's any more.
    """
    if type(attn).forward is not nn.MultiheadAttention.forward:
        raise ReducedOutputError(
            f"An attention is a {qualified_names(type(attn))[0]} now, and mergence computes with "
            f"the weights of a {MULTIHEAD}: what this one adds, such as adapters, would be left "
            "out. Merge adapters into the weights first (peft: merge_and_unload), or use "
            "mergence.disabled(model)."
        )
    for hook in attn._forward_pre_hooks.values():
        if isinstance(hook, BasePruningMethod):  # it sets weights before each forward
            hook(attn, (x, x, x))
    batch, tokens, width = x.shape
    heads = attn.num_heads
    # Tokens first, as torch has them: another layout would be multiplied in another order.
    packed = F.linear(x.transpose(0, 1), attn.in_proj_weight, attn.in_proj_bias)
    q, k, v = (
        part.contiguous().view(tokens, batch, heads, width // heads).permute(1, 2, 0, 3)
        for part in packed.chunk(3, dim=-1)
    )
    dropout = attn.dropout if attn.training else 0.0
    y = ops.attend(q, k, v, bias, dropout)
    y = y.permute(2, 0, 1, 3).contiguous().view(tokens * batch, width)
    y = F.linear(y, attn.out_proj.weight, attn.out_proj.bias)
    return y.view(tokens, batch, width).transpose(0, 1), q, k


def scale_of(attn: Any) -> float:
    """The factor on the logits of an `nn.MultiheadAttention`."""
    scale: float = attn.head_dim**-0.5
    return scale
