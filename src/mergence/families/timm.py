"""timm's plain Vision Transformers: ViT, DeiT, DeiT-3, DINOv2, CLIP and SigLIP image towers.

Written against timm 1.0.31; 1.0.21 is the oldest that works.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from mergence import ops
from mergence.errors import ReducedOutputError, UnsupportedModelError
from mergence.families._coarse import CoarseStem, can_read_coarsely
from mergence.families._common import (
    linear_macs,
    mean_by_size,
    pooling_costs,
    randomised,
    reduced_forward,
    refuse_mask,
    require_class,
    same_library,
    unwatched,
)
from mergence.families._timm_refused import REFUSED
from mergence.family import Family, ModelSpec
from mergence.macs import BlockCost, ModelCost
from mergence.program import Program, require_own
from mergence.restoring import as_it_is, restored
from mergence.state import Run, attach, attached
from mergence.step import BlockStep

_VIT = "timm.models.vision_transformer."
_ATTENTION = "timm.layers.attention.Attention"
_POOL = "timm.layers.attention_pool.AttentionPoolLatent"
_EMBED = "timm.layers.patch_embed.PatchEmbed"
_TINY = {"embed_dim": 48, "depth": 6, "num_heads": 3, "img_size": 96, "patch_size": 16}


def attention(attn: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Timm's `Attention.forward`, restated because it does not give out its q and k.

    Returns:
        The attention's output `[B, N, C]`, its queries and its keys `[B, H, N, D]`.
    """
    batch, tokens, _ = x.shape
    gate = gate_of(attn, x)
    qkv = attn.qkv(x).reshape(batch, tokens, 3, attn.num_heads, attn.head_dim)
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    q, k = attn.q_norm(q), attn.k_norm(k)
    y = attend(attn, q, k, v, bias, gate)
    return y, q, k


def gate_of(attn: Any, x: Tensor) -> Tensor | None:
    """The gate of timm's attentions `[B, N, C]`, which they have from 1.0.28 on; None for none."""
    gate = getattr(attn, "gate", None)
    return None if gate is None else gate(x).sigmoid()


def attend(
    attn: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, gate: Tensor | None
) -> Tensor:
    """What timm's attentions do from queries, keys and values `[B, H, N, D]` on, `[B, N, C]`."""
    if attn.fused_attn:
        dropout = attn.attn_drop.p if attn.training else 0.0
        y = ops.attend(q, k, v, bias, dropout)
    else:
        logits = (q * attn.scale) @ k.transpose(-2, -1)
        y = attn.attn_drop((logits if bias is None else logits + bias).softmax(dim=-1)) @ v
    y = attn.norm(y.transpose(1, 2).flatten(2))
    y = y if gate is None else y * gate
    out: Tensor = attn.proj_drop(attn.proj(y))
    return out


