"""The operators behind every plan: which tokens resemble each other, and the merge itself.

Each has three implementations that agree: `reference`, written to be read; `dense`, without
scatter, for CPUs and for exported graphs; and `fused`, Triton kernels for CUDA. Nobody outside of
this package knows which one runs.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from mergence.ops import dense, fused
from mergence.plan import MergePlan

__all__ = ["Cosines", "cosines", "merge"]

Cosines = dense.Cosines | fused.Cosines

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
    run = fused.merge if _on_gpu(x) else dense.merge
    return run(x, size, plan, prefix)


def cosines(x: Tensor) -> Cosines:
    """The cosines between all tokens of an image, to be asked for the nearest ones.

    They are rounded to the type of `x`, so that what counts as a tie does not depend on the order
    in which an implementation sums.

    Args:
        x: `[B, N, C]` tokens. No gradient flows from the answers.
    """
    return fused.Cosines(x) if _on_gpu(x) else dense.Cosines(x)


def _on_gpu(x: Tensor) -> bool:
    # An exported graph must run where there is no mergence and no Triton.
    return (
        _TRITON
        and x.is_cuda
        and x.dtype in fused.DTYPES
        and not torch.compiler.is_exporting()
        and not torch.onnx.is_in_onnx_export()
    )
