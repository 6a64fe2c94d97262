"""The operators behind every plan.

`merge` is the one that models run. It has two implementations that agree: `reference`, written to
be read, and `dense`, without scatter, which is fast on a CPU and exports to ONNX.
"""

from mergence.ops.dense import merge as merge

__all__ = ["merge"]
