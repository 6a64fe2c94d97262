"""transformers' SigLIP 2 NaFlex: images of any size as patches, padded to one length; and LFM2-VL.

A tower is given patches `[B, L, ...]`, as many of each image as it has and then padding, the grid
of each image and a mask. Here the images of one grid are a batch without padding. What reads the
tower has a token for every patch again, and zeros where the padding was.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mergence.errors import ReducedOutputError, UnsupportedModelError
from mergence.families._common import (
    ReducedContainer,
    block_costs,
    linear_macs,
    pooling_costs,
    require_blocks,
)
from mergence.families._transformers import CLIP, full_name
from mergence.families._transformers_blocks import BLOCK_MIXINS
from mergence.families._transformers_packed import joined
from mergence.families._transformers_towers import (
    ReducedHead,
    each_tensor,
    refuse_attentions,
    require_additive,
    tower_in,
)
from mergence.family import Family, ModelSpec
from mergence.macs import ModelCost
from mergence.program import Program, require_own
from mergence.restoring import restored
from mergence.state import Carry

_TOWER = full_name("siglip2", "Siglip2VisionModel")
_AROUND = tuple(
    full_name(architecture, cls)
    for architecture, classes in (
        ("siglip2", ("Siglip2Model", "Siglip2ForImageClassification")),
        ("lfm2_vl", ("Lfm2VlModel", "Lfm2VlForConditionalGeneration")),
    )
    for cls in classes
)


class ReducedTower:
    """Mixed into `Siglip2VisionModel`."""

    def forward(
        self: Any,
        pixel_values: Tensor,
        pixel_attention_mask: Tensor | None = None,
        spatial_shapes: Any = None,
        **options: Any,
    ) -> Any:
        """The tower's forward, as one run for all images of one grid."""
        dense: Any = super(ReducedTower, self)
        program: Program = self._mergence
        run = program.run
        if run.disabled or spatial_shapes is None:  # without grids the library says what is missing
            return dense.forward(pixel_values, pixel_attention_mask, spatial_shapes, **options)
        require_own(program, self.encoder.layers)
        require_additive(self.config, ReducedOutputError)
        refuse_attentions(self.config, options)
        number, length = pixel_values.shape[:2]
        spatial_shapes = torch.as_tensor(spatial_shapes)
        if len(spatial_shapes) == 1:
            spatial_shapes = spatial_shapes.expand(number, -1)
        if len(spatial_shapes) != number:
            raise ReducedOutputError(
                f"A reduced {type(self).__name__} was given {number} images, and "
                f"{len(spatial_shapes)} spatial_shapes. Give the shape of each, or one for all."
            )
        images = defaultdict[tuple[int, int], list[int]](list)
        for index, (rows, columns) in enumerate(spatial_shapes.tolist()):
            images[rows, columns].append(index)
        for (rows, columns), those in images.items():
            program.tokens(rows * columns)  # refuses what the schedule cannot follow
            _require_padding(pixel_attention_mask, those, rows * columns, length)
        found = []
        for grid, those in images.items():
            with run.forward(grid, every_patch=True):
                here = pixel_values[those, : math.prod(grid)]
                outputs = dense.forward(here, None, spatial_shapes[those], **options)
                spread = partial(
                    _spread,
                    last=outputs[0],
                    known=run.known(),
                    final=run.known_after(self.post_layernorm),
                    length=length,
                )
                found.append(each_tensor(outputs, spread))
        order = torch.tensor([index for those in images.values() for index in those])
        back = order.argsort().to(pixel_values.device)
        return joined(found, lambda parts: torch.cat(parts)[back])


def _spread(
    x: Tensor, last: Tensor, known: Carry | None, final: Carry | None, length: int
) -> Tensor:
    """Tokens of images of one grid for every patch, and zeros up to the length of others."""
    full = restored(x, final if x is last else known)
    return F.pad(full, (0, 0, 0, length - full.shape[1]))


def _require_padding(mask: Tensor | None, images: list[int], patches: int, length: int) -> None:
    """Refuse a mask that hides something else than what follows the patches of an image."""
    if mask is None and patches < length:
        raise ReducedOutputError(
            f"A reduced model was given no pixel_attention_mask, and an image of {patches} patches "
            f"that is padded to {length}. The dense model would attend to the padding, which a "
            "reduced one leaves out. Give the mask that the processor makes, or use "
            "mergence.disabled(model)."
        )
    if mask is not None and not (mask[images, :patches].all() and not mask[images, patches:].any()):
        raise ReducedOutputError(
            "A reduced model was given a pixel_attention_mask that is not that of its "
            f"spatial_shapes: {patches} patches, and padding behind them. Other masks speak of the "
            "original tokens, which are merged on the way; use mergence.disabled(model) for them."
        )


class ReducedPool(ReducedHead):
    """Mixed into the tower's attention pooling, which is given no padding where tokens leave."""

    def forward(self: Any, hidden_state: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The head's forward, in which a merged token counts as often as the patches in it."""
        if attention_mask is None:
            return super().forward(hidden_state)
        dense: Any = super(ReducedHead, self)
        y: Tensor = dense.forward(hidden_state, attention_mask)
        return y


class TransformersSiglip2(Family):
    """transformers' `Siglip2VisionModel`, alone and inside the models around it."""

    name: ClassVar[str] = "transformers_siglip2"
    models: ClassVar[tuple[str, ...]] = (_TOWER, *_AROUND)
    supported: ClassVar[str] = "transformers' SigLIP 2 NaFlex, alone and in LFM2-VL"
    oldest: ClassVar[str] = "5.6"

    def inspect(self, model: Any) -> ModelSpec:
        """Read a model of transformers; see `Family.inspect`."""
        tower = tower_in(model, {_TOWER}, self.supported)
        require_additive(tower.config, UnsupportedModelError)
        blocks = tuple(tower.encoder.layers)
        block, attention = (
            full_name("siglip2", f"Siglip2{cls}") for cls in ("EncoderLayer", "Attention")
        )
        require_blocks(tower, blocks, block, (CLIP.attention, attention), self.supported)
        parts: list[tuple[nn.Module, type]] = [(tower, ReducedTower)]
        if tower.use_head:
            parts.append((tower.head, ReducedPool))
        if model is not tower:
            parts.append((model, ReducedContainer))
        return ModelSpec(
            blocks=blocks,
            patches=tower.config.num_patches,
            cost=_cost(tower, blocks),
            block_mixin=BLOCK_MIXINS[CLIP],
            parts=tuple(parts),
            classes=model.num_labels if "Classification" in type(model).__name__ else 0,
        )

    def tiny(self) -> Mapping[str, Callable[[], nn.Module]]:
        """None: the contract tests call models with images, and these want patches and grids.

        `tests/families/test_transformers_siglip2.py` has its own.
        """
        return {}


def _cost(tower: Any, blocks: tuple[Any, ...]) -> ModelCost:
    config = tower.config
    head, per_token = pooling_costs(tower.head, config.hidden_size) if tower.use_head else (0, 0)
    return ModelCost(
        blocks=block_costs(blocks, CLIP.attention, CLIP.mlp, config.hidden_size),
        prefix=0,
        dim=config.hidden_size,
        head_dim=config.hidden_size // config.num_attention_heads,
        stem=linear_macs(tower.embeddings.patch_embedding),
        head=head,
        head_per_token=per_token,
    )


FAMILY = TransformersSiglip2()
