"""What is mixed into transformers' towers, their parts, and the models around them."""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mergence.errors import ReducedOutputError, UnsupportedModelError
from mergence.families._common import refuse_mask, refuse_padding, unwatched
from mergence.families._transformers import TOWERS, entry
from mergence.families._transformers_releases import path_of_blocks
from mergence.family import qualified_names
from mergence.program import Program, require_own
from mergence.restoring import restored
from mergence.state import Carry, Head, attach, attach_dense

_ADDITIVE = ("sdpa", "eager")


def tower_in(model: nn.Module, towers: Container[str], supported: str) -> Any:
    """The tower that a model is or has.

    Raises:
        UnsupportedModelError: It has none of these classes.
    """
    for module in model.modules():
        if any(name in towers for name in qualified_names(type(module))):
            return module
    raise UnsupportedModelError(
        f"This {type(model).__name__} has none of the towers that are known in it. Known: "
        f"{supported}."
    )


class ReducedTower:
    """Mixed into towers."""

    _mergence_full: ClassVar[bool] = False
    _mergence_pooled: ClassVar[bool] = False

    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        """The tower's forward, as one run."""
        dense: Any = super(ReducedTower, self)
        program: Program = self._mergence
        run = program.run
        image = _image(inputs, options)
        if run.disabled or image is None:  # without an image the library says what is missing
            return whole(dense.forward(*inputs, **options))
        refuse_mask(options.get("attention_mask"))
        refuse_padding(options.get("patch_attention_mask"))
        require_additive(self.config, ReducedOutputError)
        refuse_attentions(self.config, options)
        rows, columns = grid_of(self.config, image.shape)
        program.tokens(rows * columns)  # refuses a size at which the schedule cannot be followed
        states = options.get("output_hidden_states", self.config.output_hidden_states)
        every_patch = states or not self._mergence_pooled
        kind: Any = entry(TOWERS, self)
        blocks = self.get_submodule(path_of_blocks(kind, self))
        require_own(program, blocks)
        alone = (
            program.cost.prefix_alone
            and run.head == "prefix"
            and not states
            and unwatched(blocks, getattr(self, kind.norm), self)
        )
        with run.forward((rows, columns), every_patch=every_patch, prefix_alone=alone):
            outputs = dense.forward(*inputs, **options)
            last = outputs[0]
            if not isinstance(last, Tensor):
                return outputs  # a backbone's maps, made of what ReducedStack gave out
            known = run.known()
            final = run.known_after(getattr(self, kind.norm) if kind.norm else None)
            if self._mergence_full:
                return each_tensor(
                    outputs,
                    lambda x: with_every_patch(x, final if x is last else known, program.prefix),
                )
            if run.head != "mean" or known is None or known.size is None:
                attach(last, final)
                return outputs
            weighted = _times_size(last, known.size)
        if isinstance(outputs, tuple):
            return weighted, *outputs[1:]
        outputs.last_hidden_state = weighted
        return outputs


class ReducedFullTower(ReducedTower):
    """Mixed into towers around which a model reads a token for every patch."""

    _mergence_full = True


class ReducedPooledTower(ReducedTower):
    """Mixed into towers around which a model reads what was pooled."""

    _mergence_pooled = True


class ReducedMaskingTower(ReducedTower):
    """Mixed into towers that can leave patches out: the encoders of masked autoencoders."""

    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        """The tower's forward on all patches, in raster order."""
        image = _image(inputs, options)
        if self._mergence.run.disabled or image is None:
            return super().forward(*inputs, **options)
        kind: Any = entry(TOWERS, self)
        masks: str = kind.masks
        if len(inputs) > 1 or options.get(masks) is not None:
            raise ReducedOutputError(
                f"A reduced {type(self).__name__} was given `{masks}`, which leaves patches out or "
                "puts them in another order. Call it with the images alone, or use "
                "mergence.disabled(model)."
            )
        require_all_patches(self.config, ReducedOutputError)
        if masks == "noise":
            # The library would shuffle the patches even where it drops none; this is its own way
            # to leave them where they are.
            patches = math.prod(grid_of(self.config, image.shape))
            options["noise"] = torch.arange(patches, device=image.device).expand(len(image), -1)
        return super().forward(*inputs, **options)


