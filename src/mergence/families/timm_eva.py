"""timm's `Eva`: EVA-02, DINOv3 and other Vision Transformers with rotary positions.

Queries and keys are turned by the place of their token in every block. A merged token has the place
of its most important patch. Written against timm 1.0.31.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mergence.families._common import reduced_forward, refuse_mask
from mergence.families.timm import ReducedModel, ReducedTrunk, Timm, attend, gate_of
from mergence.state import Carry
from mergence.step import BlockStep

_EVA = "timm.models.eva."


def attention(
    attn: Any, x: Tensor, rope: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`EvaAttention.forward` and `AttentionRope.forward`, which do not give out their q and k.

    Returns:
        The attention's output `[B, N, C]`, its queries and its keys `[B, H, N, D]`, turned.
    """
    from timm.layers import apply_rot_embed_cat

    gate = gate_of(attn, x)
    if attn.qkv is None:
        head_dim = attn.q_proj.out_features // attn.num_heads
        q, k, v = (
            project(x).unflatten(2, (-1, head_dim)).transpose(1, 2)
            for project in (attn.q_proj, attn.k_proj, attn.v_proj)
        )
    else:
        qkv: Any = packed_qkv(attn, x)
        q, k, v = qkv.unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    if rope is not None:
        prefix, half = attn.num_prefix_tokens, attn.rotate_half

        def turned(z: Tensor) -> Tensor:
            patches = apply_rot_embed_cat(z[:, :, prefix:], rope, half=half)
            return torch.cat((z[:, :, :prefix], patches), dim=2).type_as(v)

        q, k = turned(q), turned(k)
    if (groups := getattr(attn, "num_kv_groups", 1)) > 1:
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    return attend(attn, q, k, v, bias, gate), q, k


def packed_qkv(attn: Any, x: Tensor) -> Tensor:
    """The packed projection; EVA's keys have no bias of their own."""
    if getattr(attn, "q_bias", None) is None:
        packed: Tensor = attn.qkv(x)
        return packed
    bias = torch.cat((attn.q_bias, attn.k_bias, attn.v_bias))
    if attn.qkv_bias_separate:
        packed = attn.qkv(x)
        return packed + bias
    return F.linear(x, attn.qkv.weight, bias)


def first_half(
    block: Any, x: Tensor, rope: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`EvaBlock.forward` up to the MLP, with the attention's q and k."""
    y, q, k = attention(block.attn, block.norm1(x), rope, bias)
    y = y if block.gamma_1 is None else block.gamma_1 * y
    return x + block.drop_path1(y), q, k


def second_half(block: Any, x: Tensor) -> Tensor:
    """`EvaBlock.forward` from there on."""
    y = block.mlp(block.norm2(x))
    y = y if block.gamma_2 is None else block.gamma_2 * y
    z: Tensor = x + block.drop_path2(y)
    return z


def placed(rope: Tensor | None, known: Carry) -> Tensor | None:
    """The rotations of the tokens that there are.

    Args:
        rope: `[N, D]`, or `[H, N, D]` where every head has its own, of all patches.
        known: What is known about the tokens.

    Returns:
        The same before any reduction; then `[B, 1, N, D]` or `[B, H, N, D]`.
    """
    if rope is None or known.position is None:
        return rope
    rows = rope[..., known.position, :]
    return rows.unsqueeze(1) if rope.ndim == 2 else rows.transpose(0, 1)


class ReducedEvaBlock:
    """Mixed into `timm.models.eva.EvaBlock`."""

    def forward(
        self: Any,
        x: Tensor,
        rope: Tensor | None = None,
        *masks: Any,
        **named: Any,
    ) -> Tensor:
        """The block's forward, with fewer tokens after it where the schedule says so."""
        step: BlockStep = self._mergence
        dense: Any = super(ReducedEvaBlock, self)
        if step.disabled(x):
            y: Tensor = dense.forward(x, rope, *masks, **named)
            return y
        refuse_mask(*masks, *named.values())
        return reduced_forward(
            self,
            x,
            lambda x: dense.forward(x, rope=rope),
            lambda x, known: first_half(self, x, placed(rope, known), known.bias),
            partial(second_half, self),
            self.attn.scale,
        )


class TimmEva(Timm):
    """timm's `Eva`."""

    name: ClassVar[str] = "timm_eva"
    models: ClassVar[tuple[str, ...]] = (_EVA + "Eva",)
    supported: ClassVar[str] = (
        "timm's Eva: EVA, EVA-02, DINOv3, Perception Encoder and other ViTs with rotary positions"
    )
    refused: ClassVar[Mapping[str, str]] = {}
    block: ClassVar[tuple[str, ...]] = (_EVA + "EvaBlock",)
    attention: ClassVar[tuple[str, ...]] = (
        _EVA + "EvaAttention",
        "timm.layers.attention.AttentionRope",
    )
    block_mixin: ClassVar[type] = ReducedEvaBlock
    model_mixin: ClassVar[type[ReducedTrunk]] = ReducedModel
    kinds: ClassVar[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
        "eva02": ("eva02_tiny_patch14_224", {}),
        "eva02_scaled": ("eva02_base_patch14_224", {"init_values": 0.3}),
        "dinov3": ("vit_small_patch16_dinov3", {"init_values": 0.3}),
        "rope_mixed": ("vit_small_patch16_rope_mixed_224", {"init_values": 0.3}),
        "perception_encoder": ("vit_pe_core_tiny_patch16_384", {"num_classes": 5}),
    }


FAMILY = TimmEva()
