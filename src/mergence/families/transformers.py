"""transformers' Vision Transformers: ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP and their kin.

What the library calls a model is here the *tower* (`ViTModel`, `CLIPVisionModel`), and what it puts
around one (`ViTForImageClassification`, `CLIPModel`) a *container*; both can be reduced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mergence.errors import ReducedOutputError, UnsupportedModelError
from mergence.families._coarse import CoarseStem, can_read_coarsely
from mergence.families._common import linear_macs, refuse_mask, require_class
from mergence.families._transformers import (
    CONTAINERS,
    REFUSED,
    TOWERS,
    Container,
    Tower,
    tiny_models,
)
from mergence.families._transformers_blocks import BLOCK_MIXINS
from mergence.families._transformers_releases import as_built
from mergence.family import Family, ModelSpec, qualified_names
from mergence.macs import BlockCost, ModelCost
from mergence.program import Program
from mergence.restoring import restored
from mergence.state import Carry, Run, attach
from mergence.surgery import original_class

_ADDITIVE = ("sdpa", "eager")


class ReducedTower:
    """Mixed into towers."""

    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        """The tower's forward, as one run."""
        dense: Any = super(ReducedTower, self)
        program: Program = self._mergence
        run = program.run
        image = _image(inputs, options)
        if run.disabled or image is None:  # without an image the library says what is missing
            return dense.forward(*inputs, **options)
        refuse_mask(options.get("attention_mask"))
        _require_additive(self.config, ReducedOutputError)
        asked = options.get("output_attentions")
        if self.config.output_attentions if asked is None else asked:
            raise ReducedOutputError(
                "output_attentions of a reduced model would have to return maps between the "
                "original tokens, which are merged on the way. Leave it out, follow patches with "
                "mergence.trace(model, images), or use mergence.disabled(model)."
            )
        rows, columns = _grid(self.config, image.shape)
        program.tokens(rows * columns)  # refuses a size at which the schedule cannot be followed
        with run.forward((rows, columns)):
            outputs = dense.forward(*inputs, **options)
            if not isinstance(outputs[0], Tensor):
                return outputs  # a backbone's maps, made of what ReducedStack gave out
            known = run.known()
            if not run.averaged or known is None or known.size is None:
                attach(outputs[0], known)
                return outputs
            weighted = _times_size(outputs[0], known.size)
        if isinstance(outputs, tuple):
            return weighted, *outputs[1:]
        outputs.last_hidden_state = weighted
        return outputs


class ReducedMaskingTower(ReducedTower):
    """Mixed into towers that can leave patches out: the encoders of masked autoencoders."""

    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        """The tower's forward on all patches, in raster order."""
        image = _image(inputs, options)
        if self._mergence.run.disabled or image is None:
            return super().forward(*inputs, **options)
        kind: Any = _entry(TOWERS, self)
        masks: str = kind.masks
        if len(inputs) > 1 or options.get(masks) is not None:
            raise ReducedOutputError(
                f"A reduced {type(self).__name__} was given `{masks}`, which leaves patches out or "
                "puts them in another order. Call it with the images alone, or use "
                "mergence.disabled(model)."
            )
        _require_all_patches(self.config, ReducedOutputError)
        if masks == "noise":
            # The library would shuffle the patches even where it drops none; this is its own way
            # to leave them where they are.
            patches = math.prod(_grid(self.config, image.shape))
            options["noise"] = torch.arange(patches, device=image.device).expand(len(image), -1)
        return super().forward(*inputs, **options)


class ReducedStack:
    """Mixed into the blocks' common parent in backbones, which make maps of what it gives out."""

    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        """The blocks' forward, in which tokens that become maps are there for every patch again."""
        dense: Any = super(ReducedStack, self)
        program: Program = self._mergence
        outputs = dense.forward(*inputs, **options)
        known = program.run.known()
        if program.run.disabled or known is None:
            return outputs
        stages = self.config.stage_names
        wanted = {*self.config.out_features, stages[-1]}

        def full(stage: str, tokens: Tensor) -> Tensor:
            if stage not in wanted:
                return tokens
            tokens = restored(tokens, known, prefix=program.prefix)
            attach(tokens, Carry(patches=known.patches, grid=known.grid))
            return tokens

        outputs.hidden_states = tuple(
            full(stages[index], tokens) for index, tokens in enumerate(outputs.hidden_states)
        )
        return outputs


