"""Which counts to try: numbers only, no model.

Distances of small reductions nearly add up. Having n tokens after block b costs f_b(n) when all of
them leave there; when m had been left before, the new loss is taken as f_b(n) - f_b(m), what the
same step costs at the same place. The sum over the blocks has an exact optimum for every exchange
rate between distance and MACs, found by dynamic programming over (block, tokens, points left).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from mergence.errors import ScheduleError
from mergence.macs import BlockCost, ModelCost, ReductionCost, count
from mergence.setting import Setting, aligned

_LEVELS = 100
"""How many token counts the dynamic program tells apart."""


@dataclass(frozen=True)
class Prices:
    """What counts cost, in shares of the dense model's MACs.

    Attributes:
        model: The model's costs.
        reduction: The method's costs.
        setting: What schedules of this model are resolved for.
    """

    model: ModelCost
    reduction: ReductionCost
    setting: Setting

    def share(self, counts: Sequence[int]) -> float:
        """MACs of a schedule as a share of the dense model's."""
        return self.setting.share((self.setting.tokens, *counts))

    @cached_property
    def levels(self) -> list[int]:
        """The token counts that the search tells apart, falling, alignment respected."""
        tokens, align, prefix = self.setting.tokens, self.setting.align, self.setting.prefix
        if align > 1:
            inner = {n - prefix for n in range(align, tokens + prefix, align)}
        else:
            inner = {1, *range(1, tokens, max(tokens // _LEVELS, 1))}
        return [tokens, *sorted((n for n in inner if 1 <= n < tokens), reverse=True)]

    @cached_property
    def steps(self) -> list[Tensor]:
        """For each block, the price of going from one level (row) to another (column)."""
        dense = count(self.model, self.setting.patches).total
        *blocks, last = self.model.blocks
        if self.model.prefix_alone:  # no patch is in its MLP, so that to reduce there gains nothing
            last = replace(last, mlp=0)
        blocks.append(last)
        tables: dict[BlockCost, Tensor] = {}
        for block in blocks:
            if block in tables:
                continue
            alone = replace(self.model, blocks=(block,), stem=0, head=0, prefix_alone=False)
            tables[block] = torch.tensor(
                [
                    [
                        count(alone, before, (before, after), self.reduction).total / dense
                        if after == before or self.setting.fewest(before) <= after < before
                        else float("inf")
                        for after in self.levels
                    ]
                    for before in self.levels
                ],
                dtype=torch.float64,
            )
        return [tables[block] for block in blocks]

    def fitted(self, counts: Sequence[int], budget: float) -> tuple[int, ...] | None:
        """Bend all counts by one exponent until they just meet a budget; None where none does."""
        tokens = self.setting.tokens

        def bent(exponent: float) -> tuple[int, ...]:
            result, before = [], tokens
            for wanted in counts:
                share = (wanted / tokens) ** exponent
                # A single token is not a matter of degree: nothing reads the patches any more.
                after = 1 if wanted == 1 else max(round(tokens * share), 1)
                after = min(before, max(after, self.setting.fewest(before)))
                result.append(after)
                before = after
            return aligned(tuple(result), self.setting)

        gentle, strong = 0.0, 8.0
        if self.share(bent(strong)) > budget:
            return None
        for _ in range(30):
            middle = (gentle + strong) / 2
            if self.share(bent(middle)) > budget:
                gentle = middle
            else:
                strong = middle
        return bent(strong)


def check_budget(prices: Prices, budget: float, points: int) -> None:
    """Check that some schedule with so few points meets a budget, whatever it does to the answers.

    Raises:
        ScheduleError: None does.
    """
    no_loss = torch.zeros(prices.setting.depth, prices.setting.tokens + 1, dtype=torch.float64)
    if prices.share(_at_rate(no_loss, prices, points, 1.0)) > budget:
        raise ScheduleError(
            f"No schedule with {points} reduction points needs only {budget:.2f} of the MACs of "
            "this model with this method. Ask for more MACs or allow more points."
        )


def best_counts(table: Tensor, prices: Prices, budget: float, points: int) -> tuple[int, ...]:
    """The counts of least predicted distance within a budget and a number of reduction points.

    Args:
        table: `[depth, patches + 1]`, see `Curves.table`.
        prices: What counts cost.
        budget: Share of the dense MACs.
        points: How many blocks may reduce.

    Raises:
        ScheduleError: No schedule with so few points meets the budget.
    """
    check_budget(prices, budget, points)
    cheap, dear = 1e-9, 1e9
    for _ in range(60):
        rate = (cheap * dear) ** 0.5
        if prices.share(_at_rate(table, prices, points, rate)) > budget:
            cheap = rate
        else:
            dear = rate
    # Between two exchange rates the optimum jumps; what is left of the budget is given back.
    counts = _at_rate(table, prices, points, dear)
    return prices.fitted(counts, budget) or counts


def _at_rate(table: Tensor, prices: Prices, points: int, rate: float) -> tuple[int, ...]:
    """The optimum of distance + rate x price, by dynamic programming from the last block back."""
    levels = torch.tensor(prices.levels)
    here = torch.arange(len(levels))
    # [points left, tokens]: the cost of all that follows.
    ahead = torch.zeros(points + 1, len(levels), dtype=torch.float64)
    choices = []
    for loss, price in zip(table.flip(0), reversed(prices.steps), strict=True):
        loss = loss[levels]
        step = (loss[None, :] - loss[:, None]).clamp(min=0) + rate * price
        stay = step[here, here] + ahead
        reduced = step + ahead[:-1, None, :]  # one point less is left for what follows
        reduced[:, here, here] = float("inf")
        value, target = reduced.min(dim=2)
        choice = torch.where(value < stay[1:], target, here)
        choices.append([here.tolist(), *choice.tolist()])
        ahead = torch.cat((stay[:1], torch.minimum(value, stay[1:])))
    counts, level, left = [], 0, points
    for chosen in reversed(choices):
        before, level = level, chosen[left][level]
        left -= level != before
        counts.append(prices.levels[level])
    return tuple(counts)


def predicted(table: Tensor, counts: Sequence[int], tokens: int) -> float:
    """The distance that the curves predict for a schedule that starts with so many tokens."""
    before, total = tokens, 0.0
    for row, after in zip(table, counts, strict=True):
        total += max(float(row[after] - row[before]), 0.0)
        before = after
    return total


def neighbours(
    counts: Sequence[int], prices: Prices, budget: float, step: float
) -> Iterator[tuple[int, ...]]:
    """Schedules that differ in one point, all within the budget.

    At one point more or fewer tokens stay, or the point moves by a block; the other counts are bent
    to meet the budget again.

    Args:
        counts: The schedule to start from.
        prices: What counts cost.
        budget: Share of the dense MACs.
        step: The relative change of a count.
    """
    tokens, depth = prices.setting.tokens, len(counts)
    before = [tokens, *counts[:-1]]
    points = {b: n for b, n in enumerate(counts) if n < before[b]}
    changed: list[dict[int, int]] = []
    for block, n in points.items():
        rest = {b: m for b, m in points.items() if b != block}
        for factor in (1 - step, 1 + step):
            if round(n * factor) != n:
                changed.append(rest | {block: max(round(n * factor), 1)})
        changed += [
            rest | {to: n} for to in (block - 1, block + 1) if 0 <= to < depth and to not in points
        ]
    for chosen in changed:
        left, result = tokens, []
        for block in range(depth):
            left = min(left, chosen.get(block, left))
            result.append(left)
        fitted = prices.fitted(result, budget)
        if fitted is not None and fitted != tuple(counts):
            yield fitted
