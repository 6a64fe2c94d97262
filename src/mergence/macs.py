"""Multiply-adds, counted from the architecture.

Counters that trace a model miss fused attention and see nothing of what a method costs, so the
MACs are computed: linear layers, attention products, the stem and the head, and everything that
reduction adds (importance, the method's own rule, the merge, a learned module). A merge is counted
as one multiply-add per token and channel, which is what a weighted mean needs; that one
implementation pads it with zeros to a matrix product is not the method's doing. Element-wise work
(norms, activations, softmax) is left out on both sides, as papers do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from mergence.coarse import SIDE


@dataclass(frozen=True)
class BlockCost:
    """One transformer block.

    Attributes:
        attention: Multiply-adds of the attention's linear layers per token.
        mlp: Multiply-adds of the MLP's linear layers per token.
        width: Heads times head width; the two attention products cost 2 N N width.
        window: Patches of the windows within which it attends, whose places are all computed; None
            where it attends to all tokens.
    """

    attention: int
    mlp: int
    width: int
    window: int | None = None


@dataclass(frozen=True)
class ModelCost:
    """Everything about a model that its MACs depend on.

    Attributes:
        blocks: Its transformer blocks.
        prefix: Prefix tokens.
        dim: Channels of a token.
        head_dim: Channels of one attention head.
        stem: Multiply-adds of the patch embedding per patch.
        head: Multiply-adds of the head, whatever the number of tokens.
        head_per_token: Multiply-adds of the head per token.
        placed: Blocks look at the places of their tokens (rotary positions, a bias for every pair
            of places). Every reduction then looks at the importance, to choose the place that a
            merged token has.
        prefix_alone: The head reads prefix tokens alone. Then nobody reads the patch tokens after
            the attention of the last block, and a reduced model does not compute them.
    """

    blocks: tuple[BlockCost, ...]
    prefix: int
    dim: int
    head_dim: int
    stem: int
    head: int
    head_per_token: int = 0
    placed: bool = False
    prefix_alone: bool = False


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of one image, by part."""

    stem: int = 0
    attention: int = 0
    mlp: int = 0
    head: int = 0
    importance: int = 0
    planning: int = 0
    merging: int = 0
    learned: int = 0

    @property
    def total(self) -> int:
        """All parts together."""
        return sum(asdict(self).values())


@dataclass(frozen=True)
class ReductionCost:
    """What a method costs at one reduction.

    Attributes:
        needs: What the method reads: `importance` is one row of the attention map, `received` all
            of it.
        plan: Multiply-adds of the rule, as a function of tokens and slots.
        learned: Multiply-adds of the learned module as a function of tokens, or None.
    """

    needs: frozenset[str]
    plan: Callable[[int, int], int]
    learned: Callable[[int], int] | None = None


def without_unread(tokens: Sequence[int], patches: int) -> Sequence[int]:
    """The tokens of a schedule where nobody reads those after the last block.

    What reduces nothing is left as it is, so that it stays exact.

    Args:
        tokens: Patch tokens that enter the first block, and those left after each.
        patches: Patches of the image.
    """
    return (*tokens[:-1], 0) if min(tokens) < patches else tokens


def count(
    model: ModelCost,
    patches: int,
    tokens: Sequence[int] | None = None,
    reduction: ReductionCost | None = None,
) -> Macs:
    """Multiply-adds of one forward pass on one image.

    Args:
        model: The model.
        patches: Patches of the image.
        tokens: Patch tokens that enter the first block, and those left after each; None is the
            dense model.
        reduction: What each reduction costs; None counts the model alone.
    """
    attention = mlp = importance = planning = merging = learned = 0
    stem = patches * model.stem
    tokens = (patches,) * (len(model.blocks) + 1) if tokens is None else tokens
    if model.prefix_alone:
        tokens = without_unread(tokens, patches)
    start = before = tokens[0]
    if start < patches:  # every region is read at half the resolution, and then some are chosen
        stem += patches // SIDE**2 * model.stem
        merging = patches * model.dim
    for block, after in zip(model.blocks, tokens[1:], strict=True):
        n = before + model.prefix
        pairs = n * n if block.window is None else patches * block.window
        attention += n * block.attention + 2 * pairs * block.width
        mlp += (after + model.prefix) * block.mlp
        if 0 < after < before and reduction is not None:
            rows = ("importance" in reduction.needs) + n * ("received" in reduction.needs)
            importance += rows * n * block.width
            planning += reduction.plan(before, after)
            merging += before * model.dim
            if before == start and reduction.learned is not None:
                learned = reduction.learned(before)
        before = after
    return Macs(
        stem=stem,
        attention=attention,
        mlp=mlp,
        head=model.head + (before + model.prefix) * model.head_per_token,
        importance=importance,
        planning=planning,
        merging=merging,
        learned=learned,
    )
