"""The blocks of transformers' Vision Transformers, restated.

Written against transformers 5.23; 4.57 is the oldest that works.
"""

from __future__ import annotations

import sys
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mergence import ops
from mergence.families._common import reduced_forward, refuse_mask
from mergence.families._transformers import (
    AIM,
    CLIP,
    DINO,
    INTERN,
    POSE,
    SPLIT_VIT,
    VIT,
    Layout,
)
from mergence.families._transformers_releases import SPLIT_DINO, TUPLE_CLIP
from mergence.restoring import as_it_is
from mergence.state import Carry
from mergence.step import BlockStep

# Under which names the library hands masks to its blocks.
_MASKS = ("attention_mask", "head_mask", "causal_attention_mask")
# What attentions call their last projection.
_OUT = ("o_proj", "out_proj", "projection", "projection_layer")


def attention(
    attn: Any, x: Tensor, bias: Tensor | None, position_embeddings: Any = None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` of the library's attentions, restated because they do not give out q and k.

    Returns:
        The attention's output `[B, N, C]`, its queries and its keys `[B, H, N, D]`.
    """
    heads = (-1, attn.head_dim)
    if hasattr(attn, "qkv"):
        q, k, v = (y.unflatten(2, heads).transpose(1, 2) for y in attn.qkv(x).chunk(3, dim=-1))
    else:
        q, k, v = (
            getattr(attn, f"{name}_norm", as_it_is)(getattr(attn, f"{name}_proj")(x))
            .unflatten(2, heads)
            .transpose(1, 2)
            for name in "qkv"
        )
    if position_embeddings is not None:
        home = sys.modules[type(attn).__module__]
        q, k = home.apply_rotary_pos_emb(q, k, *position_embeddings)
    dropout = attn.attention_dropout if hasattr(attn, "attention_dropout") else attn.dropout
    y = attend(attn, q, k, v, bias, getattr(dropout, "p", dropout), **options)
    project = next(getattr(attn, name) for name in _OUT if hasattr(attn, name))
    return getattr(attn, "projection_dropout", as_it_is)(project(y)), q, k


def split_attention(attn: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """The same, of an attention in two modules."""
    first = attn.attention
    heads = (-1, first.attention_head_size)
    # In the library's order, in which the gradients of `x` are summed up, too.
    k, v, q = (
        project(x).unflatten(2, heads).transpose(1, 2)
        for project in (first.key, first.value, first.query)
    )
    # Where heads can be pruned, in transformers 4, "eager" multiplies by what it is given, a mask
    # of heads.
    fused = hasattr(attn, "pruned_heads")
    y = attend(first, q, k, v, bias, first.dropout_prob, fused=fused, is_causal=False)
    return attn.output(y, x), q, k


def attend(
    attn: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    dropout: float,
    *,
    fused: bool = False,
    **options: Any,
) -> Tensor:
    """The library's own product of queries, keys and values `[B, H, N, D]`, `[B, N, H D]`.

    Where that is torch's with a mask, or `fused` asks for it, it is the operator that takes a bias
    on the keys.
    """
    dropout, kernel = dropout if attn.training else 0.0, attn.config._attn_implementation
    standard = scale_of(attn) == q.shape[3] ** -0.5
    home = sys.modules[type(attn).__module__]
    # BLIP has no other way than to write it out, and so none of its own to take a bias.
    eager = getattr(home, "eager_attention_forward", None)
    if bias is not None and standard and (fused or eager is None or kernel == "sdpa"):
        return ops.attend(q, k, v, bias, dropout).transpose(1, 2).flatten(2)
    if eager is None:
        attend = _written_out
    else:  # `get_interface` is newer than the oldest release
        attend = eager if kernel == "eager" else home.ALL_ATTENTION_FUNCTIONS[kernel]
    y: Tensor = attend(attn, q, k, v, bias, dropout=dropout, scaling=scale_of(attn), **options)[0]
    return y.flatten(2).contiguous()


def _written_out(
    attn: Any,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    *,
    dropout: float,
    scaling: float,
    **options: Any,
) -> tuple[Tensor]:
    """The product, as attentions write it out that have no function for it."""
    logits = torch.matmul(q, k.transpose(-1, -2)) * scaling
    shares = F.dropout((logits if bias is None else logits + bias).softmax(dim=-1), dropout)
    return (torch.matmul(shares, v).transpose(1, 2),)


def scale_of(attn: Any) -> float:
    """The factor on the logits of an attention."""
    attn = getattr(attn, "attention", attn)
    scale: float = attn.scaling if hasattr(attn, "scaling") else attn.scale
    return scale


def first_half(
    block: Any, layout: Layout, x: Tensor, bias: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` of the library's blocks up to the MLP, with the attention's q and k."""
    attn, z = getattr(block, layout.attention), getattr(block, layout.norms[0])(x)
    # The two modules take no options.
    y, q, k = (
        split_attention(attn, z, bias) if layout.split else attention(attn, z, bias, **options)
    )
    return x + _through(block, layout.after[0], y), q, k


def second_half(block: Any, layout: Layout, x: Tensor, *expert: Tensor | None) -> Tensor:
    """`forward` of the library's blocks from there on."""
    first, *last = (getattr(block, name) for name in layout.mlp)
    y: Tensor = first(getattr(block, layout.norms[1])(x), *expert)
    y = _through(block, layout.after[1], y)
    out: Tensor = last[0](y, x) if last else x + y
    return out


def _through(block: Any, names: tuple[str, ...], y: Tensor) -> Tensor:
    """What modules of a block make of a tensor, or factors that are parameters of its own."""
    for name in names:
        part = getattr(block, name)
        y = part * y if isinstance(part, Tensor) else part(y)
    return y


class ReducedBlock:
    """Mixed into the library's blocks, by a subclass that says what they call their parts."""

    _mergence_layout: ClassVar[Layout]

    def forward(self: Any, hidden_states: Tensor, *masks: Tensor | None, **options: Any) -> Any:
        """The block's forward, with fewer tokens after it where the schedule says so."""
        step: BlockStep = self._mergence
        dense: Any = super(ReducedBlock, self)
        if step.disabled(hidden_states):
            return dense.forward(hidden_states, *masks, **options)
        layout = self._mergence_layout
        # The library does not look at the choice where there is one expert.
        expert = masks if layout.experts and self.num_experts > 1 else ()
        masks = () if layout.experts else masks
        named = {name: options.pop(name) for name in _MASKS if name in options}
        # While a graph is recorded, the library writes out a mask that hides nothing.
        tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
        if not torch.compiler.is_compiling() and not tracing:
            refuse_mask(*masks, *named.values())
        masks, named = (None,) * len(masks), dict.fromkeys(named)

        def whole(x: Tensor) -> Tensor:
            # Its own: torch 2.9 guards one from outside, where it compiles this function by itself.
            dense: Any = super(ReducedBlock, self)
            found = dense.forward(x, *expert, *masks, **named, **options)
            y: Tensor = found[0] if layout.tuples else found
            return y

        def placed(known: Carry) -> dict[str, Any]:
            """The options, with the rotations of the tokens that there are."""
            rope = options.get("position_embeddings")
            if rope is None or known.position is None:
                return options
            rows = tuple(table[known.position].unsqueeze(1) for table in rope)
            return options | {"position_embeddings": rows}

        y = reduced_forward(
            self,
            hidden_states,
            whole,
            lambda x, known: first_half(self, layout, x, known.bias, **placed(known)),
            lambda x: second_half(self, layout, x, *expert),
            scale_of(getattr(self, layout.attention)),
        )
        return (y,) if layout.tuples else y


class ReducedViTBlock(ReducedBlock):
    """Mixed into the blocks of ViT, DeiT and others of their layout."""

    _mergence_layout = VIT


class ReducedDinoBlock(ReducedBlock):
    """Mixed into the blocks of DINOv2 and DINOv3."""

    _mergence_layout = DINO


class ReducedClipBlock(ReducedBlock):
    """Mixed into the blocks of CLIP, SigLIP and others of their layout."""

    _mergence_layout = CLIP


class ReducedAimBlock(ReducedBlock):
    """Mixed into the blocks of AIMv2."""

    _mergence_layout = AIM


class ReducedInternBlock(ReducedBlock):
    """Mixed into the blocks of InternVL's vision tower."""

    _mergence_layout = INTERN


class ReducedSplitViTBlock(ReducedBlock):
    """Mixed into the blocks of VideoMAE, and those of ViT before transformers 5.9."""

    _mergence_layout = SPLIT_VIT


class ReducedPoseBlock(ReducedBlock):
    """Mixed into the blocks of ViTPose."""

    _mergence_layout = POSE


class ReducedSplitDinoBlock(ReducedBlock):
    """Mixed into the blocks of DINOv2 before transformers 5.18."""

    _mergence_layout = SPLIT_DINO


class ReducedTupleClipBlock(ReducedBlock):
    """Mixed into the blocks of CLIP in transformers 4."""

    _mergence_layout = TUPLE_CLIP


BLOCK_MIXINS: dict[Layout, type] = {
    mixin._mergence_layout: mixin
    for mixin in (
        ReducedViTBlock,
        ReducedDinoBlock,
        ReducedClipBlock,
        ReducedAimBlock,
        ReducedInternBlock,
        ReducedSplitViTBlock,
        ReducedPoseBlock,
        ReducedSplitDinoBlock,
        ReducedTupleClipBlock,
    )
}
