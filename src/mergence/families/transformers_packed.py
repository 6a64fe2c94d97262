"""transformers' vision towers that take packed patches: Qwen2-VL, Qwen3-VL, GLM-4V and their kin.

Such a tower is given the patches of any number of images and frames, of any size, one after the
other `[S, ...]`, and the grid of each. Here images of one size that follow each other are one batch
of frames `[B, N, ...]`, in which every frame is reduced by itself, as the library attends to it by
itself. What reads the tower, from its own mergers on, has a token for every patch again.

The patches of a frame are not in raster order: those that the model will merge, 2 x 2, are next to
each other. Whatever needs rows of patches (the multi-scale fusion) is therefore refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import nn

from mergence.errors import UnsupportedModelError
from mergence.families._common import ReducedContainer, linear_macs, require_blocks
from mergence.families._transformers import entry, full_name
from mergence.families._transformers_packed import (
    ReducedBareTower,
    ReducedPackedBlock,
    ReducedPackedTower,
    ReducedReader,
    ReducedStem,
    window,
)
from mergence.families._transformers_towers import require_additive, tower_in
from mergence.family import Family, ModelSpec
from mergence.macs import BlockCost, ModelCost

PATCHES = 32 * 32
"""Patches of an image, where the configuration names no size: 448 x 448 pixels."""


@dataclass(frozen=True)
class Packed:
    """Where a tower keeps its parts.

    Attributes:
        architecture: The module that it is in.
        block: The class of its blocks.
        attention: The class of their attention.
        readers: Its modules that read a token for every patch: paths, of one module or of a list.
    """

    architecture: str
    block: str
    attention: str
    readers: tuple[str, ...]

    @property
    def bare(self) -> bool:
        """Whether what its last block gives out is its last hidden state, and only merged then."""
        return "merger" in self.readers


def _packed(architecture: str, names: str, *readers: str) -> Packed:
    """A tower whose classes begin with `names`."""
    return Packed(architecture, f"{names}VisionBlock", f"{names}VisionAttention", readers)


_DEEP = "deepstack_merger_list"
_NORM = "post_layernorm"
_TOWERS: dict[str, Packed] = {
    "Qwen2VisionTransformerPretrainedModel": replace(
        _packed("qwen2_vl", "Qwen2VL", "merger"), attention="VisionAttention"
    ),
    "Qwen2_5_VisionTransformerPretrainedModel": _packed("qwen2_5_vl", "Qwen2_5_VL", "merger"),
    "Qwen3VLVisionModel": _packed("qwen3_vl", "Qwen3VL", "merger", _DEEP),
    "Qwen3VLMoeVisionModel": _packed("qwen3_vl_moe", "Qwen3VLMoe", "merger", _DEEP),
    "Qwen3OmniMoeVisionEncoder": _packed("qwen3_omni_moe", "Qwen3OmniMoe", "merger", "merger_list"),
    "Qwen3_5VisionModel": _packed("qwen3_5", "Qwen3_5", "merger"),
    "Qwen3_5MoeVisionModel": _packed("qwen3_5_moe", "Qwen3_5Moe", "merger"),
    "Glm4vVisionModel": _packed("glm4v", "Glm4v", _NORM),
    "Glm4vMoeVisionModel": _packed("glm4v_moe", "Glm4vMoe", _NORM),
    "GlmOcrVisionModel": _packed("glm_ocr", "GlmOcr", _NORM),
    "Ernie4_5_VLMoeVisionTransformerPretrainedModel": _packed(
        "ernie4_5_vl_moe", "Ernie4_5_VLMoe", "ln"
    ),
}
_WHOLE = ("Model", "ForConditionalGeneration")
TOWERS = {full_name(kind.architecture, cls): kind for cls, kind in _TOWERS.items()}
CONTAINERS = tuple(
    full_name(architecture, f"{names}{cls}")
    for architecture, names, classes in (
        ("qwen2_vl", "Qwen2VL", _WHOLE),
        ("qwen2_5_vl", "Qwen2_5_VL", _WHOLE),
        ("colqwen2", "ColQwen2", ("ForRetrieval",)),
        ("qwen3_vl", "Qwen3VL", _WHOLE),
        ("qwen3_vl_moe", "Qwen3VLMoe", _WHOLE),
        ("qwen3_omni_moe", "Qwen3OmniMoeThinker", _WHOLE),
        ("qwen3_omni_moe", "Qwen3OmniMoe", ("ForConditionalGeneration",)),
        ("qwen3_5", "Qwen3_5", _WHOLE),
        ("qwen3_5_moe", "Qwen3_5Moe", _WHOLE),
        ("glm4v", "Glm4v", _WHOLE),
        ("glm4v_moe", "Glm4vMoe", _WHOLE),
        ("glm46v", "Glm46V", _WHOLE),
        ("glm_ocr", "GlmOcr", _WHOLE),
        ("ernie4_5_vl_moe", "Ernie4_5_VLMoe", _WHOLE),
    )
    for cls in classes
)
"""Models of image and language around one of these."""


_ALIKE = "its attention is built otherwise than Qwen2.5-VL's, whose windows it has"


class TransformersPacked(Family):
    """transformers' towers of packed patches, alone and inside the models around them."""

    name: ClassVar[str] = "transformers_packed"
    models: ClassVar[tuple[str, ...]] = (*TOWERS, *CONTAINERS)
    supported: ClassVar[str] = (
        "transformers' Qwen2-VL, ColQwen2, Qwen2.5-VL, Qwen3-VL and its MoE, Qwen3.5 and its MoE, "
        "Qwen3-Omni, GLM-4.1V, GLM-4.5V, GLM-4.6V, GLM-OCR and ERNIE 4.5 VL, as a whole or their "
        "towers alone"
    )
    refused: ClassVar[Mapping[str, str]] = {
        full_name(architecture, cls): _ALIKE
        for architecture, classes in (
            (
                "qwen2_5_omni",
                ("Qwen2_5OmniVisionEncoder", "Qwen2_5OmniThinkerForConditionalGeneration"),
            ),
            (
                "exaone4_5",
                (
                    "Exaone4_5_VisionModel",
                    "Exaone4_5_Model",
                    "Exaone4_5_ForConditionalGeneration",
                ),
            ),
        )
        for cls in classes
    }
    oldest: ClassVar[str] = "5.6"

    def inspect(self, model: Any) -> ModelSpec:
        """Read a model of transformers; see `Family.inspect`."""
        tower = tower_in(model, TOWERS, self.supported)
        kind: Any = entry(TOWERS, tower)
        require_additive(tower.config, UnsupportedModelError)
        block = full_name(kind.architecture, kind.block)
        attention = "attn", full_name(kind.architecture, kind.attention)
        require_blocks(tower, tower.blocks, block, attention, self.supported)
        parts: list[tuple[nn.Module, type]] = [
            (tower, ReducedBareTower if kind.bare else ReducedPackedTower)
        ]
        if isinstance(tower.patch_embed.proj, nn.Conv3d):
            parts.append((tower.patch_embed.proj, ReducedStem))
        for reader in map(tower.get_submodule, kind.readers):
            each = reader if isinstance(reader, nn.ModuleList) else (reader,)
            parts += [(one, ReducedReader) for one in each]
        if model is not tower:
            parts.append((model, ReducedContainer))
        return ModelSpec(
            blocks=tuple(tower.blocks),
            patches=_patches(tower),
            cost=_cost(tower),
            block_mixin=ReducedPackedBlock,
            parts=tuple(parts),
            classes=0,
            raster=False,
        )

    def tiny(self) -> Mapping[str, Callable[[], nn.Module]]:
        """None: the contract tests call models with images, and these want patches and grids.

        `tests/families/test_transformers_packed.py` has their own.
        """
        return {}


