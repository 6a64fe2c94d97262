"""The blocks of transformers' Vision Transformers, restated.

Written against transformers 5.23, whose attention takes an additive mask in its "sdpa" and "eager"
implementations alone.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor

from mergence import ops
from mergence.families._common import reduced_forward, refuse_mask
from mergence.families._transformers import CLIP, DINO, VIDEO, VIT, Layout
from mergence.state import Carry
from mergence.step import BlockStep


def attention(
    attn: Any, x: Tensor, bias: Tensor | None, position_embeddings: Any = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` of the library's attentions, restated because they do not give out q and k.

    Returns:
        The attention's output `[B, N, C]`, its queries and its keys `[B, H, N, D]`.
    """
    shape = (*x.shape[:-1], -1, attn.head_dim)
    q, k, v = (
        project(x).view(shape).transpose(1, 2)
        for project in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    if position_embeddings is not None:
        home = sys.modules[type(attn).__module__]
        q, k = home.apply_rotary_pos_emb(q, k, *position_embeddings)
    dropout = attn.attention_dropout if hasattr(attn, "attention_dropout") else attn.dropout
    y = _attend(attn, q, k, v, bias, dropout, **options)
    out = attn.o_proj if hasattr(attn, "o_proj") else attn.out_proj
    return out(y), q, k


def _attend(
    attn: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, dropout: float, **options: Any
) -> Tensor:
    """The library's own product of queries, keys and values `[B, H, N, D]`, `[B, N, H D]`.

    Where that is torch's with a mask, it is the operator that takes a bias on the keys.
    """
    dropout = dropout if attn.training else 0.0
    standard = scale_of(attn) == q.shape[3] ** -0.5
    if bias is not None and attn.config._attn_implementation == "sdpa" and standard:
        return ops.attend(q, k, v, bias, dropout).transpose(1, 2).flatten(2)
    home = sys.modules[type(attn).__module__]
    attend = home.ALL_ATTENTION_FUNCTIONS.get_interface(
        attn.config._attn_implementation, home.eager_attention_forward
    )
    y: Tensor = attend(attn, q, k, v, bias, dropout=dropout, scaling=scale_of(attn), **options)[0]
    return y.reshape(*y.shape[:2], -1).contiguous()


def scale_of(attn: Any) -> float:
    """The factor on the logits of an attention."""
    scale: float = attn.scaling if hasattr(attn, "scaling") else attn.scale
    return scale


def first_half(
    block: Any, layout: Layout, x: Tensor, bias: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` of the library's blocks up to the MLP, with the attention's q and k."""
    attn = getattr(block, layout.attention)
    y, q, k = attention(attn, getattr(block, layout.norms[0])(x), bias, **options)
    for name in layout.after[0]:
        y = getattr(block, name)(y)
    return x + y, q, k


def second_half(block: Any, layout: Layout, x: Tensor) -> Tensor:
    """`forward` of the library's blocks from there on."""
    y = block.mlp(getattr(block, layout.norms[1])(x))
    for name in layout.after[1]:
        y = getattr(block, name)(y)
    out: Tensor = x + y
    return out


class ReducedBlock:
    """Mixed into the library's blocks, by a subclass that says what they call their parts."""

    _mergence_layout: ClassVar[Layout]

    def forward(
        self: Any, hidden_states: Tensor, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor:
        """The block's forward, with fewer tokens after it where the schedule says so."""
        step: BlockStep = self._mergence
        dense: Any = super(ReducedBlock, self)
        if step.program.run.disabled:
            y: Tensor = dense.forward(hidden_states, attention_mask, **options)
            return y
        # While it is traced for export, the library writes out a mask that hides nothing.
        if not torch.compiler.is_compiling():
            refuse_mask(attention_mask)
        layout = self._mergence_layout

        def placed(known: Carry) -> dict[str, Any]:
            """The options, with the rotations of the tokens that there are."""
            rope = options.get("position_embeddings")
            if rope is None or known.position is None:
                return options
            rows = tuple(table[known.position].unsqueeze(1) for table in rope)
            return options | {"position_embeddings": rows}

        return reduced_forward(
            self,
            hidden_states,
            lambda x: dense.forward(x, None, **options),
            lambda x, known: first_half(self, layout, x, known.bias, **placed(known)),
            partial(second_half, self, layout),
            scale_of(getattr(self, layout.attention)),
        )


class ReducedViTBlock(ReducedBlock):
    """Mixed into the blocks of ViT and DeiT."""

    _mergence_layout = VIT


class ReducedDinoBlock(ReducedBlock):
    """Mixed into the blocks of DINOv2 and DINOv3."""

    _mergence_layout = DINO


class ReducedClipBlock(ReducedBlock):
    """Mixed into the blocks of CLIP and SigLIP."""

    _mergence_layout = CLIP


def first_half_of_video(
    block: Any, x: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`VideoMAELayer.forward` up to the MLP, with the attention's q and k."""
    attn, z = block.attention.attention, block.layernorm_before(x)
    shape = (*x.shape[:-1], -1, attn.attention_head_size)
    # In the library's order, in which the gradients of `z` are summed up, too.
    k, v, q = (
        project(z).view(shape).transpose(1, 2) for project in (attn.key, attn.value, attn.query)
    )
    y = _attend(attn, q, k, v, bias, attn.dropout_prob, is_causal=False)
    return block.attention.output(y, z) + x, q, k


def second_half_of_video(block: Any, x: Tensor) -> Tensor:
    """`VideoMAELayer.forward` from there on."""
    out: Tensor = block.output(block.intermediate(block.layernorm_after(x)), x)
    return out


class ReducedVideoBlock:
    """Mixed into the blocks of VideoMAE, whose forward has no way in for a bias on the keys."""

    _mergence_layout = VIDEO

    def forward(self: Any, hidden_states: Tensor, **options: Any) -> Tensor:
        """The block's forward, with fewer tokens after it where the schedule says so."""
        step: BlockStep = self._mergence
        dense: Any = super(ReducedVideoBlock, self)
        if step.program.run.disabled:
            y: Tensor = dense.forward(hidden_states, **options)
            return y
        return reduced_forward(
            self,
            hidden_states,
            lambda x: dense.forward(x, **options),
            lambda x, known: first_half_of_video(self, x, known.bias),
            partial(second_half_of_video, self),
            scale_of(self.attention.attention),
        )


BLOCK_MIXINS: dict[Layout, type] = {
    VIT: ReducedViTBlock,
    DINO: ReducedDinoBlock,
    CLIP: ReducedClipBlock,
    VIDEO: ReducedVideoBlock,
}
