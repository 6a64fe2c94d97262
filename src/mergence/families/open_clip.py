"""open_clip's image towers, alone and inside CLIP: its own VisionTransformer, and timm's trunks.

Written against open_clip 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from mergence import family as families
from mergence.errors import UnsupportedModelError
from mergence.families._coarse import CoarseStem, CoarseTokens, can_read_coarsely
from mergence.families._common import (
    ReducedContainer,
    block_costs,
    linear_macs,
    mean_by_size,
    randomised,
    reduced_forward,
    refuse_mask,
    require_blocks,
    same_library,
    unwatched,
)
from mergence.families._multihead import MULTIHEAD, attention, scale_of
from mergence.family import Family, ModelSpec, qualified_names
from mergence.macs import ModelCost
from mergence.program import Program, require_own
from mergence.restoring import as_it_is, restored
from mergence.state import Run
from mergence.step import BlockStep

_TRANSFORMER = "open_clip.transformer."
_BLOCK = _TRANSFORMER + "ResidualAttentionBlock"
_TOWER = _TRANSFORMER + "VisionTransformer"
_TIMM_TOWER = "open_clip.timm_model.TimmModel"
_BOTH = ("open_clip.model.CLIP", "open_clip.model.CustomTextCLIP")


def first_half(block: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`ResidualAttentionBlock.forward` up to the MLP, with the attention's q and k."""
    y, q, k = attention(block.attn, block.ln_1(x), bias)
    return x + block.ls_1(y), q, k


def second_half(block: Any, x: Tensor) -> Tensor:
    """`ResidualAttentionBlock.forward` from there on."""
    z: Tensor = x + block.ls_2(block.mlp(block.ln_2(x)))
    return z


class ReducedBlock:
    """Mixed into `ResidualAttentionBlock`."""

    def forward(
        self: Any,
        q_x: Tensor,
        k_x: Tensor | None = None,
        v_x: Tensor | None = None,
        attn_mask: Tensor | None = None,
    ) -> Tensor:
        """The block's forward, with fewer tokens after it where the schedule says so."""
        step: BlockStep = self._mergence
        dense: Any = super(ReducedBlock, self)
        if step.disabled(q_x):
            y: Tensor = dense.forward(q_x, k_x, v_x, attn_mask)
            return y
        refuse_mask(attn_mask)
        return reduced_forward(
            self,
            q_x,
            dense.forward,
            lambda x, known: first_half(self, x, known.bias),
            partial(second_half, self),
            scale_of(self.attn),
        )


