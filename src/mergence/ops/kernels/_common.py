"""What several kernels share."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import os
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import wrap_triton

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, which keeps bfloat16 as integers and would multiply
those."""


def rowwise(x: Tensor) -> Tensor:
    """The tensor with its last dimension next to each other, as kernels read it."""
    return x if x.stride(-1) == 1 else x.contiguous()


def blocks(n: int, size: int) -> int:
    """How many blocks of a size hold n. Triton's own takes longer than the operator it is for."""
    return -(-n // size)


def power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << (int(n) - 1).bit_length()


def launch(kernel: Any, programs: int, x: Tensor, *arguments: Any, **options: Any) -> None:
    """Launch a kernel on the device of `x`, its first argument, or put it into the graph of `x`.

    Programs are along one axis, on which CUDA takes 2^31 - 1 and on others 65535. Those that read
    the same come one after the other, so that it is still in the cache.
    """
    if type(x) is not Tensor and not INTERPRETED:
        wrap_triton(kernel)[(programs,)](x, *arguments, **options)
        return
    # Triton takes the current device, whatever x is on.
    with torch.cuda.device_of(x):  # type: ignore[no-untyped-call]
        kernel[(programs,)](x, *arguments, **options)


@triton.jit
def product(a: tl.tensor, b: tl.tensor, total: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """Add the matrix product of two blocks to a float32 block."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
