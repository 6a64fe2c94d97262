"""Triton kernels. Importing this package imports Triton; see `mergence.ops.fused`.

Each program owns its part of the output and sums in a fixed order: there are no atomic operations,
and the same input gives the same output, bit for bit.
"""

from mergence.ops.kernels.attention import attend, attention_of_row
from mergence.ops.kernels.cosines import nearest, nearest_above, scales
from mergence.ops.kernels.merging import merge
from mergence.ops.kernels.splitting import split

__all__ = [
    "attend",
    "attention_of_row",
    "merge",
    "nearest",
    "nearest_above",
    "scales",
    "split",
]
