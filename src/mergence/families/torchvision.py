"""torchvision's Vision Transformers: vit_b_16, vit_b_32, vit_l_16, vit_l_32, vit_h_14.

Written against torchvision 0.29.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from mergence.families._coarse import CoarseStem, CoarseTokens, can_read_coarsely
from mergence.families._common import (
    block_costs,
    linear_macs,
    randomised,
    reduced_forward,
    require_blocks,
    same_library,
    unwatched,
)
from mergence.families._multihead import MULTIHEAD, attention, scale_of
from mergence.family import Family, ModelSpec
from mergence.macs import ModelCost
from mergence.program import Program, require_own
from mergence.step import BlockStep

_VIT = "torchvision.models.vision_transformer."


def first_half(block: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`EncoderBlock.forward` up to the MLP, with the attention's q and k."""
    y, q, k = attention(block.self_attention, block.ln_1(x), bias)
    return x + block.dropout(y), q, k


def second_half(block: Any, x: Tensor) -> Tensor:
    """`EncoderBlock.forward` from there on."""
    z: Tensor = x + block.mlp(block.ln_2(x))
    return z


class ReducedBlock:
    """Mixed into `EncoderBlock`."""

    def forward(self: Any, input: Tensor) -> Tensor:
        """The block's forward, with fewer tokens after it where the schedule says so."""
        step: BlockStep = self._mergence
        dense: Any = super(ReducedBlock, self)
        if step.disabled(input):
            y: Tensor = dense.forward(input)
            return y
        return reduced_forward(
            self,
            input,
            dense.forward,
            lambda x, known: first_half(self, x, known.bias),
            partial(second_half, self),
            scale_of(self.self_attention),
        )


class ReducedModel:
    """Mixed into `VisionTransformer`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """The model's forward, as one run."""
        dense: Any = super(ReducedModel, self)
        program: Program = self._mergence
        require_own(program, self.encoder.layers)
        grid = x.shape[-2] // self.patch_size, x.shape[-1] // self.patch_size
        alone = program.cost.prefix_alone and unwatched(
            self.encoder.layers, self.encoder.ln, self.encoder
        )
        with program.run.forward(grid, prefix_alone=alone):
            y: Tensor = dense.forward(x)
            return y


class Torchvision(Family):
    """torchvision's `VisionTransformer`."""

    name: ClassVar[str] = "torchvision"
    models: ClassVar[tuple[str, ...]] = (_VIT + "VisionTransformer",)
    supported: ClassVar[str] = "torchvision's VisionTransformer: vit_b_16, vit_b_32, vit_l_16, ..."

    def inspect(self, model: Any) -> ModelSpec:
        """Read a model of torchvision; see `Family.inspect`."""
        blocks = tuple(model.encoder.layers)
        parts_of = "self_attention", MULTIHEAD
        require_blocks(model, blocks, _VIT + "EncoderBlock", parts_of, self.supported)
        side = model.image_size // model.patch_size
        heads = [m for m in model.heads.modules() if isinstance(m, nn.Linear)]
        parts: list[tuple[nn.Module, type]] = [(model, ReducedModel)]
        if coarse := can_read_coarsely(model.conv_proj, (side, side)):
            # The encoder adds positions; its dropout is the first that has tokens with them.
            parts += [(model.conv_proj, CoarseStem), (model.encoder.dropout, CoarseTokens)]
        return ModelSpec(
            blocks=blocks,
            patches=model.seq_length - 1,
            cost=ModelCost(
                blocks=block_costs(blocks, "self_attention", ("mlp",), model.hidden_dim),
                prefix=1,
                dim=model.hidden_dim,
                head_dim=blocks[0].self_attention.head_dim,
                stem=_stem_macs(model),
                head=linear_macs(model.heads),
                prefix_alone=same_library(model, blocks[0]),
            ),
            block_mixin=ReducedBlock,
            parts=tuple(parts),
            classes=heads[-1].out_features if heads else 0,
            coarse=coarse,
        )

    def tiny(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Tiny random models, one for each kind covered."""

        def build(**options: Any) -> nn.Module:
            from torchvision.models import VisionTransformer

            size = {"image_size": 96, "patch_size": 16, "num_layers": 6, "num_heads": 3}
            model: nn.Module = VisionTransformer(**size, hidden_dim=48, mlp_dim=192, **options)
            return randomised(model).eval()

        return {
            "vit": partial(build, num_classes=5),
            "vit_representation": partial(build, num_classes=5, representation_size=24),
        }


def _stem_macs(model: Any) -> int:
    """Multiply-adds of the stem for one patch, of one or several convolutions."""
    convolutions = [m for m in model.conv_proj.modules() if isinstance(m, nn.Conv2d)]
    side, macs = model.image_size, 0
    for convolution in convolutions:
        side = (side + 2 * convolution.padding[0] - convolution.kernel_size[0]) // (
            convolution.stride[0]
        ) + 1
        macs += side**2 * convolution.weight.numel()
    return int(macs // (model.seq_length - 1))


FAMILY = Torchvision()
