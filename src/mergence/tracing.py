"""Follow every patch through a reduced forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mergence import ops
from mergence.errors import DataError, MergenceError
from mergence.plan import MergePlan
from mergence.program import program_of, require_images_alone
from mergence.state import Carry


@dataclass(frozen=True)
class ReductionPoint:
    """What one reduction did, in terms of the original patches.

    Attributes:
        block: The block that reduced, counted from 1; 0 where patches were read coarsely before.
        source: `[B, patches]` int64, the slot of each patch after this point, all points so far
            composed; -1 where dropped.
        size: `[B, slots]` patches that each slot stands for.
        anchor: `[B, slots]` int64, the patch that represents the slot: its most important one.
        importance: `[B, patches]` importance of each patch's token when this point chose, NaN where
            it was dropped earlier. For coarse patches, the loss that their regions were chosen by.
    """

    block: int
    source: Tensor
    size: Tensor
    anchor: Tensor
    importance: Tensor


@dataclass(frozen=True)
class Trace:
    """What a reduced forward did with each image.

    Attributes:
        output: The model's output, of whatever type it gives.
        grid: Patch rows and columns.
        points: The reductions, in order.
        method: The name of the method.
    """

    output: Any
    grid: tuple[int, int]
    points: tuple[ReductionPoint, ...]
    method: str


@dataclass
class _Observer:
    grid: tuple[int, int] | None = None
    points: list[ReductionPoint] = field(default_factory=list)

    def reduced(self, block: int, after: Carry, plan: MergePlan, importance: Tensor) -> None:
        source_after = after.source(plan.slots)
        if source_after is None or after.size is None:
            raise MergenceError("A reduction was observed without its books; this is a bug.")
        batch, tokens = plan.slot.shape
        if self.points:
            source, anchor = self.points[-1].source, self.points[-1].anchor
        else:
            source = anchor = torch.arange(tokens, device=plan.slot.device).expand(batch, tokens)
        at_patch = importance.gather(1, source.clamp(min=0))
        self.points.append(
            ReductionPoint(
                block=block,
                source=source_after,
                size=after.size,
                anchor=anchor.gather(1, ops.most_important(plan, importance)),
                importance=torch.where(source < 0, torch.nan, at_patch),
            )
        )


@torch.no_grad()
def trace(model: nn.Module, images: Tensor) -> Trace:
    """Run a reduced model and report what became of each patch.

    Args:
        model: A model that `apply` reduced.
        images: `[B, C, H, W]`, prepared as for the model.

    Raises:
        MergenceError: The model is not reduced, or does not take images alone.
        DataError: The images are no tensor.
    """
    program = program_of(model)
    if not isinstance(images, Tensor):
        raise DataError(
            f"The images are a {type(images).__name__}; give a tensor [B, C, H, W]. What a "
            "processor made has one as inputs['pixel_values']."
        )
    require_images_alone(model)
    observer = program.run.observer = _Observer()
    try:
        output = model(images)
    finally:
        program.run.observer = None
    grid = observer.grid or (1, program.patches)
    return Trace(output, grid, tuple(observer.points), program.method.name)
