"""What is mixed into transformers' towers of packed patches, their blocks, and what reads them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mergence.errors import ReducedOutputError
from mergence.families._coarse import embeds_by_product
from mergence.families._common import reduced_forward
from mergence.families._transformers_blocks import attend, scale_of
from mergence.families._transformers_towers import refuse_attentions, require_additive
from mergence.families._windows import Windows
from mergence.program import Program, require_own
from mergence.restoring import restored
from mergence.state import Carry, attach, attached
from mergence.step import BlockStep

FirstHalf = Callable[[Tensor, Carry], Sequence[Any]]
SecondHalf = Callable[[Tensor], Tensor]

# What the library computes from the grids, unless it is given it.
_COMPUTED = (
    *("cu_seqlens", "max_seqlen", "position_ids", "interp_indices", "interp_weights"),
    *("window_index", "cu_window_seqlens", "max_window_seqlen"),
)


class ReducedPackedTower:
    """Mixed into towers."""

    _mergence_bare: ClassVar[bool] = False

    def forward(self: Any, hidden_states: Tensor, grid_thw: Tensor, **options: Any) -> Any:
        """The tower's forward, as one run for all images of one size that follow each other."""
        dense: Any = super(ReducedPackedTower, self)
        program: Program = self._mergence
        run = program.run
        if run.disabled:
            return dense.forward(hidden_states, grid_thw, **options)
        require_own(program, self.blocks)
        require_additive(self.config, ReducedOutputError)
        refuse_attentions(self.config, options)
        batches = list(_batches(grid_thw))
        described = batches[-1].patches.stop if batches else 0
        if len(hidden_states) != described:
            raise ReducedOutputError(
                f"A reduced {type(self).__name__} was given {len(hidden_states)} patches, and "
                f"grids of {described}. Give the grid of every image, and all of its patches."
            )
        given = [name for name in _COMPUTED if options.get(name) is not None]
        if given and len(batches) > 1:
            raise ReducedOutputError(
                f"A reduced {type(self).__name__} was given {', '.join(given)} for images of "
                "several sizes, which it takes one size after the other. Leave them out, or use "
                "mergence.disabled(model)."
            )
        for batch in batches:
            program.tokens(batch.rows * batch.columns)  # refuses what the schedule cannot follow
        asked = options.get("return_dict")
        as_tuple = not (self.config.return_dict if asked is None else asked)
        if as_tuple:
            options["return_dict"] = True  # a tuple does not say which of it is what
        found = []
        for batch in batches:
            with run.forward((batch.rows, batch.columns), every_patch=True):
                outputs = dense.forward(
                    hidden_states[batch.patches], grid_thw[batch.images], **options
                )
                known = run.known()
                outputs = _every_patch(outputs, known, batch.frames, self._mergence_bare)
                if as_tuple and isinstance(outputs, Mapping):
                    outputs = tuple(outputs.values())
                found.append(outputs)
        return joined(found)


class ReducedBareTower(ReducedPackedTower):
    """Mixed into towers whose last hidden state is what their last block gives out."""

    _mergence_bare = True


@dataclass(frozen=True)
class _Batch:
    """Images of one size that follow each other.

    Attributes:
        rows: Rows of patches.
        columns: Columns of patches.
        frames: All frames of these images.
        images: Which images they are.
        patches: Which patches they have.
    """

    rows: int
    columns: int
    frames: int
    images: slice
    patches: slice


def _batches(grid_thw: Tensor) -> Iterator[_Batch]:
    images = patches = 0
    for (rows, columns), group in groupby(grid_thw.tolist(), key=lambda grid: tuple(grid[1:])):
        frames = [grid[0] for grid in group]
        after, number = images + len(frames), sum(frames)
        last = patches + number * rows * columns
        yield _Batch(rows, columns, number, slice(images, after), slice(patches, last))
        images, patches = after, last