class ReducedTower:
    """Mixed into `VisionTransformer`."""

    def forward(self: Any, x: Tensor) -> Any:
        """The tower's forward, as one run."""
        dense: Any = super(ReducedTower, self)
        with _run(self, x):
            return dense.forward(x)

    def forward_intermediates(
        self: Any,
        x: Tensor,
        indices: int | list[int] | None = None,
        stop_early: bool = False,
        normalize_intermediates: bool = False,
        intermediates_only: bool = False,
        output_fmt: str = "NCHW",
        output_extra_tokens: bool = False,
    ) -> Any:
        """The tower's intermediates with a value for every patch, by `mergence.restore`."""
        dense: Any = super(ReducedTower, self)
        grid = output_fmt == "NCHW"
        with _run(self, x, every_patch=True) as run:
            # open_clip would normalise the tokens and fold them into the grid before every patch
            # has one again.
            layout = "NLC" if grid else output_fmt
            found = dense.forward_intermediates(
                x, indices, stop_early, False, intermediates_only, layout, output_extra_tokens
            )
            known, shape = run.known(), run.grid if grid else None

        normed: Callable[[Tensor], Tensor] = self.ln_post if normalize_intermediates else as_it_is
        found["image_intermediates"] = [
            restored(y, known, shape, norm=normed) for y in found["image_intermediates"]
        ]
        if output_extra_tokens:
            prefix = found["image_intermediates_prefix"]
            found["image_intermediates_prefix"] = list(map(normed, prefix))
        return found

    def _global_pool(self: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        dense: Any = super(ReducedTower, self)
        size = _size(self._mergence)
        # After attention pooling the tokens are its queries and have no sizes.
        if size is None or self.pool_type != "avg" or self.attn_pool is not None:
            pooled: tuple[Tensor, Tensor] = dense._global_pool(x)
            return pooled
        return mean_by_size(x[:, 1:], size), x[:, 1:]


class ReducedPool:
    """Mixed into `AttentionalPooler`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        """The pooling, in which a merged token counts as often as the patches in it."""
        dense: Any = super(ReducedPool, self)
        size = _size(self._mergence)
        if size is None:
            y: Tensor = dense.forward(x)
            return y
        x = self.ln_k(x)
        q = self.ln_q(self.query).unsqueeze(0).expand(x.shape[0], -1, -1)
        bias = F.pad(size.log(), (1, 0)).to(x.dtype)
        pooled: Tensor = self.attn(q, x, x, need_weights=False, key_padding_mask=bias)[0]
        return pooled


def _run(tower: Any, image: Tensor, *, every_patch: bool = False) -> AbstractContextManager[Run]:
    height, width = tower.patch_size
    program: Program = tower._mergence
    require_own(program, tower.transformer.resblocks)
    grid = image.shape[-2] // height, image.shape[-1] // width
    alone = (
        not every_patch
        and program.cost.prefix_alone
        and not tower.output_tokens  # which may be asked for later
        and unwatched(tower.transformer.resblocks, tower.transformer, tower.ln_post)
    )
    return program.run.forward(grid, every_patch=every_patch, prefix_alone=alone)


def _size(program: Program) -> Tensor | None:
    known = program.run.known()
    return None if known is None else known.size


class OpenClip(Family):
    """open_clip's image towers."""

    name: ClassVar[str] = "open_clip"
    models: ClassVar[tuple[str, ...]] = (*_BOTH, _TOWER, _TIMM_TOWER)
    supported: ClassVar[str] = (
        "open_clip's CLIP and SigLIP models and their image towers: its own VisionTransformer, and "
        "what timm builds and the timm family covers"
    )

    def inspect(self, model: Any) -> ModelSpec:
        """Read a model of open_clip; see `Family.inspect`."""
        names = set(qualified_names(type(model)))
        tower = model.visual if names.intersection(_BOTH) else model
        kind = set(qualified_names(type(tower)))
        if _TIMM_TOWER in kind:
            trunk = tower.trunk
            spec = families.find(trunk).inspect(trunk)
            cost = replace(spec.cost, head=spec.cost.head + linear_macs(tower.head))
            spec = replace(spec, cost=cost, classes=0)
        elif _TOWER in kind:
            spec = self._inspect_tower(tower)
        else:
            raise UnsupportedModelError(
                f"The image tower of this {type(model).__name__} is a "
                f"{qualified_names(type(tower))[0]}, which has no sequence of tokens to reduce. "
                f"Known: {self.supported}."
            )
        if any(part is model for part, _ in spec.parts):
            return spec
        return replace(spec, parts=(*spec.parts, (model, ReducedContainer)))

    def _inspect_tower(self, tower: Any) -> ModelSpec:
        blocks = tuple(tower.transformer.resblocks)
        require_blocks(tower, blocks, _BLOCK, ("attn", MULTIHEAD), self.supported)
        if getattr(tower, "attn_pool_contrastive", None) is not None:
            raise UnsupportedModelError(
                "The tower pools twice (attentional_pool='parallel' or 'cascade'), which open_clip "
                f"calls untested. Known: {self.supported}."
            )
        if not isinstance(tower.patch_dropout, nn.Identity):
            raise UnsupportedModelError(
                "The model drops random patches in training (patch_dropout > 0), so patches have "
                "no fixed place. Build it with force_patch_dropout=0."
            )
        width, pool = tower.conv1.out_channels, tower.attn_pool
        head = 0 if tower.proj is None else tower.proj.numel()
        per_token = 0
        parts: list[tuple[nn.Module, type]] = [(tower, ReducedTower)]
        if coarse := can_read_coarsely(tower.conv1, tower.grid_size):
            # Between positions and the norm before the first block stands this, an identity here.
            parts += [(tower.conv1, CoarseStem), (tower.patch_dropout, CoarseTokens)]
        if pool is not None:
            parts.append((pool, ReducedPool))
            queries, inner = pool.query.shape
            # Keys and values of every token, and its part in the two products with each query.
            per_token = 2 * width * inner + 2 * queries * inner
            head = (head if tower.pool_type == "tok" else head * queries) + 2 * queries * inner**2
        return ModelSpec(
            blocks=blocks,
            patches=tower.grid_size[0] * tower.grid_size[1],
            cost=ModelCost(
                blocks=block_costs(blocks, "attn", ("mlp",), width),
                prefix=1,
                dim=width,
                head_dim=blocks[0].attn.head_dim,
                stem=tower.conv1.weight.numel(),
                head=head,
                head_per_token=per_token,
                prefix_alone=same_library(tower, blocks[0])
                and tower.pool_type == "tok"
                and pool is None
                and not tower.output_tokens,
            ),
            block_mixin=ReducedBlock,
            parts=tuple(parts),
            classes=0,
            coarse=coarse,
        )

    def tiny(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Tiny random models, one for each kind covered."""
        size = {"image_size": 96, "patch_size": 16, "width": 48, "layers": 6}
        text = {"context_length": 8, "vocab_size": 64, "width": 24, "heads": 3, "layers": 1}

        def both(**vision: Any) -> nn.Module:
            from open_clip.model import CLIP

            model: nn.Module = CLIP(24, size | {"head_width": 16} | vision, text)
            return randomised(model).eval()

        def tower(**options: Any) -> nn.Module:
            from open_clip.transformer import VisionTransformer

            model: nn.Module = VisionTransformer(
                **size, heads=3, mlp_ratio=4.0, output_dim=24, **options
            )
            return randomised(model).eval()

        def trunk() -> nn.Module:
            import timm
            from open_clip.timm_model import TimmModel

            model: nn.Module = TimmModel("test_vit", embed_dim=48, pool="", proj="none")
            model.trunk = timm.create_model(
                "vit_base_patch16_siglip_224",
                embed_dim=48,
                depth=6,
                num_heads=3,
                img_size=96,
                patch_size=16,
            )
            return randomised(model).eval()

        average = {"pool_type": "avg", "final_ln_after_pool": True, "no_ln_pre": True}
        pooled = {"attentional_pool": True, "attn_pooler_queries": 4, "attn_pooler_heads": 3}
        return {
            "clip": both,
            "clip_avg": partial(both, **average),
            "tower": partial(tower, ls_init_value=0.3),
            "tower_attentional": partial(tower, **pooled, output_tokens=True),
            "timm_trunk": trunk,
        }


FAMILY = OpenClip()
