"""transformers' Vision Transformers: ViT, DeiT, DINOv2, DINOv3, CLIP, SigLIP and their kin.

What the library calls a model is here the *tower* (`ViTModel`, `CLIPVisionModel`), and what it puts
around one (`ViTForImageClassification`, `CLIPModel`) a *container*; both can be reduced.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, ClassVar

from torch import nn

from mergence.errors import UnsupportedModelError
from mergence.families._coarse import CoarseStem, can_read_coarsely
from mergence.families._common import (
    ReducedContainer,
    block_costs,
    linear_macs,
    pooling_costs,
    require_blocks,
    same_library,
)
from mergence.families._transformers import (
    CONTAINERS,
    REFUSED,
    TOWERS,
    Container,
    Tower,
    entry,
)
from mergence.families._transformers_blocks import BLOCK_MIXINS
from mergence.families._transformers_releases import as_built, require_release
from mergence.families._transformers_tiny import tiny_models
from mergence.families._transformers_towers import (
    AveragingClassifier,
    ReducedClassifier,
    ReducedEmbeddings,
    ReducedFullTower,
    ReducedHead,
    ReducedMaskingTower,
    ReducedPooledTower,
    ReducedStack,
    ReducedTower,
    grid_of,
    input_shape,
    require_additive,
    require_all_patches,
)
from mergence.family import Family, ModelSpec, knows, qualified_names
from mergence.macs import ModelCost
from mergence.state import Head
from mergence.surgery import original_class

_CONTAINER_MIXINS: Mapping[Head | None, type] = {
    None: ReducedContainer,
    "prefix": ReducedClassifier,
    "mean": AveragingClassifier,
}


class Transformers(Family):
    """transformers' Vision Transformers, as towers and inside the models around them."""

    name: ClassVar[str] = "transformers"
    models: ClassVar[tuple[str, ...]] = (*TOWERS, *CONTAINERS)
    supported: ClassVar[str] = (
        "transformers' ViT, DeiT, ViT-MSN, I-JEPA, DINOv2 with and without registers, DINOv3, and "
        "the vision towers of CLIP, MetaCLIP 2, AltCLIP, Chinese CLIP, SigLIP (SigLIP 2 too, "
        "where its checkpoints load as SigLIP) and AIMv2, alone, with a classifier, and inside "
        "CLIPModel and SiglipModel; TIPS v2; DINOv2, DINOv3 and TIPS v2 as backbones, Depth "
        "Anything and DPT; OWL-ViT, OWLv2, CLIPSeg and ViTPose; BLIP, BLIP-2, InstructBLIP, and "
        "VisionEncoderDecoderModel on one of these (TrOCR); LLaVA, LLaVA-NeXT and its videos, "
        "LLaVA-OneVision, VipLLaVA, PaliGemma, ColPali, PI0, Gemma 3, Aya Vision, Command A "
        "Vision, DeepSeek-VL, InternVL, SmolVLM, Idefics2 and Idefics3; the encoder of ViT-MAE on "
        "whole images; VideoMAE and ViViT; Audio Spectrogram Transformer"
    )

    refused: ClassVar[Mapping[str, str]] = REFUSED
    oldest: ClassVar[str] = "4.57"

    def inspect(self, model: Any) -> ModelSpec:
        """Read a model of transformers; see `Family.inspect`."""
        container, path, tower = _opened(model)
        if container is not None:
            require_release(model, container.oldest)
        kind = entry(TOWERS, tower)
        if kind is None:
            hint = f"Known: {self.supported}."
            if knows(tower):
                hint = f"It is reduced by itself: mergence.apply(model.{path}, ...)."
            raise UnsupportedModelError(
                f"The '{path}' of this {type(model).__name__} is a "
                f"{qualified_names(original_class(tower))[0]}. {hint}"
            )
        kind = as_built(kind, tower)
        require_additive(tower.config, UnsupportedModelError)
        require_all_patches(tower.config, UnsupportedModelError)
        if container is not None and getattr(model.config, "use_mean_pooling", True) is False:
            raise UnsupportedModelError(
                f"The head of this {type(model).__name__} reads the token of the first patch "
                "(use_mean_pooling=False), which may be merged with others. Use a checkpoint with "
                "use_mean_pooling=True, or apply to the model without its head."
            )
        blocks = tuple(tower.get_submodule(kind.blocks))
        home = type(tower).__module__
        attention = kind.layout.attention, f"{home}.{kind.attention}"
        require_blocks(tower, blocks, f"{home}.{kind.block}", attention, self.supported)
        parts: list[tuple[nn.Module, type]] = [(tower, _mixin(kind, container))]
        stem = dict(tower.named_modules()).get(kind.stem)
        if stem is None:
            raise UnsupportedModelError(
                f"The patches of this {type(tower).__name__} are embedded by a "
                f"{type(tower.embeddings).__name__}, which has no '{kind.stem}' (a hybrid with a "
                f"convolutional network). Known: {self.supported}."
            )
        grid = grid_of(tower.config, input_shape(tower.config))
        if coarse := can_read_coarsely(stem, grid) and not (kind.rotary or kind.masks):
            parts += [(stem, CoarseStem), (tower.embeddings, ReducedEmbeddings)]
        head = getattr(tower, kind.head, None) if kind.head else None
        if head is not None:
            parts.append((head, ReducedHead))
        if kind.maps:
            parts.append((tower.get_submodule(kind.blocks.rpartition(".")[0]), ReducedStack))
        if container is not None:
            parts.append((model, _CONTAINER_MIXINS[container.head]))
        alone = container is not None and container.head == "prefix"
        alone = alone and same_library(model, blocks[0])
        heads = [getattr(model, name) for name in container.heads] if container else []
        return ModelSpec(
            blocks=blocks,
            patches=math.prod(grid),
            cost=replace(_cost(tower, kind, head, heads), prefix_alone=alone),
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
        return input_shape(_opened(model)[2].config)


def _mixin(kind: Tower, container: Container | None) -> type:
    if container is not None and container.full:
        return ReducedFullTower
    if kind.masks:
        return ReducedMaskingTower
    pooled = container is not None and container.heads
    return ReducedPooledTower if pooled else ReducedTower


def _opened(model: Any) -> tuple[Container | None, str, Any]:
    """What a model puts around a tower, None where it is one, the tower's path, and the tower."""
    container = entry(CONTAINERS, model)
    if container is not None:
        parts = dict(model.named_modules())
        for path in container.towers:
            if path in parts:
                return container, path, parts[path]
    return None, "", model


def _cost(tower: Any, kind: Tower, head: Any, heads: list[nn.Module]) -> ModelCost:
    config, layout = tower.config, kind.layout
    blocks = tuple(tower.get_submodule(kind.blocks))
    after = sum(map(linear_macs, heads))
    if getattr(tower, "pooler", None) is not None:
        after += linear_macs(tower.pooler)
    per_token = 0
    if head is not None:
        once, per_token = pooling_costs(head, config.hidden_size)
        after += once
    return ModelCost(
        blocks=block_costs(blocks, layout.attention, layout.mlp, config.hidden_size),
        prefix=kind.prefix + getattr(config, "num_register_tokens", 0),
        dim=config.hidden_size,
        head_dim=getattr(config, "head_dim", config.hidden_size // config.num_attention_heads),
        stem=sum(p.numel() for p in tower.get_submodule(kind.stem).parameters() if p.ndim > 1),
        head=after,
        head_per_token=per_token,
        placed=kind.rotary,
    )


FAMILY = Transformers()
