"""transformers' V-JEPA 2: the encoder of videos, and the classifier on it.

The classifier pools by blocks of its own, which attend to all tokens as well; they go on reducing
where the encoder's end. Its predictor, which wants a token for every patch, gets one for every
patch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from mergence.errors import ReducedOutputError, UnsupportedModelError
from mergence.families._common import (
    block_costs,
    linear_macs,
    pooling_costs,
    randomised,
    reduced_forward,
    refuse_mask,
    require_blocks,
)
from mergence.families._transformers import CLIP, full_name
from mergence.families._transformers_blocks import attend, scale_of
from mergence.families._transformers_blocks import first_half as pooling_half
from mergence.families._transformers_blocks import second_half as second_pooling_half
from mergence.families._transformers_towers import (
    grid_of,
    refuse_attentions,
    require_additive,
    whole,
    with_every_patch,
)
from mergence.family import Family, ModelSpec
from mergence.macs import ModelCost
from mergence.program import Program, require_own
from mergence.state import Carry, attach, attached
from mergence.step import BlockStep

_named = partial(full_name, "vjepa2")


def _attention(attn: Any, x: Tensor, known: Carry) -> tuple[Tensor, Tensor, Tensor]:
    """`VJEPA2RopeAttention.forward`, restated because it does not give out its q and k.

    Returns:
        The attention's output `[B, N, C]`, its queries and its keys `[B, H, N, D]`.
    """
    shape = (*x.shape[:2], -1, attn.attention_head_size)
    q, k, v = (
        project(x).view(shape).transpose(1, 2) for project in (attn.query, attn.key, attn.value)
    )
    places = _places(attn, x, known.position)
    k = attn.apply_rotary_embeddings(k, places)
    q = attn.apply_rotary_embeddings(q, places)
    # The library's own "eager" leaves out what is added to the logits.
    y = attend(attn, q, k, v, known.bias, attn.dropout_prob, fused=True, is_causal=False)
    return attn.proj(y), q, k


def _places(attn: Any, x: Tensor, position: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Frame, row and column of each token, as the library's rotations take them."""
    if position is None:
        places: tuple[Tensor, Tensor, Tensor] = attn.get_position_ids(x)
        return places
    patch = position.unsqueeze(1)  # the library itself repeats it for every head
    return attn._get_frame_pos(patch), attn._get_height_pos(patch), patch % attn.grid_size


def _first_half(block: Any, x: Tensor, known: Carry) -> tuple[Tensor, Tensor, Tensor]:
    """`forward` of the encoder's and the pooler's blocks up to the MLP, with q and k."""
    if hasattr(block, "self_attn"):
        return pooling_half(block, CLIP, x, known.bias, fused=True, is_causal=False)
    y, q, k = _attention(block.attention, block.norm1(x), known)
    return block.drop_path(y) + x, q, k


def _second_half(block: Any, x: Tensor) -> Tensor:
    """`forward` of these blocks from there on."""
    if hasattr(block, "self_attn"):
        return second_pooling_half(block, CLIP, x)
    y: Tensor = block.drop_path(block.mlp(block.norm2(x))) + x
    return y


class ReducedLayer:
    """Mixed into the blocks of the encoder and of the pooler."""

    def forward(self: Any, hidden_states: Tensor, *masks: Any, **options: Any) -> Any:
        """The block's forward, with fewer tokens after it where the schedule says so."""
        step: BlockStep = self._mergence
        dense: Any = super(ReducedLayer, self)
        if step.disabled(hidden_states):
            return dense.forward(hidden_states, *masks, **options)
        refuse_mask(*masks, options.get("attention_mask"), options.get("position_mask"))
        y = reduced_forward(
            self,
            hidden_states,
            lambda x: dense.forward(x, *masks, **options)[0],
            partial(_first_half, self),
            partial(_second_half, self),
            scale_of(_attention_of(self)),
        )
        return y, None


class ReducedVJEPA2:
    """Mixed into `VJEPA2Model`, alone and in a classifier."""

    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        """The model's forward, as one run."""
        dense: Any = super(ReducedVJEPA2, self)
        program: Program = self._mergence
        run = program.run
        video = inputs[0] if inputs else options.get("pixel_values_videos")
        if run.disabled or video is None:  # without a video the library says what is missing
            return whole(dense.forward(*inputs, **options))
        require_additive(self.config, ReducedOutputError)
        refuse_attentions(self.config, options)
        grid = _grid(self.config, video.shape)
        program.tokens(math.prod(grid))  # refuses a size at which it cannot be followed
        states = options.get("output_hidden_states", self.config.output_hidden_states)
        with run.forward(grid, every_patch=states or run.head is None):
            return dense.forward(*inputs, **options)


class ReducedClassifier(ReducedVJEPA2):
    """Mixed into `VJEPA2ForVideoClassification`, whose pooler knows sizes."""

    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        """The model's forward, as one run."""
        program: Program = self._mergence
        require_own(program, self)
        with program.run.under("sized"):
            return super().forward(*inputs, **options)


class ReducedEncoder:
    """Mixed into the encoder of a `VJEPA2Model`, whose masks and predictor count patches.

    Those of a classifier do not run.
    """

    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        """The encoder's forward, with a token for every patch."""
        dense: Any = super(ReducedEncoder, self)
        program: Program = self._mergence
        require_own(program, self.layer)
        outputs = dense.forward(*inputs, **options)
        run = program.run
        known = run.known_after(self.layernorm)
        if not run.disabled and run.head is None:
            outputs.last_hidden_state = with_every_patch(outputs.last_hidden_state, known, prefix=0)
        return outputs


