"""How the blocks of `PlainViT` look. The file does not import the model's own file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from mergence import ops
from mergence.families import (
    linear_macs,
    mean_by_size,
    randomised,
    reduced_forward,
    require_class,
)
from mergence.family import Family, ModelSpec
from mergence.macs import BlockCost, ModelCost

_VIT = "mergence_plainvit.vit."


def first_half(block: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`Block.forward` up to the MLP, with the attention's q and k."""
    a = block.attention
    packed = a.qkv(block.norm1(x))
    q, k, v = packed.unflatten(2, (3, a.heads, a.head_dim)).permute(2, 0, 3, 1, 4)
    y = ops.attend(q, k, v, bias)
    return x + a.out(y.transpose(1, 2).flatten(2)), q, k


def second_half(block: Any, x: Tensor) -> Tensor:
    """`Block.forward` from there on."""
    z: Tensor = x + block.mlp(block.norm2(x))
    return z


class ReducedBlock:
    """Mixed into `Block`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """The block's forward, with fewer tokens after it where the schedule says so."""
        dense: Any = super(ReducedBlock, self)
        if self._mergence.program.run.disabled:
            y: Tensor = dense.forward(x)
            return y
        return reduced_forward(
            self,
            x,
            dense.forward,
            lambda x, known: first_half(self, x, known.bias),
            partial(second_half, self),
            self.attention.head_dim**-0.5,
        )


class ReducedModel:
    """Mixed into `PlainViT`."""

    def forward(self: Any, images: Tensor) -> Tensor:
        """The model's forward, as one run."""
        dense: Any = super(ReducedModel, self)
        grid = images.shape[-2] // self.patch_size, images.shape[-1] // self.patch_size
        with self._mergence.run.forward(grid):
            y: Tensor = dense.forward(images)
            return y

    def pool(self: Any, x: Tensor) -> Tensor:
        """The mean in which a merged token counts as often as the patches in it."""
        dense: Any = super(ReducedModel, self)
        known = self._mergence.run.known()
        if known is None or known.size is None:
            y: Tensor = dense.pool(x)
            return y
        return mean_by_size(x[:, 1:], known.size)


class PlainViTs(Family):
    """The models of this package."""

    name: ClassVar[str] = "plainvit"
    models: ClassVar[tuple[str, ...]] = (_VIT + "PlainViT",)
    supported: ClassVar[str] = "mergence_plainvit's PlainViT"

    def inspect(self, model: Any) -> ModelSpec:
        """Read a model; see `Family.inspect`."""
        blocks = tuple(model.blocks)
        for index, block in enumerate(blocks, start=1):
            require_class(block, _VIT + "Block", f"Block {index}", self.supported)
            require_class(
                block.attention,
                _VIT + "Attention",
                f"The attention of block {index}",
                self.supported,
            )
        return ModelSpec(
            blocks=blocks,
            patches=model.patches,
            cost=ModelCost(
                blocks=tuple(
                    BlockCost(
                        attention=linear_macs(block.attention),
                        mlp=linear_macs(block.mlp),
                        width=model.dim,
                    )
                    for block in blocks
                ),
                prefix=1,  # the class token
                dim=model.dim,
                head_dim=blocks[0].attention.head_dim,
                stem=model.embed.weight.numel(),
                head=linear_macs(model.head),
            ),
            block_mixin=ReducedBlock,
            parts=((model, ReducedModel),),
            classes=model.head.out_features,
        )

    def tiny(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Tiny random models, one for each kind covered."""

        def vit() -> nn.Module:
            from mergence_plainvit.vit import PlainViT

            model = PlainViT(image_size=96, dim=48, depth=6, heads=3, classes=5)
            return randomised(model).eval()

        return {"vit": vit}


FAMILY = PlainViTs()
