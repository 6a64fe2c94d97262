"""transformers' Vision Transformers: ViT, DeiT, DINOv2, DINOv3, CLIP and SigLIP.

Written against transformers 5.23, whose attention takes an additive mask in its "sdpa" and "eager"
implementations alone. What the library calls a model is here the *tower* (`ViTModel`,
`CLIPVisionModel`), and what it puts around one (`ViTForImageClassification`, `CLIPModel`) a
*container*; both can be reduced.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mergence.errors import ReducedOutputError, UnsupportedModelError
from mergence.families._common import (
    Reduce,
    linear_macs,
    reduced_forward,
    refuse_mask,
    require_class,
)
from mergence.families._transformers import (
    CLIP,
    CONTAINERS,
    DINO,
    REFUSED,
    TOWERS,
    VIT,
    Layout,
    Tower,
    tiny_models,
)
from mergence.family import Family, ModelSpec, qualified_names
from mergence.macs import BlockCost, ModelCost
from mergence.state import Carry, Run, attach
from mergence.step import BlockStep, Program
from mergence.surgery import original_class

_ADDITIVE = ("sdpa", "eager")


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
    home = sys.modules[type(attn).__module__]
    if position_embeddings is not None:
        q, k = home.apply_rotary_pos_emb(q, k, *position_embeddings)
    attend = home.ALL_ATTENTION_FUNCTIONS.get_interface(
        attn.config._attn_implementation, home.eager_attention_forward
    )
    dropout = attn.attention_dropout if hasattr(attn, "attention_dropout") else attn.dropout
    dropout = dropout if attn.training else 0.0
    y, _ = attend(attn, q, k, v, bias, dropout=dropout, scaling=scale_of(attn), **options)
    out = attn.o_proj if hasattr(attn, "o_proj") else attn.out_proj
    return out(y.reshape(*x.shape[:-1], -1).contiguous()), q, k


def scale_of(attn: Any) -> float:
    """The factor on the logits of an attention."""
    scale: float = attn.scaling if hasattr(attn, "scaling") else attn.scale
    return scale


def block_forward(
    block: Any,
    layout: Layout,
    x: Tensor,
    bias: Tensor | None,
    reduce: Reduce,
    **options: Any,
) -> Tensor:
    """`forward` of the library's blocks, restated with `reduce(x, q, k)` before the MLP."""
    attn = getattr(block, layout.attention)
    y, q, k = attention(attn, getattr(block, layout.norms[0])(x), bias, **options)
    for name in layout.after[0]:
        y = getattr(block, name)(y)
    x = reduce(x + y, q, k)
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
        dense: Any = super()
        if step.program.run.disabled:
            y: Tensor = dense.forward(hidden_states, attention_mask, **options)
            return y
        # While it is traced for export, the library writes out a mask that hides nothing.
        if not torch.compiler.is_compiling():
            refuse_mask(attention_mask is not None)
        layout = self._mergence_layout

        rope = options.pop("position_embeddings", None)

        def placed(known: Carry) -> dict[str, Any]:
            """The options, with the rotations of the tokens that there are."""
            if rope is None:
                return options
            if known.position is None:
                return options | {"position_embeddings": rope}
            rows = tuple(table[known.position].unsqueeze(1) for table in rope)
            return options | {"position_embeddings": rows}

        return reduced_forward(
            self,
            hidden_states,
            lambda x, known: dense.forward(x, known.bias, **placed(known)),
            lambda x, known, reduce: block_forward(
                self, layout, x, known.bias, reduce, **placed(known)
            ),
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


BLOCK_MIXINS = {
    m._mergence_layout: m for m in (ReducedViTBlock, ReducedDinoBlock, ReducedClipBlock)
}


class ReducedTower:
    """Mixed into towers."""

    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        """The tower's forward, as one run."""
        dense: Any = super()
        program: Program = self._mergence
        run = program.run
        image = inputs[0] if inputs else options.get(self.main_input_name)
        if run.disabled or image is None:  # without an image the library says what is missing
            return dense.forward(*inputs, **options)
        refuse_mask(options.get("attention_mask") is not None)
        _require_additive(self.config, ReducedOutputError)
        if options.get("output_attentions", self.config.output_attentions):
            raise ReducedOutputError(
                "output_attentions of a reduced model would have to return maps between the "
                "original tokens, which are merged on the way. Leave it out, follow patches with "
                "mergence.trace(model, images), or use mergence.disabled(model)."
            )
        rows, columns = _grid(self.config, image.shape[-2:])
        program.counts(rows * columns)  # refuses a size at which the schedule cannot be followed
        with run.forward((rows, columns)):
            outputs = dense.forward(*inputs, **options)
            known = run.known()
            if not run.averaged or known is None or known.size is None:
                attach(outputs[0], known)
                return outputs
            weighted = _times_size(outputs[0], known.size)
        if isinstance(outputs, tuple):
            return weighted, *outputs[1:]
        outputs.last_hidden_state = weighted
        return outputs


class ReducedHead:
    """Mixed into SigLIP's attention pooling."""

    def forward(self: Any, hidden_state: Tensor) -> Tensor:
        """The head's forward, in which a merged token counts as often as the patches in it."""
        dense: Any = super()
        program: Program = self._mergence
        run = program.run
        known = run.known() if run.active else None
        if not run.disabled and known is None and hidden_state.shape[1] != program.patches:
            raise ReducedOutputError(
                f"The head was called by itself, with {hidden_state.shape[1]} tokens whose sizes "
                "are not known. Call the whole model, or use mergence.disabled(model)."
            )
        if run.disabled or known is None or known.size is None:
            y: Tensor = dense.forward(hidden_state)
            return y
        batch = hidden_state.shape[0]
        probe = self.probe.repeat(batch, 1, 1)
        bias = known.size.log().to(hidden_state.dtype)
        pooled = self.attention(
            probe, hidden_state, hidden_state, key_padding_mask=bias, need_weights=False
        )[0]
        y = pooled + self.mlp(self.layernorm(pooled))
        return y[:, 0]


class ReducedContainer:
    """Mixed into models around a tower whose heads read the class token or what it pooled."""


class AveragingContainer:
    """Mixed into classifiers whose heads take the mean of the tower's patch tokens."""

    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        """The model's forward, in which the tower gives its tokens out times their sizes."""
        dense: Any = super()
        run: Run = self._mergence.run
        with run.averaging():
            return dense.forward(*inputs, **options)


def _times_size(x: Tensor, size: Tensor) -> Tensor:
    """Tokens `[B, P + N, C]` of which the plain mean over the patch tokens is by size."""
    factor = size * (size.shape[1] / size.sum(dim=1, keepdim=True))
    prefix = x.shape[1] - size.shape[1]
    return x * F.pad(factor, (prefix, 0), value=1.0).to(x.dtype).unsqueeze(2)


def _grid(config: Any, size: Any) -> tuple[int, int]:
    """Patch rows and columns of images of a size."""
    if hasattr(config, "num_mel_bins"):  # spectrograms, all of one size, whose patches overlap
        side = config.patch_size
        return (
            (config.num_mel_bins - side) // config.frequency_stride + 1,
            (config.max_length - side) // config.time_stride + 1,
        )
    (height, width), (rows, columns) = _pair(size), _pair(config.patch_size)
    return height // rows, width // columns


def _pair(side: Any) -> tuple[int, int]:
    rows, columns = side if isinstance(side, (list, tuple)) else (side, side)
    return rows, columns


def _require_additive(config: Any, error: type[Exception]) -> None:
    if config._attn_implementation not in _ADDITIVE:
        raise error(
            f"The model's attention is '{config._attn_implementation}', which does not take the "
            "sizes of merged tokens. Use model.set_attn_implementation('sdpa')."
        )


class Transformers(Family):
    """transformers' Vision Transformers, as towers and inside the models around them."""

    name: ClassVar[str] = "transformers"
    models: ClassVar[tuple[str, ...]] = (*TOWERS, *CONTAINERS)
    supported: ClassVar[str] = (
        "transformers' ViT, DeiT, DINOv2 with and without registers, DINOv3, and the vision "
        "towers of CLIP and SigLIP (SigLIP 2 too, where its checkpoints load as SigLIP), alone, "
        "with a classifier, and inside CLIPModel and SiglipModel; Audio Spectrogram Transformer"
    )

    refused: ClassVar[Mapping[str, str]] = REFUSED

    def inspect(self, model: Any) -> ModelSpec:
        """Read a model of transformers; see `Family.inspect`."""
        container = _entry(CONTAINERS, model)
        tower = model if container is None else getattr(model, container.tower)
        kind = _entry(TOWERS, tower)
        if kind is None:
            raise UnsupportedModelError(
                f"The '{container.tower if container else ''}' of this {type(model).__name__} is a "
                f"{qualified_names(original_class(tower))[0]}. Known: {self.supported}."
            )
        _require_additive(tower.config, UnsupportedModelError)
        blocks = tuple(tower.get_submodule(kind.blocks))
        for index, block in enumerate(blocks, start=1):
            attn = getattr(block, kind.layout.attention, block)
            home, where = type(tower).__module__, f"of this {type(tower).__name__}"
            require_class(block, f"{home}.{kind.block}", f"Block {index} {where}", self.supported)
            what = f"The attention of block {index} {where}"
            require_class(attn, f"{home}.{kind.attention}", what, self.supported)
        parts: list[tuple[nn.Module, type]] = [(tower, ReducedTower)]
        head = getattr(tower, kind.head, None) if kind.head else None
        if head is not None:
            parts.append((head, ReducedHead))
        if container is not None:
            mixin = AveragingContainer if container.averages else ReducedContainer
            parts.append((model, mixin))
        heads = [getattr(model, name) for name in container.heads] if container else []
        return ModelSpec(
            blocks=blocks,
            patches=math.prod(_grid(tower.config, getattr(tower.config, "image_size", ()))),
            cost=_cost(tower, kind, head, heads),
            block_mixin=BLOCK_MIXINS[kind.layout],
            parts=tuple(parts),
            classes=model.num_labels if "Classification" in type(model).__name__ else 0,
        )

    def tiny(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Tiny random models, one for each kind covered."""
        return tiny_models()


EntryT = TypeVar("EntryT")


def _entry(table: Mapping[str, EntryT], model: nn.Module) -> EntryT | None:
    return next((table[name] for name in qualified_names(type(model)) if name in table), None)


def _cost(tower: Any, kind: Tower, head: Any, heads: list[nn.Module]) -> ModelCost:
    config, layout = tower.config, kind.layout
    blocks = tuple(tower.get_submodule(kind.blocks))
    attentions = [getattr(block, layout.attention) for block in blocks]
    after = sum(map(linear_macs, heads))
    if getattr(tower, "pooler", None) is not None:
        after += linear_macs(tower.pooler)
    per_token = 0
    if head is not None:
        # Keys and values of every token, and its part in the two products with one query.
        projections = 2 * config.hidden_size**2
        per_token = projections + 2 * config.hidden_size
        after += linear_macs(head) - projections
    return ModelCost(
        blocks=tuple(
            BlockCost(
                attention=linear_macs(attn),
                mlp=linear_macs(block.mlp),
                width=config.hidden_size,
            )
            for block, attn in zip(blocks, attentions, strict=True)
        ),
        prefix=kind.prefix + getattr(config, "num_register_tokens", 0),
        dim=config.hidden_size,
        head_dim=attentions[0].head_dim,
        stem=sum(p.numel() for p in tower.get_submodule(kind.stem).parameters() if p.ndim > 1),
        head=after,
        head_per_token=per_token,
        rotary=kind.rotary,
    )


FAMILY = Transformers()
