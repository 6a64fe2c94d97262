"""transformers' Pixtral tower, alone and in Mistral Small, Ministral and others that are around it.

It takes images of several sizes, packs their patches into one sequence and attends within each by
a mask. Here images of one size that follow each other are one batch `[B, N, ...]`. What reads the
tower has a token for every patch again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any, ClassVar

from torch import Tensor, nn

from mergence.errors import ReducedOutputError, UnsupportedModelError
from mergence.families._common import ReducedContainer, block_costs, require_blocks
from mergence.families._transformers import Layout, full_name
from mergence.families._transformers_blocks import first_half, second_half
from mergence.families._transformers_packed import (
    FirstHalf,
    ReducedPackedBlock,
    SecondHalf,
    joined,
)
from mergence.families._transformers_towers import (
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

_LAYOUT = Layout("attention", ("attention_norm", "ffn_norm"), ((), ()), mlp=("feed_forward",))
_TOWER = full_name("pixtral", "PixtralVisionModel")
_AROUND = tuple(
    full_name(architecture, f"{names}{cls}")
    for architecture, names in (
        ("mistral3", "Mistral3"),
        ("mistral_large4", "MistralLarge4"),
        ("lighton_ocr", "LightOnOcr"),
    )
    for cls in ("Model", "ForConditionalGeneration")
)


class ReducedPixtralBlock(ReducedPackedBlock):
    """Mixed into `PixtralAttentionLayer`."""

    _mergence_attention: ClassVar[str] = "attention"

    def _mergence_halves(self: Any, **options: Any) -> tuple[FirstHalf, SecondHalf]:
        """The block's forward of images `[B, N, C]`, restated up to the MLP and from there on."""
        rope: Sequence[Tensor] = options["position_embeddings"]

        def first(x: Tensor, known: Carry) -> Sequence[Any]:
            here = slice(known.patches) if known.position is None else known.position
            rows = [table[here].view(-1, x.shape[1], table.shape[1]) for table in rope]
            return first_half(self, _LAYOUT, x, known.bias, position_embeddings=rows)

        return first, lambda x: second_half(self, _LAYOUT, x)


class ReducedStack:
    """Mixed into `PixtralTransformer`, the blocks' common parent."""

    def forward(
        self: Any,
        inputs_embeds: Tensor,
        attention_mask: Any = None,
        position_embeddings: Any = None,
        **options: Any,
    ) -> Any:
        """The blocks' forward, of a batch of images instead of one sequence, where tokens leave.

        The library's mask, a number for each pair of patches of all images, is then not needed.
        """
        dense: Any = super(ReducedStack, self)
        program: Program = self._mergence
        known = program.run.known()
        if not program.run.disabled and known is not None:
            patches = known.patches
            if min(program.tokens(patches)) < patches:
                inputs_embeds = inputs_embeds.view(-1, patches, inputs_embeds.shape[-1])
                attention_mask = None
                position_embeddings = tuple(table[:patches] for table in position_embeddings)
        return dense.forward(inputs_embeds, attention_mask, position_embeddings, **options)


class ReducedPixtral:
    """Mixed into `PixtralVisionModel`."""

    def forward(self: Any, pixel_values: Tensor, image_sizes: Any = None, **options: Any) -> Any:
        """The tower's forward, as one run for all images of one size that follow each other."""
        dense: Any = super(ReducedPixtral, self)
        program: Program = self._mergence
        run = program.run
        if run.disabled:
            return dense.forward(pixel_values, image_sizes, **options)
        require_own(program, self.transformer.layers)
        require_additive(self.config, ReducedOutputError)
        refuse_attentions(self.config, options)
        if image_sizes is None:
            image_sizes = [tuple(pixel_values.shape[-2:])] * len(pixel_values)
        batches = list(_batches(image_sizes, self.config.patch_size))
        for (rows, columns), _ in batches:
            program.tokens(rows * columns)  # refuses what the schedule cannot follow
        found = []
        for grid, images in batches:
            with run.forward(grid, every_patch=True):
                outputs = dense.forward(pixel_values[images], image_sizes[images], **options)
                spread = partial(_spread, known=run.known(), images=images.stop - images.start)
                found.append(each_tensor(outputs, spread))
        return joined(found)


def _batches(sizes: Any, side: int) -> Iterator[tuple[tuple[int, int], slice]]:
    """The grids of images, and which images have one: those of one size that follow each other."""
    first = 0
    for grid, group in groupby(
        (int(height) // side, int(width) // side) for height, width in sizes
    ):
        last = first + len(list(group))
        yield grid, slice(first, last)
        first = last


def _spread(x: Tensor, known: Carry | None, images: int) -> Tensor:
    """Tokens of images that follow each other, `[1, B N, C]`, for every patch."""
    return restored(x.reshape(images, -1, x.shape[-1]), known).reshape(1, -1, x.shape[-1])


class TransformersPixtral(Family):
    """transformers' `PixtralVisionModel`, alone and inside the models around it."""

    name: ClassVar[str] = "transformers_pixtral"
    models: ClassVar[tuple[str, ...]] = (_TOWER, *_AROUND)
    supported: ClassVar[str] = (
        "transformers' Pixtral tower, alone and in Mistral 3 (Mistral Small, Ministral), "
        "Mistral Large 4 and LightOnOCR"
    )
    oldest: ClassVar[str] = "5.6"

    def inspect(self, model: Any) -> ModelSpec:
        """Read a model of transformers; see `Family.inspect`."""
        tower = tower_in(model, {_TOWER}, self.supported)
        require_additive(tower.config, UnsupportedModelError)
        blocks = tuple(tower.transformer.layers)
        block = full_name("pixtral", "PixtralAttentionLayer")
        attention = _LAYOUT.attention, full_name("pixtral", "PixtralAttention")
        require_blocks(tower, blocks, block, attention, self.supported)
        config = tower.config
        parts: list[tuple[nn.Module, type]] = [
            (tower, ReducedPixtral),
            (tower.transformer, ReducedStack),
        ]
        if model is not tower:
            parts.append((model, ReducedContainer))
        return ModelSpec(
            blocks=blocks,
            patches=(config.image_size // config.patch_size) ** 2,
            cost=ModelCost(
                blocks=block_costs(blocks, _LAYOUT.attention, _LAYOUT.mlp, config.hidden_size),
                prefix=0,
                dim=config.hidden_size,
                head_dim=blocks[0].attention.head_dim,
                stem=tower.patch_conv.weight.numel(),
                head=0,
                placed=True,
            ),
            block_mixin=ReducedPixtralBlock,
            parts=tuple(parts),
            classes=0,
        )

    def tiny(self) -> Mapping[str, Callable[[], nn.Module]]:
        """None: the contract tests want an answer for each image, and its tokens are one sequence.

        `tests/families/test_transformers_pixtral.py` has its own.
        """
        return {}


FAMILY = TransformersPixtral()
