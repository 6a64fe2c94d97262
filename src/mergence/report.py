"""What `describe` returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mergence.macs import Macs
from mergence.method import Method
from mergence.schedule import Schedule


@dataclass(frozen=True)
class Description:
    """What is applied to a model; prints as a short text.

    Attributes:
        model: The model's class.
        family: Its family.
        method: The method.
        schedule: The schedule.
        patches: Patches of an image.
        start: Patch tokens that enter the first block: fewer where some are read coarsely.
        prefix: Prefix tokens, never reduced.
        prefix_alone: Whether the head reads these alone, so that the last block computes no more
            than them after its attention. Where somebody asks for its patch tokens, it does.
        align: Multiple that token counts, prefix included, are rounded to.
        counts: Patch tokens after each block.
        dense: MACs of one image without reduction.
        reduced: MACs of one image with it.
    """

    model: str
    family: str
    method: Method
    schedule: Schedule
    patches: int
    start: int
    prefix: int
    prefix_alone: bool
    align: int
    counts: tuple[int, ...]
    dense: Macs
    reduced: Macs

    @property
    def macs_ratio(self) -> float:
        """MACs with reduction as a share of those without."""
        return self.reduced.total / self.dense.total

    def to_dict(self) -> dict[str, Any]:
        """The description as plain JSON values."""
        return {
            "model": self.model,
            "family": self.family,
            "method": self.method.to_dict(),
            "schedule": self.schedule.to_dict(),
            "patches": self.patches,
            "start": self.start,
            "prefix": self.prefix,
            "prefix_alone": self.prefix_alone,
            "align": self.align,
            "counts": list(self.counts),
            "gmacs_dense": self.dense.total / 1e9,
            "gmacs": self.reduced.total / 1e9,
            "macs_ratio": self.macs_ratio,
        }

    def __str__(self) -> str:
        reduced = self.reduced
        overhead = reduced.importance + reduced.planning + reduced.merging + reduced.learned
        counts = " ".join(map(str, self.counts))
        multiples = f", in multiples of {self.align}" if self.align > 1 else ""
        start = "" if self.start == self.patches else f"{self.start} → "
        alone = ", alone in the last MLP" if self.prefix_alone else ""
        prefix = f"(+ {self.prefix} prefix{alone}{multiples})"
        before, after = self.dense.total / 1e9, reduced.total / 1e9
        return (
            f"{self.model} ({self.family}) with {self.method}\n"
            f"  patch tokens  {self.patches} → {start}{counts}  {prefix}\n"
            f"  MACs          {before:.3f} G → {after:.3f} G  "
            f"({self.macs_ratio:.1%}; {overhead / self.dense.total:.2%} for reducing)"
        )
