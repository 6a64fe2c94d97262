"""Whether what was written does what the model does."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mergence.errors import ExportError
from mergence.exporting.formats import Runner, tensors

TOLERANCE = 1e-3
"""How far a value may be off, as a share of the largest value of its output; see `tolerance_of`.

Another order of summing in float32 moves values by about 1e-6 of that: below this nothing but
rounding happened.
"""
ROUNDINGS = 4
"""The same in steps between numbers of the type, for types so coarse that it is more.

In bfloat16 a step is 8e-3, and a reduced model in eager mode is about as far from itself in
float32; so is the exported one, to another side. In float16 all of that is an eighth.
"""
EXEMPT = 0.05
"""Share of images that may be off by more.

A reduction is a choice. Where two tokens score the same but for rounding, two correct programs may
choose differently, and the outputs of that image are then two equally good ones, not equal ones.
"""


@dataclass(frozen=True)
class Agreement:
    """How an exported model compares with the model, on the same images.

    Attributes:
        images: How many.
        worst: The largest difference of any output, as a share of the largest value of that output.
        median: The median over the images of the largest difference of each.
        off: Images beyond `tolerance`; see `EXEMPT`.
        same_answer: Images on which the first output has its largest value at the same place.
        tolerance: That of the type of the answers; see `tolerance_of`.
    """

    images: int
    worst: float
    median: float
    off: int
    same_answer: int
    tolerance: float


def tolerance_of(dtype: torch.dtype) -> float:
    """How far a value of a type may be off, as a share of the largest value of its output."""
    step = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    return max(TOLERANCE, ROUNDINGS * step)


@torch.no_grad()
def compare(model: nn.Module, exported: Runner, images: Tensor) -> Agreement:
    """Run both, the exported one at several batch sizes.

    Raises:
        ExportError: The exported one does not run, or its outputs are not the model's.
    """
    # In batches, and in others than the exported one sees.
    starts = range(0, len(images), 8)
    expected = _outputs(lambda part: tensors(model(part)), [images[i : i + 8] for i in starts])
    half = max(1, len(images) // 2)
    parts = [part for part in (images[:1], images[1:half], images[half:]) if len(part)]
    try:
        found = _outputs(exported, parts)
    except Exception as error:
        raise ExportError(
            f"What was exported does not run ({type(error).__name__}): "
            f"{str(error).strip().splitlines()[0]} Nothing was written."
        ) from error
    if [y.shape for y in found] != [y.shape for y in expected]:
        raise ExportError(
            f"What was exported answers in the shapes {[list(y.shape) for y in found]}, and the "
            f"model in {[list(y.shape) for y in expected]}. Nothing was written."
        )
    tolerance = max(tolerance_of(y.dtype) for y in expected)
    found, expected = ([y.float() for y in outputs] for outputs in (found, expected))
    difference = torch.stack([_difference(*pair) for pair in zip(found, expected, strict=True)])
    difference = difference.amax(dim=0)
    answers = [outputs[0].argmax(dim=1) for outputs in (found, expected)]
    agreement = Agreement(
        images=len(images),
        worst=float(difference.max()),
        median=float(difference.median()),
        off=int((~(difference <= tolerance)).sum()),
        same_answer=int((answers[0] == answers[1]).sum()),
        tolerance=tolerance,
    )
    if agreement.off > EXEMPT * len(images):
        raise ExportError(
            f"On {agreement.off} of {len(images)} images what was exported is off by more than "
            f"{tolerance:g} of the largest value (worst {agreement.worst:.1e}), more than "
            f"near-ties between tokens explain ({EXEMPT:.0%} of the images). Nothing was written."
        )
    return agreement


def _outputs(run: Runner, parts: list[Tensor]) -> list[Tensor]:
    """Run on several batches; each output in one tensor, `[images, values]`."""
    answers = []
    for part in parts:
        # A scale or the like that belongs to no image is one of each.
        outputs = [y.expand(len(part)) if y.ndim == 0 else y for y in run(part)]
        answers.append([y.cpu().reshape(len(part), -1) for y in outputs])
    return [torch.cat(output) for output in zip(*answers, strict=True)]


def _difference(found: Tensor, expected: Tensor) -> Tensor:
    """The largest difference of each image; NaN is as far off as can be, whoever has it."""
    difference = (found - expected).abs().nan_to_num(torch.inf).amax(dim=1)
    scale = expected.abs().max()
    return difference / torch.where(scale == 0, 1, scale)  # an output may be zero everywhere
