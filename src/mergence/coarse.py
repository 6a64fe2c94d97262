"""Coarse patches: where an image has little detail, four patches are read as one.

A plan before the first block. A region of 2 x 2 patches becomes one token: the embedding of the
region at half the resolution, at the mean of the four places. Models trained for tokens of several
scales are known as mixed-resolution tokenization; here the books that every plan has (sizes in the
attention, the source map) make them useful without training.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mergence.plan import MergePlan
from mergence.planning import keep_highest

SIDE = 2
"""Rows and columns of patches in a region."""
CENTRE = 4.5
"""How much log-detail a region in the corner lacks against one in the middle: what a picture is
about is rarely at its border."""


def tokens_left(share: float, patches: int) -> int:
    """How many tokens are left of so many patches when a share of the image is coarse."""
    return patches - round(share * patches / SIDE**2) * (SIDE**2 - 1)


def regions_in(tokens: int, patches: int) -> int:
    """How many regions are coarse when so many tokens are left."""
    return (patches - tokens) // (SIDE**2 - 1)


def share_of(tokens: int, patches: int) -> float:
    """Which share of the image is coarse when so many tokens are left."""
    return regions_in(tokens, patches) * SIDE**2 / patches


def halved(image: Tensor, grid: tuple[int, int], patch: tuple[int, int]) -> Tensor:
    """An image at half its resolution.

    Args:
        image: `[B, C, H, W]`.
        grid: Patch rows and columns; where their number is odd, the last one is left out, as are
            pixels outside of the patches.
        patch: Height and width of a patch in pixels.
    """
    height, width = (n // SIDE * SIDE * p for n, p in zip(grid, patch, strict=True))
    # Pairs of rows, then of columns: a quarter of the time of `avg_pool2d` on a CPU.
    image = image[:, :, :height, :width]
    image = image[:, :, 0::2] + image[:, :, 1::2]
    return (image[..., 0::2] + image[..., 1::2]) / SIDE**2


def difference(fine: Tensor, half: Tensor, grid: tuple[int, int]) -> Tensor:
    """What becomes of each patch's embedding when its region is read at half the resolution.

    Args:
        fine: `[B, N, C]` embeddings of the patches, in raster order, without positions.
        half: `[B, rows // 2, columns // 2, C]` embeddings of the regions.
        grid: Rows and columns of patches.

    Returns:
        `[B, N, C]` the difference; zero where an odd row or column has no region.
    """
    rows, columns = half.shape[1:3]
    batch, _, channels = fine.shape
    inside = fine.reshape(batch, *grid, channels)[:, : rows * SIDE, : columns * SIDE]
    inside = inside.reshape(batch, rows, SIDE, columns, SIDE, channels)
    there = (half[:, :, None, :, None] - inside).flatten(3, 4).flatten(1, 2)
    return _padded(there, grid).flatten(1, 2)


def plan(change: Tensor, grid: tuple[int, int], regions: int) -> tuple[MergePlan, Tensor, Tensor]:
    """Choose the regions that lose least; the patches of each join.

    The loss of a region is the mean squared change of the embeddings of its patches, times a
    preference for the border.

    Args:
        change: `[B, N, C]`; see `difference`.
        grid: Rows and columns of patches.
        regions: How many regions become one token, at least 1.

    Returns:
        The plan; which patches join others, `[B, N]` bool; and the logarithm of the loss by which
        each region was judged, `[B, rows // 2, columns // 2]` float32.
    """
    rows, columns = (n // SIDE for n in grid)
    exact = torch.promote_types(change.dtype, torch.float32)
    norm = torch.linalg.vector_norm(change.detach(), dim=2, dtype=exact).float()
    loss = F.avg_pool2d((norm.square() / change.shape[2]).reshape(-1, 1, *grid), SIDE).squeeze(1)
    loss = loss.clamp(min=torch.finfo(loss.dtype).tiny).log() - _distance(rows, columns, loss)
    region = keep_highest(-loss.flatten(1), regions).place < regions
    chosen = spread(region.reshape(-1, rows, columns), grid)
    # Every patch stays but three of each chosen region, which follow its first.
    corner = torch.ones(rows, 1, columns, 1, dtype=torch.bool, device=change.device)
    corner = F.pad(corner, (0, SIDE - 1, 0, 0, 0, SIDE - 1)).flatten(2).flatten(0, 1)
    stays = torch.logical_or(~chosen, _padded(corner[None, :, :, None], grid).flatten())
    own = stays.long().cumsum(dim=1) - 1
    first = own.reshape(-1, *grid)[:, : rows * SIDE : SIDE, : columns * SIDE : SIDE]
    slot = torch.where(chosen, spread(first, grid), own)
    slots = change.shape[1] - regions * (SIDE**2 - 1)
    return MergePlan(slot, torch.ones_like(norm), slots), chosen, loss


def spread(regions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Give every patch the value of its region; zero where an odd row or column has none.

    Args:
        regions: `[B, rows // 2, columns // 2]`.
        grid: Rows and columns of patches.

    Returns:
        `[B, N]`.
    """
    each = regions[:, :, None, :, None].expand(-1, -1, SIDE, -1, SIDE)
    full = each.flatten(3, 4).flatten(1, 2).unsqueeze(3)
    return _padded(full, grid).flatten(1)


def _padded(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[B, rows, columns, C]` with zeros for the odd row and column that belong to no region."""
    odd = grid[0] - x.shape[1], grid[1] - x.shape[2]
    return F.pad(x, (0, 0, 0, odd[1], 0, odd[0])) if any(odd) else x


def _distance(rows: int, columns: int, like: Tensor) -> Tensor:
    """`[rows, columns]` squared distance from the middle, `CENTRE` in the corners."""
    y, x = (torch.linspace(-1, 1, n, device=like.device) for n in (rows, columns))
    return CENTRE / 2 * (y.square()[:, None] + x.square())
