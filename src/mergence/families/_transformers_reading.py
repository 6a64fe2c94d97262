"""How towers of transformers are read: which one a model has, its blocks, and what they cost."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from torch import nn

from mergence.errors import UnsupportedModelError
from mergence.families._common import linear_macs, require_class
from mergence.family import qualified_names
from mergence.macs import BlockCost


def tower_in(model: nn.Module, towers: Container[str], supported: str) -> Any:
    """The tower that a model is or has.

    Raises:
        UnsupportedModelError: It has none of these classes.
    """
    for module in model.modules():
        if any(name in towers for name in qualified_names(type(module))):
            return module
    raise UnsupportedModelError(
        f"This {type(model).__name__} has none of the towers that are known in it. Known: "
        f"{supported}."
    )


def require_blocks(
    tower: nn.Module,
    blocks: Sequence[Any],
    block: str,
    attention: tuple[str, str],
    supported: str,
    first: int = 1,
) -> None:
    """Check that the blocks of a tower are those whose forward is restated.

    Args:
        tower: The tower.
        blocks: Its blocks.
        block: The class that they are to be.
        attention: The name of their attention, and the class that it is to be.
        supported: What is covered.
        first: The number of the first of them.

    Raises:
        UnsupportedModelError: One is another.
    """
    name, cls = attention
    for index, one in enumerate(blocks, start=first):
        where = f"{index} of this {type(tower).__name__}"
        require_class(one, block, f"Block {where}", supported)
        attn = getattr(one, name, one)
        require_class(attn, cls, f"The attention of block {where}", supported)


def block_costs(
    blocks: Sequence[nn.Module], attention: str, mlp: Sequence[str], width: int
) -> tuple[BlockCost, ...]:
    """What blocks cost, from the names of their attention and of the parts of their MLP."""
    return tuple(
        BlockCost(
            attention=linear_macs(getattr(block, attention)),
            mlp=sum(linear_macs(getattr(block, name)) for name in mlp),
            width=width,
        )
        for block in blocks
    )


def pooling_costs(pool: nn.Module, width: int) -> tuple[int, int]:
    """What an attention pooling with one query costs: whatever the tokens, and for each."""
    projections = 2 * width**2  # the keys and values
    return linear_macs(pool) - projections, projections + 2 * width