class ReducedCrossLayer:
    """Mixed into the last block of the pooler, in which its query reads the tokens."""

    def forward(self: Any, queries: Tensor, hidden_state: Tensor, *masks: Any, **named: Any) -> Any:
        """The block's forward, in which a token counts as often as the patches in it."""
        dense: Any = super(ReducedCrossLayer, self)
        run = self._mergence.run
        known = run.known() or attached(hidden_state)
        if run.disabled or known is None or known.size is None:
            return dense.forward(queries, hidden_state, *masks, **named)
        attach(hidden_state, known)  # gradient checkpointing calls again when the run is over
        attn, z = self.cross_attn, self.layer_norm1(hidden_state)
        q, k, v = (
            project(x).unflatten(2, (-1, attn.head_dim)).transpose(1, 2)
            for project, x in ((attn.q_proj, queries), (attn.k_proj, z), (attn.v_proj, z))
        )
        bias = known.size.log()[:, None, None].to(q.dtype)
        dropout = attn.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, dropout_p=dropout)
        y = queries + y.transpose(1, 2).flatten(2)
        return y + self.mlp(self.layer_norm2(y)), None


class TransformersVJEPA2(Family):
    """transformers' `VJEPA2Model` and `VJEPA2ForVideoClassification`."""

    name: ClassVar[str] = "transformers_vjepa2"
    models: ClassVar[tuple[str, ...]] = (
        _named("VJEPA2Model"),
        _named("VJEPA2ForVideoClassification"),
    )
    supported: ClassVar[str] = "transformers' V-JEPA 2, alone and with a classifier"
    oldest: ClassVar[str] = "5.6"

    def inspect(self, model: Any) -> ModelSpec:
        """Read a model of transformers; see `Family.inspect`."""
        require_additive(model.config, UnsupportedModelError)
        pooler = getattr(model, "pooler", None)
        tower = model if pooler is None else model.vjepa2
        encoder = tower.encoder
        pooling = () if pooler is None else tuple(pooler.self_attention_layers)
        attention = "attention", _named("VJEPA2RopeAttention")
        require_blocks(model, encoder.layer, _named("VJEPA2Layer"), attention, self.supported)
        attention = "self_attn", _named("VJEPA2PoolerSelfAttention")
        block, first = _named("VJEPA2PoolerSelfAttentionLayer"), 1 + len(encoder.layer)
        require_blocks(model, pooling, block, attention, self.supported, first)
        parts: list[tuple[nn.Module, type]] = [(tower, ReducedVJEPA2), (encoder, ReducedEncoder)]
        if pooler is not None:
            last = pooler.cross_attention_layer
            parts += [(model, ReducedClassifier), (last, ReducedCrossLayer)]
        config = model.config
        return ModelSpec(
            blocks=(*encoder.layer, *pooling),
            patches=math.prod(_grid(config, self.input_shape(model))),
            cost=_cost(model, encoder, pooler),
            block_mixin=ReducedLayer,
            parts=tuple(parts),
            classes=0 if pooler is None else model.num_labels,
        )

    def tiny(self) -> Mapping[str, Callable[[], nn.Module]]:
        """A tiny random classifier.

        `tests/families/test_transformers_vjepa2.py` has the model without one: the predictor looks
        at the values of its masks, which torch.compile does not follow.
        """
        return {"vjepa2": lambda: tiny_model("VJEPA2ForVideoClassification", num_hidden_layers=4)}

    def input_shape(self, model: Any) -> tuple[int, ...]:
        """The shape of one video of a model's own size."""
        config = model.config
        return config.frames_per_clip, config.in_chans, config.crop_size, config.crop_size


def tiny_model(cls: str, **options: Any) -> nn.Module:
    """A tiny random model for videos of 36 patches: four pairs of frames of 3 x 3."""
    import transformers

    size = {
        "hidden_size": 48,
        "num_attention_heads": 3,
        "num_hidden_layers": 6,
        "num_pooler_layers": 2,
        "pred_hidden_size": 24,
        "pred_num_attention_heads": 2,
        "pred_num_hidden_layers": 1,
        "pred_num_mask_tokens": 2,
        "crop_size": 96,
        "patch_size": 32,
        "frames_per_clip": 8,
        "num_labels": 5,
    }
    model: nn.Module = getattr(transformers, cls)(transformers.VJEPA2Config(**size | options))
    return randomised(model).eval()


def _attention_of(block: Any) -> Any:
    return block.self_attn if hasattr(block, "self_attn") else block.attention


def _grid(config: Any, shape: Any) -> tuple[int, int]:
    """Patch rows and columns of videos of a shape; its frames lie below each other."""
    # The library repeats a video that is shorter than one tubelet.
    frames = max(shape[-4], config.tubelet_size)
    return grid_of(config, (frames, *shape[-3:]))


def _cost(model: Any, encoder: Any, pooler: Any) -> ModelCost:
    config, head, per_token = model.config, 0, 0
    width = config.hidden_size
    blocks = block_costs(encoder.layer, "attention", ("mlp",), width)
    if pooler is not None:
        blocks += block_costs(pooler.self_attention_layers, "self_attn", ("mlp",), width)
        head, per_token = pooling_costs(pooler.cross_attention_layer, width)
        head += linear_macs(model.classifier)
    return ModelCost(
        blocks=blocks,
        prefix=0,
        dim=width,
        head_dim=width // config.num_attention_heads,
        stem=encoder.embeddings.patch_embeddings.proj.weight.numel(),
        head=head,
        head_per_token=per_token,
        placed=True,
    )


FAMILY = TransformersVJEPA2()
