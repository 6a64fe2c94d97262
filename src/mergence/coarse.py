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

from mergence import ops
from mergence.plan import MergePlan
from mergence.planning import join, keep_highest

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
    return _by_patch(half.flatten(0, 1)[:, None, :, None] - _by_region(fine, grid), grid)


def plan(change: Tensor, grid: tuple[int, int], regions: int) -> tuple[MergePlan, Tensor, Tensor]:
    """Choose the regions that lose least; the patches of each join.

    The loss of a region is the root of the mean squared change of the embeddings of its patches,
    up to a factor, times a preference for the border.

    Args:
        change: `[B, N, C]`; see `difference`.
        grid: Rows and columns of patches.
        regions: How many regions become one token, at least 1.

    Returns:
        The plan; which patches join others, `[B, N]` bool; and the logarithm of the loss by which
        each region was judged, `[B, rows // 2, columns // 2]` float32.
    """
    rows, columns = (n // SIDE for n in grid)
    norm = ops.norms(change.detach()).float()
    norm = torch.linalg.vector_norm(_by_region(norm, grid), dim=(1, 3))
    loss = norm.log().reshape(-1, rows, columns)
    loss = loss - _distance(rows, columns, loss)
    region = keep_highest(-loss.flatten(1), regions).place < regions
    chosen = spread(region.reshape(-1, rows, columns), grid)
    # Every patch stays but three of each chosen region, which follow its first.
    patch = torch.arange(change.shape[1], device=change.device).unsqueeze(0)
    first = spread(_by_region(patch, grid)[:, 0, :, 0].unsqueeze(0), grid)
    weight = torch.ones(chosen.shape, dtype=torch.float32, device=change.device)
    slots = change.shape[1] - regions * (SIDE**2 - 1)
    return join(torch.where(chosen, first, patch), weight, slots), chosen, loss


def spread(regions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Give every patch the value of its region; zero where an odd row or column has none.

    Args:
        regions: `[B, rows // 2, columns // 2]`.
        grid: Rows and columns of patches.

    Returns:
        `[B, N]`.
    """
    each = regions.flatten(0, 1)[:, None, :, None].expand(-1, SIDE, -1, SIDE)
    return _by_patch(each, grid)


def _by_region(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """`[B, N, ...]` as `[B * (rows // 2), 2, columns // 2, 2, ...]`, without an odd row or column.

    Images and rows of regions are one dimension because Core ML knows no more than five.
    """
    rows, columns = (n // SIDE for n in grid)
    x = x.reshape(-1, *grid, *x.shape[2:])[:, : rows * SIDE, : columns * SIDE]
    return x.reshape(-1, SIDE, columns, SIDE, *x.shape[3:])


def _by_patch(x: Tensor, grid: tuple[int, int]) -> Tensor:
    """The inverse of `_by_region`: `[B, N, ...]`, zero in an odd row or column."""
    rows, columns = (n // SIDE * SIDE for n in grid)
    x = x.reshape(-1, rows, columns, *x.shape[4:])
    odd = grid[0] - rows, grid[1] - columns
    if any(odd):
        x = F.pad(x, (*(0, 0) * (x.dim() - 3), 0, odd[1], 0, odd[0]))
    return x.flatten(1, 2)


def _distance(rows: int, columns: int, like: Tensor) -> Tensor:
    """`[rows, columns]` squared distance from the middle: for a root, half of `CENTRE` at most."""
    corner = (CENTRE / 4) ** 0.5
    y, x = (
        torch.linspace(-corner, corner, n, dtype=like.dtype, device=like.device)
        for n in (rows, columns)
    )
    return y.square()[:, None] + x.square()