class ReducedEmbeddings:
    """Mixed into the embeddings of towers that can read patches coarsely."""

    def forward(self: Any, *inputs: Any, **options: Any) -> Tensor:
        """The embeddings' forward, after which the patches that are read coarsely have joined."""
        dense: Any = super(ReducedEmbeddings, self)
        program: Program = self._mergence
        y = dense.forward(*inputs, **options)
        if program.run.readings is not None and options.get("bool_masked_pos") is not None:
            raise ReducedOutputError(
                "A model that reads patches coarsely was given `bool_masked_pos`, and a region has "
                "no token of its own that could be masked. Apply with coarse=0, or use "
                "mergence.disabled(model)."
            )
        return program.coarsened(y)


class ReducedHead:
    """Mixed into SigLIP's attention pooling."""

    def forward(self: Any, hidden_state: Tensor) -> Tensor:
        """The head's forward, in which a merged token counts as often as the patches in it."""
        dense: Any = super(ReducedHead, self)
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
        dense: Any = super(AveragingContainer, self)
        run: Run = self._mergence.run
        with run.averaging():
            return dense.forward(*inputs, **options)


def _image(inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The image that a tower was called with, None without one."""
    # Not by `main_input_name`, which older releases do not say of every tower.
    return inputs[0] if inputs else options.get("pixel_values", options.get("input_values"))


def _times_size(x: Tensor, size: Tensor) -> Tensor:
    """Tokens `[B, P + N, C]` of which the plain mean over the patch tokens is by size."""
    factor = size * (size.shape[1] / size.sum(dim=1, keepdim=True))
    prefix = x.shape[1] - size.shape[1]
    return x * F.pad(factor, (prefix, 0), value=1.0).to(x.dtype).unsqueeze(2)


def _grid(config: Any, shape: Any) -> tuple[int, int]:
    """Patch rows and columns of inputs of a shape; a video's frames lie below each other."""
    if hasattr(config, "num_mel_bins"):  # spectrograms, all of one size, whose patches overlap
        side = config.patch_size
        return (
            (config.num_mel_bins - side) // config.frequency_stride + 1,
            (config.max_length - side) // config.time_stride + 1,
        )
    (height, width), (rows, columns) = shape[-2:], _pair(config.patch_size)
    frames = shape[-4] // config.tubelet_size if hasattr(config, "tubelet_size") else 1
    return frames * (height // rows), width // columns


def _input_shape(config: Any) -> tuple[int, ...]:
    """The shape of one input of a model's own size."""
    if hasattr(config, "num_mel_bins"):
        return config.max_length, config.num_mel_bins
    image = (config.num_channels, *_pair(config.image_size))
    return (config.num_frames, *image) if hasattr(config, "num_frames") else image


def _pair(side: Any) -> tuple[int, int]:
    rows, columns = side if isinstance(side, (list, tuple)) else (side, side)
    return rows, columns


def _require_all_patches(config: Any, error: type[Exception]) -> None:
    if getattr(config, "mask_ratio", 0):
        raise error(
            f"The model drops {config.mask_ratio:.0%} of the patches at random "
            f"(mask_ratio={config.mask_ratio:g}). Set model.config.mask_ratio = 0.0, or load "
            "the checkpoint with mask_ratio=0.0, to encode whole images."
        )


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
        "transformers' ViT, DeiT, ViT-MSN, I-JEPA, DINOv2 with and without registers, DINOv3, and "
        "the vision towers of CLIP, MetaCLIP 2, AltCLIP, Chinese CLIP and SigLIP (SigLIP 2 too, "
        "where its checkpoints load as SigLIP), alone, with a classifier, and inside CLIPModel and "
        "SiglipModel; DINOv2 and DINOv3 as backbones, and Depth Anything; the encoder of ViT-MAE "
        "on whole images; VideoMAE; Audio Spectrogram Transformer"
    )

    refused: ClassVar[Mapping[str, str]] = REFUSED
    oldest: ClassVar[str] = "4.57"

    def inspect(self, model: Any) -> ModelSpec:
        """Read a model of transformers; see `Family.inspect`."""
        container, tower = _opened(model)
        kind = _entry(TOWERS, tower)
        if kind is None:
            raise UnsupportedModelError(
                f"The '{container.tower if container else ''}' of this {type(model).__name__} is a "
                f"{qualified_names(original_class(tower))[0]}. Known: {self.supported}."
            )
        kind = as_built(kind, tower)
        _require_additive(tower.config, UnsupportedModelError)
        _require_all_patches(tower.config, UnsupportedModelError)
        if container is not None and getattr(model.config, "use_mean_pooling", True) is False:
            raise UnsupportedModelError(
                f"The head of this {type(model).__name__} reads the token of the first patch "
                "(use_mean_pooling=False), which may be merged with others. Use a checkpoint with "
                "use_mean_pooling=True, or apply to the model without its head."
            )
        blocks = tuple(tower.get_submodule(kind.blocks))
        for index, block in enumerate(blocks, start=1):
            attn = getattr(block, kind.layout.attention, block)
            home, where = type(tower).__module__, f"of this {type(tower).__name__}"
            require_class(block, f"{home}.{kind.block}", f"Block {index} {where}", self.supported)
            what = f"The attention of block {index} {where}"
            require_class(attn, f"{home}.{kind.attention}", what, self.supported)
        parts: list[tuple[nn.Module, type]] = [
            (tower, ReducedMaskingTower if kind.masks else ReducedTower)
        ]
        stem = tower.get_submodule(kind.stem)
        grid = _grid(tower.config, _input_shape(tower.config))
        if coarse := can_read_coarsely(stem, grid) and not (kind.rotary or kind.masks):
            parts += [(stem, CoarseStem), (tower.embeddings, ReducedEmbeddings)]
        head = getattr(tower, kind.head, None) if kind.head else None
        if head is not None:
            parts.append((head, ReducedHead))
        if kind.maps:
            parts.append((tower.get_submodule(kind.blocks.rpartition(".")[0]), ReducedStack))
        if container is not None:
            mixin = AveragingContainer if container.averages else ReducedContainer
            parts.append((model, mixin))
        heads = [getattr(model, name) for name in container.heads] if container else []
        return ModelSpec(
            blocks=blocks,
            patches=math.prod(grid),
            cost=_cost(tower, kind, head, heads),
            block_mixin=BLOCK_MIXINS[kind.layout],
            parts=tuple(parts),
            classes=model.num_labels if "Classification" in type(model).__name__ else 0,
            coarse=coarse,
        )

    def tiny(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Tiny random models, one for each kind covered."""
        return tiny_models()

    def input_shape(self, model: Any) -> tuple[int, ...]:
        """The shape of one input of a tiny model: an image, or the frames of a video."""
        return _input_shape(_opened(model)[1].config)


EntryT = TypeVar("EntryT")


def _entry(table: Mapping[str, EntryT], model: nn.Module) -> EntryT | None:
    return next((table[name] for name in qualified_names(type(model)) if name in table), None)


def _opened(model: Any) -> tuple[Container | None, Any]:
    """What a model puts around a tower, None where it is one, and the tower."""
    container = _entry(CONTAINERS, model)
    if container is None or not hasattr(model, container.tower):
        return None, model
    return container, getattr(model, container.tower)


def _cost(tower: Any, kind: Tower, head: Any, heads: list[nn.Module]) -> ModelCost:
    config, layout = tower.config, kind.layout
    blocks = tuple(tower.get_submodule(kind.blocks))
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
                attention=linear_macs(getattr(block, layout.attention)),
                mlp=sum(linear_macs(getattr(block, name)) for name in layout.mlp),
                width=config.hidden_size,
            )
            for block in blocks
        ),
        prefix=kind.prefix + getattr(config, "num_register_tokens", 0),
        dim=config.hidden_size,
        head_dim=getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
        stem=sum(p.numel() for p in tower.get_submodule(kind.stem).parameters() if p.ndim > 1),
        head=after,
        head_per_token=per_token,
        placed=kind.rotary,
    )


FAMILY = Transformers()