def first_half(block: Any, x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Timm's `Block.forward` up to the MLP, with the attention's q and k."""
    y, q, k = attention(block.attn, block.norm1(x), bias)
    return x + block.drop_path1(block.ls1(y)), q, k


def second_half(block: Any, x: Tensor) -> Tensor:
    """Timm's `Block.forward` from there on."""
    z: Tensor = block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return x + z


class ReducedBlock:
    """Mixed into `timm.models.vision_transformer.Block`."""

    def forward(self: Any, x: Tensor, *masks: Any, **named: Any) -> Tensor:
        """The block's forward, with fewer tokens after it where the schedule says so.

        What masks there are differs between timm's releases.
        """
        step: BlockStep = self._mergence
        dense: Any = super(ReducedBlock, self)
        if step.disabled(x):
            y: Tensor = dense.forward(x, *masks, **named)
            return y
        refuse_mask(*masks, *named.values())
        return reduced_forward(
            self,
            x,
            dense.forward,
            lambda x, known: first_half(self, x, known.bias),
            partial(second_half, self),
            self.attn.scale,
        )


class ReducedTrunk:
    """Mixed into the models, by a subclass that knows how their head pools."""

    _mergence_embed: ClassVar[str] = "patch_embed"

    def _mergence_run(
        self: Any, image: Tensor, *, every_patch: bool = False
    ) -> AbstractContextManager[Run]:
        embed = getattr(self, self._mergence_embed)
        rows, columns = map(int, embed.dynamic_feat_size(image.shape[-2:]))
        program: Program = self._mergence
        if not program.run.disabled:
            require_own(program, self.blocks)
            program.tokens(rows * columns)  # refuses a size at which it cannot be followed
        alone = (
            not every_patch
            and program.cost.prefix_alone
            and _reads_prefix_alone(self)  # still: its pooling may have been reset
            and unwatched(self.blocks, self.norm)
        )
        return program.run.forward((rows, columns), every_patch=every_patch, prefix_alone=alone)

    def forward(self: Any, x: Tensor, *masks: Any, **options: Any) -> Tensor:
        """The model's forward, as one run. The blocks refuse masks."""
        dense: Any = super(ReducedTrunk, self)
        # Without pooling tokens come out, and a subclass's own forward may look at them.
        whole = not self.global_pool or not same_library(self, self.blocks[0])
        with self._mergence_run(x, every_patch=whole):
            y: Tensor = dense.forward(x, *masks, **options)
            return y

    def forward_features(self: Any, x: Tensor, *masks: Any, **options: Any) -> Tensor:
        """The model's features, reduced; they remember what was merged."""
        dense: Any = super(ReducedTrunk, self)
        with self._mergence_run(x, every_patch=True) as run:
            y: Tensor = dense.forward_features(x, *masks, **options)
            attach(y, run.known_after(self.norm))
            return y

    def forward_intermediates(
        self: Any,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **options: Any,
    ) -> Any:
        """The model's intermediates with a value for every patch, by `mergence.restore`.

        The final features that come with them are reduced, as those of `forward_features`.
        """
        dense: Any = super(ReducedTrunk, self)
        dense = partial(dense.forward_intermediates, x, indices, return_prefix_tokens)
        if self._mergence.run.disabled:
            return dense(norm, stop_early, output_fmt, intermediates_only, **options)
        grid = output_fmt == "NCHW"
        with self._mergence_run(x, every_patch=True) as run:
            # timm would normalise the tokens and fold them into the grid before every patch has one
            # again.
            layout = "NLC" if grid else output_fmt
            found = dense(False, stop_early, layout, intermediates_only, **options)
            known, shape = run.known(), run.grid if grid else None
            final = run.known_after(self.norm)
        normed: Callable[[Tensor], Tensor] = self.norm if norm else as_it_is

        def full(y: Any) -> Any:
            if isinstance(y, tuple):  # with its prefix tokens
                return full(y[0]), *map(normed, y[1:])
            return restored(y, known, shape, norm=normed)

        if isinstance(found, dict):
            prefix = found.get("image_intermediates_prefix")
            if prefix is not None:
                found["image_intermediates_prefix"] = [*map(normed, prefix)]
            if not intermediates_only:
                attach(found["image_features"], final)
            return found | {"image_intermediates": [*map(full, found["image_intermediates"])]}
        if intermediates_only:
            return [full(y) for y in found]
        attach(found[0], final)
        return found[0], [full(y) for y in found[1]]


class ReducedModel(ReducedTrunk):
    """Mixed into models that pool in a `pool` of their own."""

    def pool(self: Any, x: Tensor, pool_type: str | None = None) -> Tensor:
        """The model's pooling, in which a merged token counts as often as the patches in it."""
        dense: Any = super(ReducedModel, self)
        kind = self.global_pool if pool_type is None else pool_type
        size = sizes_to_pool(self, x, self.attn_pool is not None or kind in ("avg", "avgmax"))
        if size is None:
            y: Tensor = dense.pool(x, pool_type)
            return y
        return pool_by_size(self, x, size, kind)


def sizes_to_pool(model: Any, x: Tensor, by_size: bool) -> Tensor | None:
    """The sizes `[B, N]` of a head's tokens, None where it has to do nothing about them.

    Args:
        model: The model.
        x: `[B, P + N, C]` what its head got.
        by_size: Whether a merged token has to count as often as the patches in it.

    Raises:
        ReducedOutputError: It has to, and the sizes are not known.
    """
    program: Program = model._mergence
    run = program.run
    if run.disabled or not by_size:
        return None
    carry = attached(x) or run.known()  # a forward may ask for the features of several images
    if carry is None and x.shape[1] != program.prefix + program.patches:
        raise ReducedOutputError(
            f"The head got {x.shape[1]} tokens whose sizes are not known, and it pools by "
            "size. Pass it the very tensor that forward_features returned, or call the whole "
            "model."
        )
    return None if carry is None else carry.size


def pool_by_size(model: Any, x: Tensor, size: Tensor, kind: str) -> Tensor:
    """The model's pooling of tokens `[B, P + N, C]` whose sizes `[B, N]` are known."""
    prefix: int = model.num_prefix_tokens
    # EVA has no such option: its attention pool takes all tokens, its averages the patches.
    if getattr(model, "pool_include_prefix", model.attn_pool is not None):
        size = F.pad(size, (prefix, 0), value=1.0)
    else:
        x = x[:, prefix:]
    if model.attn_pool is not None:
        y: Tensor = model.attn_pool(x, attn_mask=size.log().to(x.dtype)[:, None, None, :])
        return y
    mean = mean_by_size(x, size)
    return mean if kind == "avg" else 0.5 * (x.amax(dim=1) + mean)


class ReducedViT(ReducedModel):
    """Mixed into `timm.models.vision_transformer.VisionTransformer`."""

    def _pos_embed(self: Any, x: Tensor) -> Any:
        """The tokens with their positions, some of them read coarsely."""
        dense: Any = super(ReducedViT, self)
        embed = self.patch_embed
        return self._mergence.coarsened(dense._pos_embed(x), embed.norm, embed.proj)


class Timm(Family):
    """timm's `VisionTransformer` and `VisionTransformerDistilled`."""

    name: ClassVar[str] = "timm"
    models: ClassVar[tuple[str, ...]] = (_VIT + "VisionTransformer",)
    supported: ClassVar[str] = (
        "timm's VisionTransformer: ViT, DeiT, distilled DeiT, DeiT-3, DINOv2 with and without "
        "registers, CLIP and SigLIP image towers"
    )
    refused: ClassVar[Mapping[str, str]] = REFUSED
    oldest: ClassVar[str] = "1.0.21"
    block: ClassVar[tuple[str, ...]] = (_VIT + "Block",)
    attention: ClassVar[tuple[str, ...]] = (_ATTENTION,)
    embed: ClassVar[tuple[str, ...]] = (_EMBED,)
    block_mixin: ClassVar[type] = ReducedBlock
    model_mixin: ClassVar[type[ReducedTrunk]] = ReducedViT
    kinds: ClassVar[Mapping[str, tuple[str, Mapping[str, Any]]]] = {
        "vit": ("vit_tiny_patch16_224", {}),
        "vit_avg": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
        "deit_distilled": ("deit_tiny_distilled_patch16_224", {}),
        "deit3": ("deit3_small_patch16_224", {"init_values": 0.1}),
        "qk_norm": ("vit_tiny_patch16_224", {"qk_norm": True}),
        "dinov2": ("vit_small_patch14_dinov2", {"init_values": 0.1}),
        "dinov2_reg": ("vit_small_patch14_reg4_dinov2", {"init_values": 0.1}),
        "clip": ("vit_base_patch16_clip_224", {}),
        "siglip": ("vit_base_patch16_siglip_224", {}),
        "siglip_gap": ("vit_base_patch16_siglip_gap_224", {}),
    }

    def inspect(self, model: Any) -> ModelSpec:
        """Read a timm model; see `Family.inspect`."""
        for index, block in enumerate(model.blocks, start=1):
            self._require(block, self.block, f"block {index}")
            self._require(block.attn, self.attention, f"the attention of block {index}")
        embed = getattr(model, self.model_mixin._mergence_embed)
        self._require(embed, self.embed, "the patch embedding")
        if getattr(model, "attn_pool", None) is not None:
            self._require(model.attn_pool, (_POOL,), "the attention pool")
        if not isinstance(getattr(model, "patch_drop", None), nn.Identity | None):
            raise UnsupportedModelError(
                "The model drops random patches in training (patch_drop_rate > 0), so patches have "
                "no fixed place. Build it with patch_drop_rate=0."
            )
        blocks = tuple(model.blocks)
        coarse = issubclass(self.model_mixin, ReducedViT) and can_read_coarsely(
            embed.proj, embed.grid_size
        )
        head, per_token = _head_costs(model)
        head_dim = round(blocks[0].attn.scale ** -2)  # not all note it, and projections are wrapped
        cost = ModelCost(
            blocks=tuple(
                BlockCost(
                    attention=self._attention_macs(b.attn),
                    mlp=linear_macs(b.mlp),
                    width=b.attn.num_heads * head_dim,
                )
                for b in blocks
            ),
            prefix=model.num_prefix_tokens,
            dim=model.embed_dim,
            head_dim=head_dim,
            stem=embed.proj.weight.numel(),
            head=head,
            head_per_token=per_token,
            placed=self._looks_at_places(model),
            prefix_alone=same_library(model, blocks[0]) and _reads_prefix_alone(model),
        )
        return ModelSpec(
            blocks=blocks,
            patches=self._patches(model),
            cost=cost,
            block_mixin=self._block_mixin(blocks),
            parts=((model, self.model_mixin), *([(embed.proj, CoarseStem)] if coarse else [])),
            classes=model.num_classes,
            coarse=coarse,
            class_token=getattr(
                model, "has_class_token", getattr(model, "cls_token", None) is not None
            ),
        )

    def _attention_macs(self, attn: Any) -> int:
        return linear_macs(attn)

    def _looks_at_places(self, model: Any) -> bool:
        return getattr(model, "rope", None) is not None

    def _patches(self, model: Any) -> int:
        """Patches at the model's own input size."""
        return int(model.patch_embed.num_patches)

    def _block_mixin(self, blocks: tuple[Any, ...]) -> type:
        return self.block_mixin

    def _require(self, module: nn.Module, allowed: tuple[str, ...], what: str) -> None:
        what = f"In this {self.models[0]}, {what}"
        require_class(module, allowed, what, self.supported)

    def tiny(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Tiny random models, one for each kind of timm model covered."""

        def builder(architecture: str, options: Mapping[str, Any]) -> Callable[[], nn.Module]:
            def build() -> nn.Module:
                import timm

                model: nn.Module = timm.create_model(architecture, **options, **_TINY)
                return randomised(model).eval()

            return build

        return {name: builder(*kind) for name, kind in self.kinds.items()}


def _reads_prefix_alone(model: Any) -> bool:
    pooled = model.global_pool == "token" and getattr(model, "attn_pool", None) is None
    # Somebody may have covered what reads the tokens on the model itself.
    own = {"forward_features", "pool", "forward_head"}.isdisjoint(vars(model))
    return pooled and own and model.num_prefix_tokens > 0


def _head_costs(model: Any) -> tuple[int, int]:
    """What the head costs: whatever the tokens, and for each."""
    heads = [getattr(model, name) for name in ("head", "head_dist") if hasattr(model, name)]
    once, pool = sum(map(linear_macs, heads)), getattr(model, "attn_pool", None)
    if pool is None:
        return (once, 0) if model.global_pool else (0, once)
    pooling, per_token = pooling_costs(pool, model.embed_dim)
    return once + pooling, per_token


FAMILY = Timm()