class ReducedStack:
    """Mixed into the blocks' common parent in backbones, which make maps of what it gives out."""

    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        """The blocks' forward, in which tokens that become maps are there for every patch again."""
        dense: Any = super(ReducedStack, self)
        program: Program = self._mergence
        outputs = dense.forward(*inputs, **options)
        known = program.run.known()
        if program.run.disabled or known is None:
            return outputs
        stages = self.config.stage_names
        wanted = {*self.config.out_features, stages[-1]}

        outputs.hidden_states = tuple(
            with_every_patch(tokens, known, program.prefix) if stages[index] in wanted else tokens
            for index, tokens in enumerate(outputs.hidden_states)
        )
        return outputs


class ReducedEmbeddings:
    """Mixed into the embeddings of towers that can read patches coarsely."""

    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        """The embeddings' forward, after which the patches that are read coarsely have joined."""
        dense: Any = super(ReducedEmbeddings, self)
        program: Program = self._mergence
        y = dense.forward(*inputs, **options)
        if program.run.readings is not None and options.get("bool_masked_pos") is not None:
            raise ReducedOutputError(
                "A model that reads patches coarsely was given `bool_masked_pos`, and a region has "
                "no token of its own that could be masked. Apply with coarse=0, or use "
                "mergence.disabled(model)."
            )
        if isinstance(y, Tensor):
            return program.coarsened(y, getattr(self, "rms_norm", None))  # AIMv2's
        y.last_hidden_states = program.coarsened(y.last_hidden_states)  # DPT's
        return y


class ReducedHead:
    """Mixed into attention pooling, SigLIP's and AIMv2's."""

    def forward(self: Any, hidden_state: Tensor) -> Tensor:
        """The head's forward, in which a merged token counts as often as the patches in it."""
        dense: Any = super(ReducedHead, self)
        program: Program = self._mergence
        run = program.run
        known = run.known()
        if not run.disabled and known is None and hidden_state.shape[1] != program.patches:
            raise ReducedOutputError(
                f"The head was called by itself, with {hidden_state.shape[1]} tokens whose sizes "
                "are not known. Call the whole model, or use mergence.disabled(model)."
            )
        if run.disabled or known is None or known.size is None:
            y: Tensor = dense.forward(hidden_state)
            return y
        pooled: Tensor = _pooled(self, hidden_state, known.size.log().to(hidden_state.dtype))
        return pooled


def _pooled(head: Any, x: Tensor, bias: Tensor) -> Any:
    """The forward of an attention pooling, with a bias `[B, N]` on the keys."""
    batch, _, width = x.shape
    if hasattr(head, "probe"):
        probe = head.probe.repeat(batch, 1, 1)
        pooled = head.attention(probe, x, x, key_padding_mask=bias, need_weights=False)[0]
        return (pooled + head.mlp(head.layernorm(pooled)))[:, 0]
    q, k, v = (
        part.unflatten(2, (head.num_heads, -1)).transpose(1, 2)
        for part in (head.cls_token.expand(batch, -1, -1), head.k_proj(x), head.v_proj(x))
    )
    pooled = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None, None])
    return head.output_proj(pooled.transpose(1, 2).reshape(batch, width))


class ReducedClassifier:
    """Mixed into classifiers whose heads read the tower's prefix tokens."""

    _mergence_head: ClassVar[Head] = "prefix"

    def forward(self: Any, *inputs: Any, **options: Any) -> Any:
        """The model's forward, in which the tower knows what becomes of its tokens."""
        dense: Any = super(ReducedClassifier, self)
        program: Program = self._mergence
        require_own(program, self)
        with program.run.under(self._mergence_head):
            return dense.forward(*inputs, **options)


class AveragingClassifier(ReducedClassifier):
    """Mixed into classifiers whose heads take the mean of the tower's patch tokens."""

    _mergence_head: ClassVar[Head] = "mean"


