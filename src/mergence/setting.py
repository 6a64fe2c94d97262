"""What schedules are resolved for: the model's numbers, and which counts it can follow."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from mergence.errors import ScheduleError


def multiple_on(device: str, dtype: torch.dtype) -> int:
    """The multiple that token counts, prefix included, best keep to; 1 where none is better.

    On CUDA attention with a mask, which size attention needs, takes up to 1.7 times as long at
    other counts, and so does any attention in bfloat16 on a CPU that multiplies tiles of 16 (Intel
    calls them AMX). On other CPUs counts next to each other differ by little more than their MACs.
    See docs/benchmarking.md.

    Args:
        device: Type of the device, such as `cpu` or `cuda`.
        dtype: The type in which a model computes.
    """
    if device == "cuda":
        return 8
    tiles = dtype == torch.bfloat16 and torch.cpu._is_amx_tile_supported()
    return 16 if device == "cpu" and tiles else 1


def _any_fewer(tokens: int) -> int:
    return 1


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a schedule is resolved for.

    Attributes:
        tokens: Patch tokens that enter the first block.
        patches: Patches of the image. More than `tokens` where some are read coarsely.
        own: Patches of an image of the model's own input size.
        fewer: Smaller numbers of tokens that a schedule may let enter instead, as coarse patches.
        depth: Number of blocks.
        prefix: Prefix tokens; they are never reduced and count only for `align`.
        align: Token counts, prefix included, are rounded to multiples of this. 1 rounds nothing.
        fewest: The smallest count that the method can reach from a given count in one step.
        share: MACs as a share of the dense model's, of the patch tokens that enter the first block
            and of those left after each.
    """

    tokens: int
    patches: int
    own: int
    depth: int
    share: Callable[[tuple[int, ...]], float]
    fewer: tuple[int, ...] = ()
    prefix: int = 0
    align: int = 1
    fewest: Callable[[int], int] = _any_fewer


def aligned(counts: tuple[int, ...], setting: Setting) -> tuple[int, ...]:
    """Round counts, prefix included, to multiples of `setting.align`; unreduced counts stay."""
    if setting.align <= 1:
        return counts

    def nearest(count: int, before: int) -> int:
        multiple = max(round((count + setting.prefix) / setting.align), 1) * setting.align
        fewest = min(setting.fewest(before), before)
        while multiple - setting.prefix < fewest:
            multiple += setting.align
        return min(multiple - setting.prefix, before)

    before, result = setting.tokens, []
    for count in counts:
        if 0 < count < setting.tokens:
            before = nearest(count, before)
            count = before
        result.append(count)
    return tuple(result)


def check(tokens: tuple[int, ...], setting: Setting) -> tuple[int, ...]:
    """Return the tokens that enter and those left after each block if they can be followed.

    Raises:
        ScheduleError: They cannot; the message names the block.
    """
    before, *counts = tokens
    for block, after in enumerate(counts, start=1):
        if after < 1:
            raise ScheduleError(
                f"After block {block} the schedule keeps {after} of {before} patch tokens. "
                "At least one must stay; reduce less."
            )
        if after > before:
            raise ScheduleError(
                f"After block {block} the schedule wants {after} patch tokens, but only {before} "
                "are left there. Counts can only fall from block to block."
            )
        if after < before and after < setting.fewest(before):
            raise ScheduleError(
                f"Block {block} would go from {before} to {after} patch tokens, and the method can "
                f"reach at least {setting.fewest(before)} in one step. Spread the reduction over "
                "more blocks or choose another method."
            )
        before = after
    return tokens
