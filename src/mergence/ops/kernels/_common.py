"""What several kernels share."""

# mypy: disable-error-code="untyped-decorator"

from __future__ import annotations

import os
from typing import Any

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


def launched(kernel: Any, x: Tensor) -> Any:
    """The kernel to launch for `x`: where x is no plain tensor, what puts it into the graph."""
    return kernel if type(x) is Tensor or INTERPRETED else wrap_triton(kernel)


@triton.jit
def product(a: tl.tensor, b: tl.tensor, total: tl.tensor, INTERPRETED: tl.constexpr) -> tl.tensor:
    """Add the matrix product of two blocks to a float32 block."""
    if INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")
