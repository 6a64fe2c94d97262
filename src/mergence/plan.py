"""The plan: which slot each token goes to, and with what weight.

Everything mergence does follows from this one map. The merge is a weighted mean per slot; pruning
is slot -1; plans compose into the source map that says where every original patch ended up.

Plans speak of *patch* tokens only. Prefix tokens (class, distillation, registers) are set aside
before a method is asked and put back in front afterwards, so that no method can touch them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mergence.errors import MergenceError

DROPPED = -1


@dataclass(frozen=True)
class MergePlan:
    """Where each token goes.

    Attributes:
        slot: `[B, N]` int64. The slot of each token, or -1 where it is dropped. Slots keep raster
            order: a slot's index grows with the position of the token that represents it.
        weight: `[B, N]`, positive. The share of each token in the mean of its slot, not normalised.
        slots: The number of slots. A plain number, so that shapes stay static.
        keep_norm: Scale the mean of each slot to the largest norm among its tokens. A mean is
            shorter than what it is made of; this undoes it.
    """

    slot: Tensor
    weight: Tensor
    slots: int
    keep_norm: bool = False


@dataclass(frozen=True)
class TokenView:
    """What a method may see of the tokens that it plans for, prefix tokens left out.

    `importance`, `keys` and `received` are computed only for methods that list them in `needs`.

    Attributes:
        x: `[B, N, C]` the residual stream between attention and MLP.
        size: `[B, N]` float32, how many patches each token stands for.
        block: The block that the tokens are in, counted from 1.
        depth: The number of blocks of the model.
    """

    x: Tensor
    size: Tensor
    block: int
    depth: int
    _importance: Tensor | None = None
    _keys: Tensor | None = None
    _received: Tensor | None = None

    @property
    def importance(self) -> Tensor:
        """`[B, N]` float32, positive: attention of the class token, mean over heads."""
        return self._declared(self._importance, "importance")

    @property
    def keys(self) -> Tensor:
        """`[B, N, D]` the block's attention keys, mean over heads."""
        return self._declared(self._keys, "keys")

    @property
    def received(self) -> Tensor:
        """`[B, N]` float32, positive: attention of all tokens, mean over heads and queries.

        The only score that costs an N x N map, the block's query-key product once more.
        """
        return self._declared(self._received, "received")

    def _declared(self, value: Tensor | None, name: str) -> Tensor:
        if value is None:
            raise MergenceError(
                f"A method read tokens.{name} without declaring it. "
                f'Add "{name}" to the class attribute `needs` of the method.'
            )
        return value


@dataclass(frozen=True)
class Partition:
    """Tokens split into those that stay and those that leave, both in raster order.

    Attributes:
        kept: `[B, K]` indices of the tokens that stay.
        removed: `[B, N - K]` indices of the tokens that leave.
    """

    kept: Tensor
    removed: Tensor

    def plan(self, target: Tensor, weight: Tensor) -> MergePlan:
        """Make the plan in which kept tokens open slots and removed tokens go to `target`.

        Args:
            target: `[B, N - K]` slot of each removed token, or -1.
            weight: `[B, N]` weight of each token.
        """
        batch, slots = self.kept.shape
        own = torch.arange(slots, device=target.device).expand(batch, slots)
        return MergePlan(self.in_place(own, target), weight, slots)

    def in_place(self, kept: Tensor, removed: Tensor) -> Tensor:
        """Put values of the kept and of the removed tokens where the tokens are, `[B, N]`."""
        order = torch.cat((self.kept, self.removed), dim=1)
        # The inverse permutation by argsort: a gather instead of a scatter, which exporters like.
        return torch.cat((kept, removed), dim=1).gather(1, order.argsort(dim=1))

    def drop(self, weight: Tensor) -> MergePlan:
        """Make the plan in which removed tokens are dropped."""
        return self.plan(torch.full_like(self.removed, DROPPED), weight)

    def merge_to_nearest(self, metric: Tensor, weight: Tensor) -> MergePlan:
        """Make the plan in which each removed token joins the kept token it resembles most.

        Args:
            metric: `[B, N, D]` unit vectors; resemblance is their cosine.
            weight: `[B, N]` weight of each token.
        """
        similarity = rows(metric, self.removed) @ rows(metric, self.kept).transpose(1, 2)
        return self.plan(similarity.argmax(dim=2), weight)


def keep_highest(score: Tensor, slots: int) -> Partition:
    """Split tokens by score: the `slots` highest stay.

    Args:
        score: `[B, N]`. NaN counts as the lowest; among equals the first stay.
        slots: How many stay, 0 to N.
    """
    tokens = score.shape[1]
    position = torch.arange(tokens, device=score.device)
    order = torch.where(highest(score, slots), position, position + tokens).argsort(dim=1)
    return Partition(order[:, :slots], order[:, slots:])


def highest(score: Tensor, slots: int) -> Tensor:
    """Mark the `slots` tokens of the highest score, `[B, N]` bool.

    Args:
        score: `[B, N]`. NaN counts as the lowest; among equals the first are marked.
        slots: How many, 0 to N.
    """
    score = torch.nan_to_num(score, nan=float("-inf"))
    # By the lowest score that is marked, not by the indices of top-k: among equals these differ
    # from device to device.
    least = score.topk(max(slots, 1), dim=1).values[:, -1:]
    over, equal = score > least, score == least
    left = slots - over.sum(dim=1, keepdim=True)
    return over | (equal & (equal.cumsum(dim=1) <= left))


def best_pairs(
    attraction: Tensor, givers: Tensor, takers: Tensor, *, count: int, tokens: int
) -> Tensor:
    """Pair each giver with the taker that draws it most, and let the best pairs move together.

    Args:
        attraction: `[B, G, T]` of each giver to each taker. NaN draws least of all pairs.
        givers: `[B, G]` positions of the tokens that may leave.
        takers: `[B, T]` positions of the tokens that they may join.
        count: How many givers leave, 0 to G.
        tokens: N, how many tokens there are.

    Returns:
        The moves, `[B, N]`: the position that each token goes to, its own where it stays.
    """
    best, partner = attraction.max(dim=2)
    leaving = torch.nan_to_num(best, nan=float("-inf")).topk(count, dim=1).indices
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
    return MergePlan(compose(moves, stays.cumsum(dim=1) - 1), weight, slots, keep_norm)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Pick tokens: `x [B, N, C]`, `index [B, K]` -> `[B, K, C]`."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def most_important(plan: MergePlan, importance: Tensor) -> Tensor:
    """The index of the most important token of each slot, `[B, slots]`.

    Args:
        plan: Where each token goes.
        importance: `[B, N]`.
    """
    slots = torch.arange(plan.slots, device=plan.slot.device).unsqueeze(1)
    member = plan.slot.unsqueeze(1) == slots
    return torch.where(member, importance.unsqueeze(1), -torch.inf).argmax(dim=2)


def compose(source: Tensor, slot: Tensor) -> Tensor:
    """Follow patches through one more plan.

    Args:
        source: `[B, P]` slot of each original patch so far, -1 where dropped.
        slot: `[B, N]` the next plan's map.

    Returns:
        `[B, P]` slot of each original patch afterwards.
    """
    return torch.where(source < 0, DROPPED, slot.gather(1, source.clamp(min=0)))
