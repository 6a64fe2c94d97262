"""Follow every patch through a reduced forward."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mergence import ops
from mergence.errors import DataError, MergenceError, PlanError
from mergence.plan import DROPPED, MergePlan
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
    method: str
    grid: tuple[int, int] | None = None
    points: list[ReductionPoint] = field(default_factory=list)

    def planned(self, block: int, plan: MergePlan) -> None:
        """Look at the values of a plan, for which other forwards would have to wait."""
        slot, weight, last = plan.slot, plan.weight, plan.slots - 1
        said = f"Method '{self.method}' made a wrong plan in block {block}:"
        if at := _first((slot < DROPPED) | (slot > last)):
            raise PlanError(
                f"{said} token {at[1]} of image {at[0]} has slot {int(slot[at])}; give 0 "
                f"to {last}, or {DROPPED} to drop it."
            )
        filled = torch.zeros(len(slot), last + 2, dtype=torch.bool, device=slot.device)
        if at := _first(~filled.scatter(1, slot + 1, True)[:, 1:]):
            raise PlanError(
                f"{said} slot {at[1]} of image {at[0]} is empty. Each of the {plan.slots} "
                "slots needs a token."
            )
        if at := _first((slot >= 0) & ~((weight > 0) & weight.isfinite())):
            raise PlanError(
                f"{said} token {at[1]} of image {at[0]} has weight {float(weight[at])}; "
                "weights are positive and finite."
            )

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


def _first(where: Tensor) -> tuple[int, ...] | None:
    """Image and place, counted from 0, of the first that is so."""
    found = where.nonzero()
    return tuple(found[0].tolist()) if len(found) else None


@torch.no_grad()
def trace(model: nn.Module, images: Tensor) -> Trace:
    """Run a reduced model and report what became of each patch.

    It also checks the values of every plan, so call it while you write a method.

    Args:
        model: A model that `apply` reduced.
        images: `[B, C, H, W]`, prepared as for the model.

    Raises:
        MergenceError: The model is not reduced, or does not take images alone.
        DataError: The images are no tensor.
        PlanError: A plan has values that it must not have. Other forwards do not look at them.
    """
    program = program_of(model)
    if not isinstance(images, Tensor):
        raise DataError(
            f"The images are a {type(images).__name__}; give a tensor [B, C, H, W]. What a "
            "processor made has one as inputs['pixel_values']."
        )
    require_images_alone(model)
    observer = program.run.observer = _Observer(program.method.name)
    try:
        output = model(images)
    finally:
        program.run.observer = None
    grid = observer.grid or (1, program.patches)
    return Trace(output, grid, tuple(observer.points), program.method.name)