def _image(inputs: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """The image that a tower was called with, None without one."""
    # Not by `main_input_name`, which older releases do not say of every tower.
    return inputs[0] if inputs else options.get("pixel_values", options.get("input_values"))


def each_tensor(found: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What a tower gives out, with all tokens in it changed, `[B, P + N, C]`."""
    if isinstance(found, Tensor):
        return change(found) if found.ndim == 3 else found  # pooled
    if isinstance(found, tuple):
        return tuple(each_tensor(one, change) for one in found)
    for name in list(found or ()):
        found[name] = each_tensor(found[name], change)
    return found


def whole(outputs: Any) -> Any:
    """What a tower gave out in `disabled`; its tokens remember that they are whole."""

    def remember(x: Tensor) -> Tensor:
        attach_dense(x)
        return x

    return outputs if torch.compiler.is_compiling() else each_tensor(outputs, remember)


def with_every_patch(tokens: Tensor, known: Carry | None, prefix: int) -> Tensor:
    """Tokens with a value for every patch, which remember that."""
    full = restored(tokens, known, prefix=prefix)
    if known is not None and full is not tokens:
        attach(full, Carry(patches=known.patches, grid=known.grid))
    return full


def _times_size(x: Tensor, size: Tensor) -> Tensor:
    """Tokens `[B, P + N, C]` of which the plain mean over the patch tokens is by size."""
    factor = size * (size.shape[1] / size.sum(dim=1, keepdim=True))
    prefix = x.shape[1] - size.shape[1]
    return x * F.pad(factor, (prefix, 0), value=1.0).to(x.dtype).unsqueeze(2)


def grid_of(config: Any, shape: Any) -> tuple[int, int]:
    """Patch rows and columns of inputs of a shape; a video's frames lie below each other."""
    if hasattr(config, "num_mel_bins"):  # spectrograms, all of one size, whose patches overlap
        side = config.patch_size
        return (
            (config.num_mel_bins - side) // config.frequency_stride + 1,
            (config.max_length - side) // config.time_stride + 1,
        )
    height, width = shape[-2:]
    tubelet = getattr(config, "tubelet_size", None)
    if isinstance(tubelet, (list, tuple)):  # ViViT's: frames, rows and columns
        depth, rows, columns = tubelet
    else:
        depth, (rows, columns) = tubelet, _pair(config.patch_size)
    frames = 1 if depth is None else shape[-4] // depth
    return frames * (height // rows), width // columns


def input_shape(config: Any) -> tuple[int, ...]:
    """The shape of one input of a model's own size."""
    if hasattr(config, "num_mel_bins"):
        return config.max_length, config.num_mel_bins
    # Those of BLIP do not say it.
    image = (getattr(config, "num_channels", 3), *_pair(config.image_size))
    return (config.num_frames, *image) if hasattr(config, "num_frames") else image


def _pair(side: Any) -> tuple[int, int]:
    rows, columns = side if isinstance(side, (list, tuple)) else (side, side)
    return rows, columns


def require_all_patches(config: Any, error: type[Exception]) -> None:
    if getattr(config, "mask_ratio", 0):
        raise error(
            f"The model drops {config.mask_ratio:.0%} of the patches at random "
            f"(mask_ratio={config.mask_ratio:g}). Set model.config.mask_ratio = 0.0, or load "
            "the checkpoint with mask_ratio=0.0, to encode whole images."
        )


def refuse_attentions(config: Any, options: Mapping[str, Any]) -> None:
    """Refuse to give out attention maps, which a configuration or an option asks for."""
    asked = options.get("output_attentions")
    if config.output_attentions if asked is None else asked:
        raise ReducedOutputError(
            "output_attentions of a reduced model would have to return maps between the "
            "original tokens, which are merged on the way. Leave it out, follow patches with "
            "mergence.trace(model, images), or use mergence.disabled(model)."
        )


def require_additive(config: Any, error: type[Exception]) -> None:
    if config._attn_implementation not in _ADDITIVE:
        raise error(
            f"The model's attention is '{config._attn_implementation}', which does not take the "
            "sizes of merged tokens. Use model.set_attn_implementation('sdpa')."
        )