class ReducedStem:
    """Mixed into patch embeddings, a convolution in which every input is one patch.

    In half precision it embeds by a product where tokens leave, as `CoarseStem` does: a CPU takes
    fifty times as long for a convolution of this shape.
    """

    def _conv_forward(self: Any, patch: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        program: Program = self._mergence
        if embeds_by_product(program, patch) and patch.shape[2:] == weight.shape[2:]:
            return F.linear(patch.flatten(1), weight.flatten(1), bias)[..., None, None, None]
        dense: Any = super(ReducedStem, self)
        y: Tensor = dense._conv_forward(patch, weight, bias)
        return y


class ReducedReader:
    """Mixed into what reads a token for every patch."""

    def forward(self: Any, x: Tensor, *inputs: Any, **options: Any) -> Any:
        """The module's forward, of a value for every patch."""
        dense: Any = super(ReducedReader, self)
        program: Program = self._mergence
        run = program.run
        known = run.known()
        if known is not None:
            x = _spread(x, known, len(x) // known.tokens)
        return dense.forward(x, *inputs, **options)


class ReducedPackedBlock:
    """Mixed into the library's blocks."""

    _mergence_attention: ClassVar[str] = "attn"

    def _mergence_halves(self: Any, **options: Any) -> tuple[FirstHalf, SecondHalf]:
        """The block's forward of frames `[B, N, C]`, restated up to the MLP and from there on."""
        rope: Sequence[Tensor] = options["position_embeddings"]
        ends: Tensor = options["cu_seqlens"][1:]
        return (
            lambda x, known: _first_half(self, x, known, rope, ends),
            lambda x: x + self.mlp(self.norm2(x)),
        )

    def forward(self: Any, hidden_states: Tensor, *inputs: Any, **options: Any) -> Tensor:
        """The block's forward, with fewer tokens after it where the schedule says so."""
        step: BlockStep = self._mergence
        run = step.program.run
        *one, _, channels = hidden_states.shape  # Pixtral's have three dimensions

        def whole(x: Tensor) -> Tensor:
            dense: Any = super(ReducedPackedBlock, self)
            y: Tensor = dense.forward(x.reshape(*one, -1, channels), *inputs, **options)
            return y.view_as(x)

        if step.disabled(hidden_states):
            return whole(hidden_states)
        known = run.known() or attached(hidden_states)
        if known is None:
            raise ReducedOutputError(
                "A block of a reduced model was called by itself, and which of its tokens are of "
                "one image is not known. Call the model's forward, or use "
                "mergence.disabled(model) to run single blocks. Gradient checkpointing must be "
                "that with use_reentrant=False."
            )
        attach(hidden_states, known)  # gradient checkpointing calls again when the run is over
        x = hidden_states.view(-1, known.tokens, channels)
        attach(x, known)
        first, second = self._mergence_halves(**options)
        attn = getattr(self, self._mergence_attention)
        y = reduced_forward(self, x, whole, first, second, scale_of(attn))
        tokens = y.reshape(*one, -1, channels)
        attach(tokens, attached(y))
        return tokens


def _first_half(
    block: Any, x: Tensor, known: Carry, rope: Sequence[Tensor], ends: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The library's block up to its MLP, of frames `[B, N, C]`, with q and k `[B, H, N, D]`.

    Args:
        block: The block.
        x: The tokens.
        known: What is known about them.
        rope: The rotation of each patch, of one frame after the other.
        ends: Where what attends to each other ends, frames or windows of them.
    """
    attn = block.attn
    qkv: Tensor = attn.qkv(block.norm1(x))
    q, k, v = qkv.view(*x.shape[:2], 3, attn.num_heads, -1).unbind(2)
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    # All frames have the places of the first.
    here = slice(known.patches) if known.position is None else known.position
    home = sys.modules[type(attn).__module__]
    q, k = home.apply_rotary_pos_emb_vision(q, k, *(table[here] for table in rope))
    number = len(ends) // len(x)
    if number == 1:
        y = _attend(attn, (q, k, v), known.bias)
    else:
        position = known.position
        if position is None:
            position = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        windows = Windows.of(position, ends[:number], window(attn.config))
        inside = windows.spread(torch.stack((q, k, v), dim=2).flatten(2))
        inside = inside.view(*inside.shape[:2], 3, *q.shape[2:])
        y = windows.collect(_attend(attn, inside.unbind(2), windows.bias(known.bias, x)))
    return x + attn.proj(y), q.transpose(1, 2), k.transpose(1, 2)


def _attend(attn: Any, qkv: Sequence[Tensor], bias: Tensor | None) -> Tensor:
    """The product of queries, keys and values `[B, N, H, D]`, `[B, N, H D]`."""
    q, k, v = (part.transpose(1, 2) for part in qkv)
    return attend(attn, q, k, v, bias, attn.attention_dropout, is_causal=False)


def window(config: Any) -> int:
    """How many patches there are in a window of a tower whose blocks attend within windows."""
    side = config.window_size // config.spatial_merge_size // config.patch_size
    return int((side * config.spatial_merge_size) ** 2)


def _spread(x: Tensor, known: Carry, frames: int) -> Tensor:
    """Tokens of frames that follow each other, `[B N, C]`, for every patch."""
    return restored(x.view(frames, -1, x.shape[-1]), known).flatten(0, 1)


def _every_patch(outputs: Any, known: Carry | None, frames: int, bare: bool) -> Any:
    """What a tower gives out, with a value for every patch wherever there are tokens."""
    if known is None or isinstance(outputs, Tensor):
        return outputs
    last, states = outputs.get("last_hidden_state"), outputs.get("hidden_states")
    if states is not None:  # of which the last may be that of the tower
        outputs["hidden_states"] = tuple(
            x if x is last and not bare else _spread(x, known, frames) for x in states
        )
    if bare:
        outputs["last_hidden_state"] = _spread(last, known, frames)
    return outputs


def in_sequence(parts: list[Tensor]) -> Tensor:
    """Packed tokens of some images, and then of others."""
    return torch.cat(parts, dim=-2)


def joined(found: Sequence[Any], join: Callable[[list[Tensor]], Tensor] = in_sequence) -> Any:
    """What a tower gave out for some images, and then for others, in one."""
    one = found[0]
    if len(found) == 1 or one is None:
        return one
    if isinstance(one, Tensor):
        return join(list(found))
    if isinstance(one, Mapping):
        return type(one)(**{name: joined([each[name] for each in found], join) for name in one})
    return type(one)(joined(each, join) for each in zip(*found, strict=True))
