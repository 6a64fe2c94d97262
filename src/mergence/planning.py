"""How methods make plans: tokens are split by a score, or paired.

A method's rule is a line or two of these; see docs/extending/add-a-method.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mergence import ops
from mergence.errors import PlanError
from mergence.plan import DROPPED, MergePlan, compose, nan_last


@dataclass(frozen=True)
class Partition:
    """Tokens split into those that stay and those that leave, both in raster order.

    Attributes:
        kept: `[B, K]` indices of the tokens that stay.
        removed: `[B, N - K]` indices of the tokens that leave.
        place: `[B, N]` the place of each token in `kept` followed by `removed`.
    """

    kept: Tensor
    removed: Tensor
    place: Tensor

    def plan(self, target: Tensor, weight: Tensor, *, keep_norm: bool = False) -> MergePlan:
        """Make the plan in which kept tokens open slots and removed tokens go to `target`.

        Args:
            target: `[B, N - K]` slot of each removed token, or -1.
            weight: `[B, N]` weight of each token.
            keep_norm: See `MergePlan`.
        """
        batch, slots = self.kept.shape
        own = torch.arange(slots, device=target.device).expand(batch, slots)
        return MergePlan(self.in_place(own, target), weight, slots, keep_norm)

    def in_place(self, kept: Tensor, removed: Tensor) -> Tensor:
        """Put values of the kept and of the removed tokens where the tokens are, `[B, N]`."""
        return torch.cat((kept, removed), dim=1).gather(1, self.place)

    def drop(self, weight: Tensor) -> MergePlan:
        """Make the plan in which removed tokens are dropped."""
        return self.plan(torch.full_like(self.removed, DROPPED), weight)

    def merge_to_nearest(self, metric: Tensor, weight: Tensor) -> MergePlan:
        """Make the plan in which each removed token joins the kept token it resembles most.

        Args:
            metric: `[B, N, D]`; resemblance is the cosine.
            weight: `[B, N]` weight of each token.
        """
        return self.plan(ops.cosines(metric).nearest(self.removed, self.kept), weight)


def keep_highest(score: Tensor, slots: int) -> Partition:
    """Split tokens by score: the `slots` highest stay.

    Args:
        score: `[B, N]`. NaN counts as the lowest; among equals the first stay.
        slots: How many stay, 0 to N.

    Raises:
        PlanError: There are not so many.
    """
    if not 0 <= slots <= (tokens := int(score.shape[1])):
        raise PlanError(f"{slots} of {tokens} tokens are to stay; give 0 to {tokens}.")
    order, place = ops.split(score, slots)
    return Partition(order[:, :slots], order[:, slots:], place)


def best_pairs(
    attraction: Tensor, givers: Tensor, takers: Tensor, *, count: int, tokens: int
) -> Tensor:
    """Pair each giver with the taker that draws it most, and let the best pairs move together.

    Args:
        attraction: `[B, G, T]` of each giver to each taker. Givers with a NaN among theirs leave
            last.
        givers: `[B, G]` positions of the tokens that may leave.
        takers: `[B, T]` positions of the tokens that they may join.
        count: How many givers leave, 0 to G.
        tokens: N, how many tokens there are.

    Returns:
        The moves, `[B, N]`: the position that each token goes to, its own where it stays.
    """
    best, partner = attraction.max(dim=2)
    leaving = nan_last(best).topk(count, dim=1).indices
    giver = givers.gather(1, leaving)
    taker = takers.gather(1, partner.gather(1, leaving))
    position = torch.arange(tokens, device=giver.device)
    leaves = giver.unsqueeze(1) == position.unsqueeze(1)
    return torch.where(leaves.any(dim=2), (leaves * taker.unsqueeze(1)).sum(dim=2), position)


def alternate(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the two alternating sets of ToMe (arXiv 2210.09461, section 3): givers, takers.

    With one class token in front, the set that gives in the paper is the odd patches.

    Args:
        tokens: `[B, N, ...]`, of which only the shape is read.
    """
    position = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
    return position[:, 1::2], position[:, 0::2]


def most_similar_pairs(metric: Tensor, count: int) -> Tensor:
    """The moves of ToMe: of two alternating sets, the most similar pairs move together.

    Args:
        metric: `[B, N, D]`; similarity is the cosine.
        count: How many tokens leave, 0 to N // 2.
    """
    metric = F.normalize(metric.float(), dim=2)
    givers, takers = alternate(metric)
    similarity = metric[:, 1::2] @ metric[:, 0::2].transpose(1, 2)
    return best_pairs(similarity, givers, takers, count=count, tokens=metric.shape[1])


def join(moves: Tensor, weight: Tensor, slots: int, *, keep_norm: bool = False) -> MergePlan:
    """Make the plan in which tokens that stay open slots and the others follow their move.

    Args:
        moves: `[B, N]` the position that each token goes to, its own where it stays, -1 where it is
            dropped. It goes to tokens that stay.
        weight: `[B, N]` weight of each token.
        slots: How many tokens stay.
        keep_norm: See `MergePlan`.
    """
    stays = moves == torch.arange(moves.shape[1], device=moves.device)
    return MergePlan(compose(moves, stays.long().cumsum(dim=1) - 1), weight, slots, keep_norm)
