"""The operators behind every plan: which tokens resemble each other, and the merge itself.

Each has three implementations that agree: `cpu`; `fused`, Triton kernels for CUDA; and `dense`,
without scatter, for exported graphs and for other devices. Nobody outside of this package knows
which one runs.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from mergence.ops import cpu, dense, fused
from mergence.plan import MergePlan

__all__ = ["Cosines", "cosines", "merge"]

Cosines = dense.Cosines | cpu.Cosines | fused.Cosines

_TRITON = find_spec("triton") is not None


def merge(x: Tensor, size: Tensor, plan: MergePlan, prefix: int = 0) -> tuple[Tensor, Tensor]:
    """Merge tokens into the slots of a plan.

    Args:
        x: `[B, P + N, C]` prefix and patch tokens.
        size: `[B, N]` float32, how many patches each patch token stands for.
        plan: A plan for these N patch tokens.
        prefix: P, the number of tokens in front that pass unchanged.

    Returns:
        `[B, P + slots, C]` in the type of `x`: the prefix, and the weighted mean of each slot. And
        the sum of the sizes in each slot, `[B, slots]` float32. A slot whose weights are all zero
        yields zeros. With `plan.keep_norm` the mean is scaled to the largest norm of the slot's
        tokens of positive weight.
    """
    merged: tuple[Tensor, Tensor] = _implementation(x).merge(x, size, plan, prefix)
    return merged


def cosines(x: Tensor) -> Cosines:
    """The cosines between all tokens of an image, to be asked for the nearest ones.

    They are rounded to the type of `x`, so that what counts as a tie does not depend on the order
    in which an implementation sums.

    Args:
        x: `[B, N, C]` tokens. No gradient flows from the answers.
    """
    found: Cosines = _implementation(x).Cosines(x)
    return found


def _implementation(x: Tensor) -> ModuleType:
    # An exported graph must run where there is no mergence and no Triton.
    if torch.compiler.is_exporting() or torch.onnx.is_in_onnx_export():
        return dense
    if _TRITON and x.is_cuda and x.dtype in fused.DTYPES:
        return fused
    return cpu if x.device.type == "cpu" else dense
