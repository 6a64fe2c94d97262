"""Dense outputs: every patch gets a value back after its token was merged."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from mergence.errors import ReducedOutputError
from mergence.plan import spread
from mergence.state import Carry, attached, attached_dense


def as_it_is(x: Tensor) -> Tensor:
    """What stands in for a norm or another module where there is none."""
    return x


def restore(tokens: Tensor, source_map: Tensor | None = None) -> Tensor:
    """Give every patch a value again.

    It is the value of the token that the patch was merged into, plus what set the two apart when
    they were merged: what later blocks add to the residual stream they add to the token. Of that
    difference as much is left as of those between the tokens that went on, by least squares, for
    each image and each reduction. So a merge is undone exactly where it happens. A patch that a
    method dropped has its value of then, in the same share. This project's own; ToMe for Stable
    Diffusion (arXiv 2303.17604, section 3), which restores after every layer, copies the token.

    Example:
        >>> features = mergence.restore(model.forward_features(images))  # [B, P + patches, C]
        >>> trace = mergence.trace(model, images)
        >>> mergence.restore(tokens, trace.points[-1].source)  # [B, patches, C]

    Args:
        tokens: `[B, slots, C]` patch tokens after a reduction. Without `source_map`, the very
            tensor that `forward_features` of a reduced model returned, or in transformers its
            `last_hidden_state`: `[B, P + slots, C]`, which remembers what was merged. What was
            written into it since is not seen. One of `mergence.disabled` is whole already.
        source_map: `[B, patches]` integers, the slot of each patch, -1 where it was dropped. Of
            such tokens nothing else is known: patches of a token share its value, and those that
            were dropped get zeros.

    Returns:
        `[B, patches, C]` in raster order. Without `source_map`, `[B, P + patches, C]`: the prefix
        tokens stay in front.

    Raises:
        ReducedOutputError: The tensor remembers no map, or the map does not fit the tokens.
    """
    if source_map is not None:
        _check(tokens, source_map)
        return spread(tokens, source_map.long())
    carry = attached(tokens)
    if carry is None and attached_dense(tokens):
        return tokens
    if carry is None:
        raise ReducedOutputError(
            f"These tokens of shape {list(tokens.shape)} do not remember which patch is where. "
            "Pass the very tensor that forward_features of a reduced model returned, in "
            "transformers its last_hidden_state or one of its hidden_states, outside of compiled "
            "code, or a source map: mergence.restore(tokens, source_map)."
        )
    # A norm of the model follows; features made without gradients are not to train it.
    with torch.set_grad_enabled(torch.is_grad_enabled() and tokens.requires_grad):
        return restored(tokens, carry, prefix=tokens.shape[1] - carry.tokens)


def restored(
    tokens: Tensor,
    carry: Carry | None,
    grid: tuple[int, int] | None = None,
    *,
    prefix: int = 0,
    norm: Callable[[Tensor], Tensor] = as_it_is,
) -> Tensor:
    """Restore patch tokens of any block of a forward.

    Args:
        tokens: `[B, P + N, C]` tokens after some block.
        carry: What was known at the end of that forward, or later than that block.
        grid: Rows and columns of patches to fold the result into, or None. Not with a prefix.
        prefix: P, the prefix tokens that stay in front.
        norm: What the tokens are to pass when every patch has one, if they did not yet.

    Returns:
        `[B, P + patches, C]`; `[B, C, rows, columns]` with a grid.
    """
    if carry is not None:
        tokens, norm = carry.unnormed or (tokens, norm)
        tokens = _unmerged(tokens, carry, prefix)
    full = norm(tokens)
    if grid is None:
        return full
    return full.transpose(1, 2).reshape(full.shape[0], -1, *grid).contiguous()


def _unmerged(tokens: Tensor, carry: Carry, prefix: int) -> Tensor:
    merges = carry.until(tokens.shape[1] - prefix)
    if not merges:
        return tokens
    full = tokens[:, prefix:]
    for merge in reversed(merges):
        full = merge.undone(full)
    return torch.cat((tokens[:, :prefix], full), dim=1) if prefix else full


def _check(tokens: Tensor, source: Tensor) -> None:
    whole = not source.is_floating_point() and source.dtype != torch.bool
    if tokens.ndim != 3 or source.ndim != 2 or len(tokens) != len(source) or not whole:
        raise ReducedOutputError(
            f"Tokens of shape {list(tokens.shape)} and a source map of shape {list(source.shape)} "
            f"({source.dtype}) do not belong together. Give tokens [B, slots, C] and integers "
            "[B, patches]."
        )
    remedy = "Give the patch tokens of the block that the map is of, without prefix tokens."
    carry = attached(tokens)
    if carry is not None and carry.tokens != tokens.shape[1]:
        raise ReducedOutputError(
            f"Of these {tokens.shape[1]} tokens {tokens.shape[1] - carry.tokens} are prefix "
            f"tokens, of which a source map knows nothing. {remedy}"
        )
    # Reading values would break a graph in two; there, gather itself complains.
    if not torch.compiler.is_compiling() and source.numel() and source.max() >= tokens.shape[1]:
        raise ReducedOutputError(
            f"The source map names slot {int(source.max())}, and there are {tokens.shape[1]} "
            f"tokens. {remedy}"
        )
