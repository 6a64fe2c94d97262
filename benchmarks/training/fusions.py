"""Other designs of the multi-scale fusion, as methods: `mstm` with each in place of its own.

Not in the package, because they do not pay either; docs/training-results.md has the numbers.
`ablations.py` trains with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from timm.layers import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)

from mergence.method import Learned, register
from mergence.methods import Mstm
from mergence.multiscale import MultiScaleFusion
from mergence.program import Program
from mergence.surgery import attachment


class OneScale(MultiScaleFusion):
    """The package's fusion with the direct neighbours alone."""

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See `Learned`."""
        image = x.transpose(1, 2).unflatten(2, grid)
        fine = self.gates[0] * self.fine(image)
        return x + fine.flatten(2).transpose(1, 2).to(x.dtype)

    def macs(self, tokens: int) -> int:
        """See `Learned`."""
        return self.gates.shape[1] * 10 * tokens


class CrossScale(Learned):
    """Each token attends to the means of the image's parts, at four scales."""

    SIDES = (1, 2, 4, 7)

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.width = dim // 4
        self.norm = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, self.width)
        self.kv = nn.Linear(dim, self.width + dim)
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See `Learned`."""
        normed = self.norm(x)
        image = normed.transpose(1, 2).unflatten(2, grid)
        scales = [F.adaptive_avg_pool2d(image, side).flatten(2) for side in self.SIDES]
        k, v = self.kv(torch.cat(scales, dim=2).transpose(1, 2)).split((self.width, x.shape[2]), 2)
        seen = F.scaled_dot_product_attention(self.q(normed), k, v)
        return x + (self.gate * seen).to(x.dtype)

    def macs(self, tokens: int) -> int:
        """See `Learned`."""
        dim, parts = len(self.gate), sum(side**2 for side in self.SIDES)
        return (tokens + parts * 5) * dim * self.width + tokens * parts * (self.width + dim)


class EarlierBlocks(Learned):
    """The tokens of the patch embedding and of the first two blocks are added."""

    BLOCKS = 2
    seen: ClassVar[list[Tensor]] = []

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(1 + self.BLOCKS))
        self.gates = nn.Parameter(torch.zeros(1 + self.BLOCKS, dim))

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """See `Learned`."""
        for gate, norm, earlier in zip(self.gates, self.norms, self.seen, strict=True):
            x = x + (gate * norm(earlier[:, -x.shape[1] :])).to(x.dtype)
        return x

    def macs(self, tokens: int) -> int:
        """See `Learned`."""
        return self.gates.numel() * tokens


class AfterEmbedding(MultiScaleFusion):
    """The package's fusion right after the patch embedding, before positions and all blocks."""

    now: ClassVar[tuple[AfterEmbedding, tuple[int, int]] | None] = None

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Nothing here, before the first reduction; see `_note`."""
        return x

    @classmethod
    def enter(cls, model: nn.Module, _: Any) -> None:
        """Before a forward: the fusion of this model, where it is reduced."""
        if not isinstance(model, VisionTransformer):
            return
        program = attachment(model)
        reduced = isinstance(program, Program) and program.reduces and not program.run.disabled
        own = [m for m in model.modules() if isinstance(m, cls)] if reduced else []
        cls.now = (own[0], model.patch_embed.grid_size) if own else None


def _note(module: nn.Module, _: Any, output: Any) -> Any:
    if isinstance(module, PatchEmbed):
        EarlierBlocks.seen = [output]
        if AfterEmbedding.now is not None:
            fusion, grid = AfterEmbedding.now
            return MultiScaleFusion.forward(fusion, output, grid)
    elif isinstance(module, Block) and len(EarlierBlocks.seen) <= EarlierBlocks.BLOCKS:
        EarlierBlocks.seen.append(output)
    return None


register_module_forward_hook(_note)
register_module_forward_pre_hook(AfterEmbedding.enter)


@register("mstm-one-scale")
@dataclass(frozen=True, kw_only=True)
class MstmOneScale(Mstm):
    """`mstm` with `OneScale`."""

    def learned(self, dim: int) -> Learned:
        """See `Method.learned`."""
        return OneScale(dim)


@register("mstm-cross-scale")
@dataclass(frozen=True, kw_only=True)
class MstmCrossScale(Mstm):
    """`mstm` with `CrossScale`."""

    def learned(self, dim: int) -> Learned:
        """See `Method.learned`."""
        return CrossScale(dim)


@register("mstm-earlier-blocks")
@dataclass(frozen=True, kw_only=True)
class MstmEarlierBlocks(Mstm):
    """`mstm` with `EarlierBlocks`."""

    def learned(self, dim: int) -> Learned:
        """See `Method.learned`."""
        return EarlierBlocks(dim)


@register("mstm-after-embedding")
@dataclass(frozen=True, kw_only=True)
class MstmAfterEmbedding(Mstm):
    """`mstm` with `AfterEmbedding`."""

    def learned(self, dim: int) -> Learned:
        """See `Method.learned`."""
        return AfterEmbedding(dim)
