"""What the rule of `mergence` is worth, part by part, at fixed counts.

    python benchmarks/accuracy/ablation.py MODEL --data TRAIN --images 160

Prints for each variation the mean KL divergence to the dense model at temperature 2, which so few
images can tell apart (docs/calibration.md), at 0.67 and 0.50 of the MACs of DeiT-S. Variations that
are no options of the method are made here.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from torch.nn import functional as F

from mergence.calibration.probe import Probe
from mergence.data import loader, open_images
from mergence.distances import tempered_kl_divergence
from mergence.method import Method
from mergence.methods import Mergence
from mergence.models import load_model
from mergence.plan import MergePlan, TokenView
from mergence.planning import join, keep_highest

COUNTS = {
    "0.67": (196, 196, 196, 196, 154, 154, 112, 86, 86, 56, 56, 1),
    "0.50": (178, 178, 178, 128, 128, 64, 64, 64, 34, 34, 34, 1),
}


@dataclass(frozen=True, kw_only=True)
class PlainMean(Mergence):
    """The mean as it is, shorter than what it is made of."""

    def plan(self, tokens: TokenView, slots: int) -> MergePlan:
        return dataclasses.replace(super().plan(tokens, slots), keep_norm=False)


@dataclass(frozen=True, kw_only=True)
class ByReceived(Mergence):
    """Importance is class attention plus the attention received from all tokens."""

    needs = frozenset({"importance", "received"})

    def plan(self, tokens: TokenView, slots: int) -> MergePlan:
        both = tokens.importance + tokens.received
        return super().plan(dataclasses.replace(tokens, _importance=both), slots)


@dataclass(frozen=True, kw_only=True)
class ByKeys(Mergence):
    """Similarity of the attention keys, mean over heads."""

    needs = frozenset({"importance", "keys"})

    def plan(self, tokens: TokenView, slots: int) -> MergePlan:
        return super().plan(dataclasses.replace(tokens, x=tokens.keys), slots)


@dataclass(frozen=True, kw_only=True)
class Rounds(Mergence):
    """The choice is repeated, each time with only those as targets that stayed the last time."""

    rounds: int = 3

    def plan(self, tokens: TokenView, slots: int) -> MergePlan:
        importance, similarity = tokens.importance.clamp(min=1e-12), _cosine(tokens.x)
        above = importance.unsqueeze(1) > importance.unsqueeze(2)
        stays = torch.ones_like(importance, dtype=torch.bool)
        for _ in range(self.rounds):
            targets = above & stays.unsqueeze(1)
            nearest = torch.where(targets, similarity, -1.0).amax(dim=2).clamp(max=1.0)
            cost = self.alpha * importance.log() + torch.log(1 + self.epsilon - nearest)
            stays = keep_highest(cost, slots).place < slots
        nearest = torch.where(stays.unsqueeze(1), similarity, -torch.inf).argmax(dim=2)
        moves = torch.where(stays, torch.arange(stays.shape[1]), nearest)
        return join(moves, tokens.size, slots, keep_norm=True)


@dataclass(frozen=True, kw_only=True)
class Ward(Mergence):
    """Agglomerative clustering, one pair at a time: weights are the roots of the importance.

    The pair with the least w_i w_j / (w_i + w_j) (1 - cos) merges into its mean, over and over. It
    shows about how far a choice by similarity and importance can be taken; far too slow to be used.
    """

    def plan(self, tokens: TokenView, slots: int) -> MergePlan:
        x, weight = F.normalize(tokens.x, dim=2), tokens.importance.clamp(min=1e-12).sqrt()
        size, total = tokens.size.clone(), tokens.size.shape[1]
        batch, position = torch.arange(len(x)), torch.arange(total)
        alive = torch.ones_like(weight, dtype=torch.bool)
        moves = position.expand(len(x), -1).clone()
        for _ in range(total - slots):
            own, other = weight.unsqueeze(2), weight.unsqueeze(1)
            loss = own * other / (own + other) * (1 - x @ x.transpose(1, 2))
            both = alive.unsqueeze(2) & alive.unsqueeze(1) & (position != position.unsqueeze(1))
            pair = torch.where(both, loss, torch.inf).flatten(1).argmin(dim=1)
            i, j = pair // total, pair % total
            lighter = weight[batch, i] < weight[batch, j]
            giver, taker = torch.where(lighter, i, j), torch.where(lighter, j, i)
            moves = torch.where(moves == giver.unsqueeze(1), taker.unsqueeze(1), moves)
            share = size[batch, giver].unsqueeze(1) * x[batch, giver]
            x[batch, taker] = F.normalize(
                share + size[batch, taker].unsqueeze(1) * x[batch, taker], dim=1
            )
            size[batch, taker] += size[batch, giver]
            weight[batch, taker] += weight[batch, giver]
            alive[batch, giver] = False
        return join(moves, tokens.size, slots, keep_norm=True)


def _cosine(x: Tensor) -> Tensor:
    x = F.normalize(x, dim=2)
    return x @ x.transpose(1, 2)


VARIATIONS: dict[str, Method] = {
    "as shipped": Mergence(),
    "alpha 0.15": Mergence(alpha=0.15),
    "alpha 0.4": Mergence(alpha=0.4),
    "epsilon 0.02": Mergence(epsilon=0.02),
    "epsilon 0.1": Mergence(epsilon=0.1),
    "size attention 0.85": Mergence(size_attention=0.85),
    "size attention 0.7": Mergence(size_attention=0.7),
    "no size attention": Mergence(size_attention=0),
    "mean without keeping the norm": PlainMean(),
    "similarity of keys": ByKeys(),
    "importance also from all tokens (N x N)": ByReceived(),
    "choice repeated three times": Rounds(),
    "Ward clustering, pair by pair": Ward(),
}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--images", type=int, default=160)
    arguments = parser.parse_args()
    loaded = load_model(arguments.model)
    data = open_images(
        arguments.data, transform=loaded.transform, mode=loaded.mode, limit=arguments.images
    )
    batches = loader(data, batch_size=40)
    probe = Probe(loaded.model, [batch.images for batch in islice(batches, arguments.images)])
    print(f"| variation | {' | '.join(f'at {budget}' for budget in COUNTS)} |")
    print("|---" * (1 + len(COUNTS)) + "|")
    for name, method in VARIATIONS.items():
        values = [probe.mean(tempered_kl_divergence, method, n) for n in COUNTS.values()]
        print(f"| {name} | {' | '.join(f'{value:.4f}' for value in values)} |", flush=True)


if __name__ == "__main__":
    main()
