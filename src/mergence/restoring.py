"""Dense outputs: every patch gets a value back after its token was merged."""

from __future__ import annotations

import torch
from torch import Tensor

from mergence.errors import ReducedOutputError
from mergence.plan import rows
from mergence.state import Carry, attached


def restore(tokens: Tensor, source_map: Tensor | None = None) -> Tensor:
    """Give every patch the value of the token that it was merged into.

    A patch that a method dropped gets zeros: nothing was computed for it, and no value of another
    patch is more right than any other.

    Example:
        >>> features = mergence.restore(model.forward_features(images))  # [B, P + patches, C]
        >>> trace = mergence.trace(model, images)
        >>> mergence.restore(tokens, trace.points[-1].source)  # [B, patches, C]

    Args:
        tokens: `[B, slots, C]` patch tokens after a reduction. Without `source_map`, the very
            tensor that `forward_features` of a reduced model returned: `[B, P + slots, C]`, which
            remembers its map.
        source_map: `[B, patches]` integers, the slot of each patch, -1 where it was dropped.

    Returns:
        `[B, patches, C]` in raster order. Without `source_map`, `[B, P + patches, C]`: the prefix
        tokens stay in front.

    Raises:
        ReducedOutputError: The tensor remembers no map, or the map does not fit the tokens.
    """
    if source_map is not None:
        _check(tokens, source_map)
        return _spread(tokens, source_map)
    carry = attached(tokens)
    if carry is None:
        raise ReducedOutputError(
            f"These tokens of shape {list(tokens.shape)} do not remember which patch is where. "
            "Pass the very tensor that forward_features of a reduced model returned, outside of "
            "compiled code, or a source map: mergence.restore(tokens, source_map)."
        )
    return restored(tokens, carry, prefix=tokens.shape[1] - carry.tokens)


def restored(
    tokens: Tensor,
    carry: Carry | None,
    grid: tuple[int, int] | None = None,
    *,
    prefix: int = 0,
) -> Tensor:
    """Restore patch tokens of any block of a forward.

    Args:
        tokens: `[B, P + N, C]` tokens after some block.
        carry: What was known at the end of that forward, or later than that block.
        grid: Rows and columns of patches to fold the result into, or None. Not with a prefix.
        prefix: P, the prefix tokens that stay in front.

    Returns:
        `[B, P + patches, C]`, the same tensor where nothing had been reduced;
        `[B, C, rows, columns]` with a grid.
    """
    source = None if carry is None else carry.source(tokens.shape[1] - prefix)
    full = tokens
    if source is not None:
        full = _spread(tokens[:, prefix:], source)
        if prefix:
            full = torch.cat((tokens[:, :prefix], full), dim=1)
    if grid is None:
        return full
    return full.transpose(1, 2).reshape(full.shape[0], -1, *grid).contiguous()


def _spread(tokens: Tensor, source: Tensor) -> Tensor:
    values = rows(tokens, source.long().clamp(min=0))
    return values.masked_fill((source < 0).unsqueeze(2), 0)


def _check(tokens: Tensor, source: Tensor) -> None:
    whole = not source.is_floating_point() and source.dtype != torch.bool
    if tokens.ndim != 3 or source.ndim != 2 or len(tokens) != len(source) or not whole:
        raise ReducedOutputError(
            f"Tokens of shape {list(tokens.shape)} and a source map of shape {list(source.shape)} "
            f"({source.dtype}) do not belong together. Give tokens [B, slots, C] and integers "
            "[B, patches]."
        )
    # Reading values would break a graph in two; there, gather itself complains.
    if not torch.compiler.is_compiling() and source.numel() and source.max() >= tokens.shape[1]:
        raise ReducedOutputError(
            f"The source map names slot {int(source.max())}, and there are {tokens.shape[1]} "
            "tokens. Give the patch tokens of the block that the map is of, without prefix tokens."
        )
