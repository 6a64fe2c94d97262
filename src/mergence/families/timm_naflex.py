"""timm's `NaFlexVit` on images: SigLIP 2 NaFlex, C-RADIO, and any ViT or EVA that is built as one.

The class takes images, all of one size in a batch, or patches that were cut out before, with their
places (NaFlex): as many for each image as it has, padded to the longest. Here it takes images. How
many of padded patches are to stay differs from image to image, while a reduced model leaves a fixed
number; so these are refused. Written against timm 1.0.31.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

from torch import Tensor

from mergence.errors import ReducedOutputError
from mergence.families._common import refuse_mask, require_class
from mergence.families.timm import (
    ReducedBlock,
    ReducedTrunk,
    Timm,
    pool_by_size,
    sizes_to_pool,
)
from mergence.families.timm_eva import ReducedEvaBlock, TimmEva
from mergence.family import qualified_names
from mergence.state import Run
from mergence.surgery import original_class

_NAFLEX = "timm.models.naflexvit."


class ReducedNaFlex(ReducedTrunk):
    """Mixed into `timm.models.naflexvit.NaFlexVit`."""

    _mergence_embed: ClassVar[str] = "embeds"

    def _mergence_run(
        self: Any, image: Any, *, every_patch: bool = False
    ) -> AbstractContextManager[Run]:
        if isinstance(image, Tensor) and image.ndim == 4:
            return super()._mergence_run(image, every_patch=every_patch)
        run: Run = self._mergence.run
        if run.disabled:
            return nullcontext(run)
        raise ReducedOutputError(
            "A reduced NaFlexVit was given patches that were cut out before (NaFlex). They are "
            "padded, and how many of them are to stay differs from image to image, while a reduced "
            "model leaves a fixed number. Give it images [B, 3, H, W] of one size a batch, or use "
            "mergence.disabled(model)."
        )

    def forward_features(
        self: Any,
        patches: Any,
        patch_coord: Tensor | None = None,
        patch_valid: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Any:
        """The model's features, reduced; they remember their sizes for `forward_head`."""
        return super().forward_features(patches, patch_coord, patch_valid, attn_mask)

    def _pool(
        self: Any, x: Tensor, pool_type: str | None = None, patch_valid: Tensor | None = None
    ) -> Tensor:
        """The model's pooling, in which a merged token counts as often as the patches in it."""
        dense: Any = super(ReducedNaFlex, self)
        kind = self.global_pool if pool_type is None else pool_type
        size = sizes_to_pool(self, x, self.attn_pool is not None or kind in ("avg", "avgmax"))
        if size is None:
            y: Tensor = dense._pool(x, pool_type, patch_valid)
            return y
        refuse_mask(patch_valid)
        return pool_by_size(self, x, size, kind)


class TimmNaFlex(Timm):
    """timm's `NaFlexVit`."""

    name: ClassVar[str] = "timm_naflex"
    models: ClassVar[tuple[str, ...]] = (_NAFLEX + "NaFlexVit",)
    supported: ClassVar[str] = (
        "timm's NaFlexVit on images: SigLIP 2 NaFlex, C-RADIO, and ViTs and EVAs built with "
        "use_naflex=True"
    )
    refused: ClassVar[Mapping[str, str]] = {}
    block: ClassVar[tuple[str, ...]] = (*Timm.block, *TimmEva.block)
    attention: ClassVar[tuple[str, ...]] = (*Timm.attention, *TimmEva.attention)
    embed: ClassVar[tuple[str, ...]] = (_NAFLEX + "NaFlexEmbeds",)
    model_mixin: ClassVar[type[ReducedTrunk]] = ReducedNaFlex
    kinds: ClassVar[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
        "gap": ("vit_medium_patch16_reg4_gap_256", {"use_naflex": True, "init_values": 0.3}),
        "rope_mixed": (
            "vit_small_patch16_rope_mixed_224",
            {"use_naflex": True, "init_values": 0.3},
        ),
    }

    def _patches(self, model: Any) -> int:
        embed = model.embeds
        if (size := embed.default_img_size) is None:
            # Unknown to the model itself, but timm.create_model notes what it was trained on.
            _, *size = getattr(model, "pretrained_cfg", {}).get("input_size", (3,))
        return math.prod(embed.dynamic_feat_size(size) if size else embed.pos_embed_grid_size)

    def _block_mixin(self, blocks: tuple[Any, ...]) -> type:
        first = qualified_names(original_class(blocks[0]))[0]
        for index, block in enumerate(blocks, start=1):
            require_class(block, first, f"Block {index} of this NaFlexVit", self.supported)
        return ReducedEvaBlock if first in TimmEva.block else ReducedBlock


FAMILY = TimmNaFlex()