def _patches(tower: Any) -> int:
    """Patches of the image size that the positions are learned for, if there is one."""
    positions = getattr(tower, "pos_embed", None) or getattr(
        getattr(tower, "embeddings", None), "position_embedding", None
    )
    return PATCHES if positions is None else int(positions.num_embeddings)


def _cost(tower: Any) -> ModelCost:
    attn, unit = tower.blocks[0].attn, tower.config.spatial_merge_size**2
    everywhere = getattr(tower, "fullatt_block_indexes", range(len(tower.blocks)))
    inside = {module for block in tower.blocks for module in block.modules()}
    embedding = set(tower.patch_embed.modules())
    after = [m for m in tower.modules() if m not in inside and m not in embedding]
    return ModelCost(
        blocks=tuple(
            BlockCost(
                linear_macs(block.attn),
                linear_macs(block.mlp),
                attn.num_heads * attn.head_dim,
                None if index in everywhere else window(tower.config),
            )
            for index, block in enumerate(tower.blocks)
        ),
        prefix=0,
        dim=attn.proj.out_features,
        head_dim=attn.head_dim,
        # What reads every patch is not less work in a reduced model.
        stem=sum(map(_weights, embedding)) + sum(map(_weights, after)) // unit,
        head=0,
        placed=True,
    )


def _weights(module: Any) -> int:
    """Weights of a linear layer or a convolution, and of nothing else."""
    if isinstance(module, nn.Conv2d | nn.Conv3d):
        return module.weight.numel()
    return int(module.in_features * module.out_features) if hasattr(module, "in_features") else 0


FAMILY = TransformersPacked()
