"""Towers as older releases of transformers build them.

Each architecture got its parts of today in a release of its own, so they are found by looking.
"""

from __future__ import annotations

from dataclasses import replace
from inspect import signature
from typing import Any

from mergence.errors import UnsupportedModelError
from mergence.families._transformers import CLIP, DINO, SPLIT_VIT, VIT, Tower
from mergence.family import is_older, release
from mergence.surgery import original_class

SPLIT_DINO = replace(DINO, split=True)
TUPLE_CLIP = replace(CLIP, tuples=True)

_SPLIT = {VIT: SPLIT_VIT, DINO: SPLIT_DINO}
_BLOCKS = {"layers": "encoder.layer", "model.layer": "layer"}


def as_built(kind: Tower, tower: Any) -> Tower:
    """What a tower is called in the tables, with the names that its own parts have.

    Raises:
        UnsupportedModelError: This release builds it in a way that is not restated.
    """
    require_release(tower, kind.oldest)
    kind = replace(kind, blocks=path_of_blocks(kind, tower))
    layout = kind.layout
    block: Any = next(iter(tower.get_submodule(kind.blocks)), None)
    first = getattr(getattr(block, layout.attention, None), "attention", None)
    if first is not None:
        layout = _SPLIT.get(layout, layout)
    elif "output_attentions" in signature(original_class(block).forward).parameters:
        layout = replace(layout, tuples=True)
    # Maps are made whole in the parent of the blocks; VideoMAE's biases were beside its layers.
    if (kind.maps and "." not in kind.blocks) or hasattr(first, "q_bias"):
        raise _unlike(tower)
    return replace(kind, layout=layout)


def path_of_blocks(kind: Tower, tower: Any) -> str:
    """Where a tower has its blocks."""
    here = hasattr(tower, kind.blocks.partition(".")[0])
    return kind.blocks if here else _BLOCKS.get(kind.blocks, kind.blocks)


def require_release(model: Any, oldest: str) -> None:
    """Refuse a model of a release before the first of which it was tried.

    Raises:
        UnsupportedModelError: It is one.
    """
    if is_older("transformers", oldest):
        raise _unlike(model)


def _unlike(tower: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"A {original_class(tower).__name__} is not supported as transformers "
        f"{release('transformers')} builds it. Upgrade: pip install -U 'transformers>=5.6'."
    )
