"""The pixels of a picture: pure functions from source maps to regions, borders and links."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_FADED = (0.74, 0.82, 0.93)
"""Pale blue: told apart from orange in every colour blindness, and never found in grey images."""


def region_colours(image: Tensor, source: Tensor, grid: tuple[int, int]) -> Tensor:
    """Paint every patch in the mean colour of all patches of its slot.

    Args:
        image: `[3, H, W]`, values in [0, 1].
        source: `[patches]`, patch -> slot, -1 dropped.
        grid: patch rows and columns.

    Returns:
        `[rows, columns, 3]`; nan where the patch was dropped.
    """
    patches = F.adaptive_avg_pool2d(image[None], grid)[0].flatten(1).T
    slot = source.clamp_min(0)
    total = patches.new_zeros(int(slot.max()) + 1, 4)
    kept = (source >= 0).to(patches.dtype)[:, None]
    total.index_add_(0, slot, torch.cat([patches, torch.ones_like(kept)], 1) * kept)
    mean = total[slot, :3] / total[slot, 3:]
    return mean.where(kept > 0, torch.nan).reshape(*grid, 3)


def region_borders(source: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Where neighbouring patches belong to different slots.

    Returns:
        `right [rows, columns - 1]`, true where a patch differs from its right neighbour, and
        `below [rows - 1, columns]`, true where it differs from the one below.
    """
    slots = source.reshape(grid)
    return slots[:, 1:] != slots[:, :-1], slots[1:] != slots[:-1]


def crucial_only(image: Tensor, anchor: Tensor, grid: tuple[int, int]) -> Tensor:
    """Keep the patches listed in `anchor` as they are and fade all others to a pale blue."""
    mask = torch.zeros(grid[0] * grid[1], device=image.device)
    mask[anchor] = 1
    mask = F.interpolate(mask.reshape(1, 1, *grid), image.shape[1:], mode="nearest")[0]
    luma = image.mean(0, keepdim=True)
    # A tint, and never dark: in grey images a faded patch must not look like one that stays.
    faded = image.new_tensor(_FADED)[:, None, None] + 0.14 * (luma - 0.5)
    return torch.where(mask > 0, image, faded.clamp(0, 1))


def stray_links(source: Tensor, anchor: Tensor, grid: tuple[int, int]) -> list[tuple[int, int]]:
    """Tie the parts of a slot that lie apart from its anchor to that anchor.

    Returns:
        For every connected part without the anchor, its patch nearest to the anchor, and the
        anchor.
    """
    slots, homes = source.tolist(), anchor.tolist()
    columns = grid[1]
    unseen = {patch for patch, slot in enumerate(slots) if slot >= 0}
    links = []
    while unseen:
        part = [unseen.pop()]
        for patch in part:  # grows while it is walked: a flood fill
            column = patch % columns
            near = {patch - columns, patch + columns}
            near |= ({patch - 1} if column else set()) | (
                {patch + 1} if column + 1 < columns else set()
            )
            same = [other for other in near & unseen if slots[other] == slots[patch]]
            unseen.difference_update(same)
            part += same
        home = homes[slots[part[0]]]
        if home not in part:
            links.append((min(part, key=lambda patch: _distance(patch, home, columns)), home))
    return sorted(links)


def _distance(a: int, b: int, columns: int) -> int:
    return (a // columns - b // columns) ** 2 + (a % columns - b % columns) ** 2


def spread(count: int, limit: int) -> list[int]:
    """Choose at most `limit` of `count` points, evenly spread, the last one included."""
    shown = min(count, limit)
    return [round((i + 1) * count / shown) - 1 for i in range(shown)]
