"""Attention within windows of an image, for tokens that are fewer than its patches."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mergence.plan import rows

NOBODY = -3e4
"""What is added to the logits of places that no token has; float16 holds it."""


@dataclass(frozen=True)
class Windows:
    """Which tokens are in which window.

    A token is in the window of the patch whose place it has. No two tokens have one place, so no
    window has more tokens than places.

    Attributes:
        place: `[B, n]` the place of each token, counted through all windows of its image.
        token: `[B, W, L]` the token at each place of each window, n where there is none.
    """

    place: Tensor
    token: Tensor

    @classmethod
    def of(cls, position: Tensor, ends: Tensor, places: int) -> Windows:
        """Sort tokens into windows.

        Args:
            position: `[B, n]` the patch whose place each token has, in the order of the windows.
            ends: `[W]` one past the last patch of each window.
            places: L, how many patches the largest window may have.
        """
        batch, tokens = position.shape
        home = torch.bucketize(position, ends, right=True)
        order = home.argsort(dim=1, stable=True)
        home = home.gather(1, order)
        numbers = torch.arange(len(ends), device=home.device)
        first = torch.searchsorted(home, numbers.expand(batch, -1).contiguous())
        index = torch.arange(tokens, device=home.device).expand(batch, -1)
        place = home * places + index - first.gather(1, home)
        place = torch.empty_like(place).scatter_(1, order, place)
        token = place.new_full((batch, len(ends) * places), tokens).scatter_(1, place, index)
        return cls(place, token.view(batch, -1, places))

    def spread(self, x: Tensor) -> Tensor:
        """Tokens `[B, n, C]` in their windows, `[B W, L, C]`; zeros where there is none."""
        return rows(F.pad(x, (0, 0, 0, 1)), self.token.flatten(1)).view(
            -1, self.token.shape[2], x.shape[2]
        )

    def collect(self, x: Tensor) -> Tensor:
        """The inverse of `spread`."""
        return rows(x.reshape(len(self.place), -1, x.shape[2]), self.place)

    def bias(self, sizes: Tensor | None, like: Tensor) -> Tensor:
        """What the keys in each window get, `[B W, 1, 1, L]`.

        Args:
            sizes: What each token gets, `[B, 1, 1, n]`, or None.
            like: A tensor of the type of the answer.
        """
        batch, tokens = self.place.shape
        sizes = like.new_zeros(batch, tokens) if sizes is None else sizes.view(batch, tokens)
        bias = F.pad(sizes, (0, 1), value=NOBODY).gather(1, self.token.flatten(1))
        return bias.view(-1, 1, 1, self.token.shape[2])
