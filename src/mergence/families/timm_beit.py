"""timm's `Beit`: BEiT and BEiT v2, whose attention adds a bias for every pair of places.

A merged token has the place of its most important patch, as with rotary positions, and so the
biases of that place; those of the class token are kept. The biases of the tokens that there are
differ from image to image: after the first reduction each block gathers `[B, H, P + N, P + N]` of
them. Written against timm 1.0.31.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from mergence.families._common import linear_macs, mean_by_size, reduced_forward
from mergence.families.timm import ReducedTrunk, Timm, sizes_to_pool
from mergence.families.timm_eva import packed_qkv, second_half
from mergence.state import Carry
from mergence.step import BlockStep

_BEIT = "timm.models.beit."


def attention(
    attn: Any, x: Tensor, own: Tensor | None, shared: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` of BEiT's `Attention`, restated because it does not give out its q and k.

    Args:
        attn: The attention.
        x: `[B, N, C]`.
        own: `[1 or B, H, N, N]`, its own bias for every pair of tokens, or None.
        shared: `[H, N, N]` or `[B, H, N, N]`, that of all blocks, or None.
        bias: `[B, 1, 1, N]`, that of the sizes, or None.

    Returns:
        The attention's output `[B, N, C]`, its queries and its keys `[B, H, N, D]`.
    """
    batch, tokens, _ = x.shape
    qkv = packed_qkv(attn, x).reshape(batch, tokens, 3, attn.num_heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    given = [each for each in (own, shared, bias) if each is not None]
    if attn.fused_attn:
        dropout = attn.attn_drop.p if attn.training else 0.0
        mask = sum(given[1:], given[0]) if given else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
    else:
        logits = sum(given, (q * attn.scale) @ k.transpose(-2, -1))
        y = attn.attn_drop(logits.softmax(dim=-1)) @ v
    out: Tensor = attn.proj_drop(attn.proj(y.transpose(1, 2).reshape(batch, tokens, -1)))
    return out, q, k


def first_half(
    block: Any, x: Tensor, shared: Tensor | None, known: Carry
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """BEiT's `Block.forward` up to the MLP, with the attention's q, k and its bias for pairs.

    Args:
        block: The block.
        x: `[B, 1 + N, C]`.
        shared: `[H, L, L]` the bias of all blocks for every pair of places, or None.
        known: What is known about the tokens.
    """
    attn, own = block.attn, None
    if attn.relative_position_bias_table is not None:
        own = placed(attn._get_rel_pos_bias(), known)
    shared = None if shared is None else placed(shared, known)
    y, q, k = attention(attn, block.norm1(x), own, shared, known.bias)
    y = y if block.gamma_1 is None else block.gamma_1 * y
    given = [each for each in (own, shared) if each is not None]
    pairs = sum(given[1:], given[0]) if given else None
    return x + block.drop_path1(y), q, k, pairs


def placed(pairs: Tensor, known: Carry) -> Tensor:
    """The biases `[B, H, 1 + N, 1 + N]` of the tokens that there are.

    Args:
        pairs: `[H, L, L]` or `[1, H, L, L]`, of the class token and all patches.
        known: What is known about the tokens.

    Returns:
        `pairs` itself before any reduction.
    """
    if known.position is None:
        return pairs
    place = F.pad(known.position + 1, (1, 0))  # the class token's is 0
    pairs = pairs.view(pairs.shape[-3:])
    return pairs[:, place.unsqueeze(2), place.unsqueeze(1)].transpose(0, 1).contiguous()


class ReducedBeitBlock:
    """Mixed into `timm.models.beit.Block`."""

    def forward(self: Any, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        """The block's forward, with fewer tokens after it where the schedule says so."""
        step: BlockStep = self._mergence
        dense: Any = super(ReducedBeitBlock, self)
        if step.disabled(x):
            y: Tensor = dense.forward(x, shared_rel_pos_bias)
            return y
        return reduced_forward(
            self,
            x,
            lambda x: dense.forward(x, shared_rel_pos_bias),
            lambda x, known: first_half(self, x, shared_rel_pos_bias, known),
            partial(second_half, self),
            self.attn.scale,
        )


class ReducedBeit(ReducedTrunk):
    """Mixed into `timm.models.beit.Beit`."""

    def forward_head(self: Any, x: Tensor, pre_logits: bool = False) -> Tensor:
        """The model's head, which averages a merged token as often as there are patches in it."""
        dense: Any = super(ReducedBeit, self)
        size = sizes_to_pool(self, x, self.global_pool == "avg")
        if size is None:
            y: Tensor = dense.forward_head(x, pre_logits)
            return y
        y = self.head_drop(self.fc_norm(mean_by_size(x[:, self.num_prefix_tokens :], size)))
        return y if pre_logits else self.head(y)


class TimmBeit(Timm):
    """timm's `Beit`."""

    name: ClassVar[str] = "timm_beit"
    models: ClassVar[tuple[str, ...]] = (_BEIT + "Beit",)
    supported: ClassVar[str] = "timm's Beit: BEiT and BEiT v2"
    refused: ClassVar[Mapping[str, str]] = {}
    block: ClassVar[tuple[str, ...]] = (_BEIT + "Block",)
    attention: ClassVar[tuple[str, ...]] = (_BEIT + "Attention",)
    block_mixin: ClassVar[type] = ReducedBeitBlock
    model_mixin: ClassVar[type[ReducedTrunk]] = ReducedBeit
    kinds: ClassVar[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
        "beit": (
            "beit_base_patch16_224",
            {"init_values": 0.3, "use_shared_rel_pos_bias": True},
        ),
    }

    def _attention_macs(self, attn: Any) -> int:
        return linear_macs(attn.qkv) + linear_macs(attn.proj)  # without the table of biases

    def _looks_at_places(self, model: Any) -> bool:
        tables = (b.attn.relative_position_bias_table for b in model.blocks)
        return model.rel_pos_bias is not None or any(table is not None for table in tables)


FAMILY = TimmBeit()
