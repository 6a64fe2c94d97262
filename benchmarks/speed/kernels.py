"""Operator by operator: each implementation that runs on a device, median microseconds.

    python benchmarks/speed/kernels.py --batch-size 256 --tokens 196 --channels 384

On CUDA the Triton kernels beside plain torch operators (for attention: torch's own, with the bias
as a mask); on a CPU the operators for CPUs beside those for exported graphs. The tokens are random,
a third of them leaves, and one prefix token stands in front.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mergence.benchmark import take_turns
from mergence.ops import cpu, dense, fused
from mergence.plan import MergePlan


@torch.inference_mode()
def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=196, help="patch tokens")
    parser.add_argument("--channels", type=int, default=384)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", help="bfloat16 on CUDA, else float32")
    parser.add_argument("--rounds", type=int, default=30)
    arguments = parser.parse_args()
    place = torch.device(arguments.device)
    default = "bfloat16" if place.type == "cuda" else "float32"
    dtype = getattr(torch, arguments.dtype or default)
    batch, tokens, channels = arguments.batch_size, arguments.tokens, arguments.channels

    x = torch.randn(batch, 1 + tokens, channels, device=place, dtype=dtype)
    heads = channels // arguments.head_dim
    qkv = torch.randn(batch, 1 + tokens, 3, heads, arguments.head_dim, device=place, dtype=dtype)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    bias = torch.rand(batch, 1, 1, 1 + tokens, device=place).to(dtype)
    score, size = torch.rand(batch, tokens, device=place), torch.ones(batch, tokens, device=place)
    kept = tokens - tokens // 3
    order, at = dense.split(score, kept)
    target = torch.randint(0, kept, (batch, tokens - kept), device=place)
    own = torch.arange(kept, device=place).expand(batch, -1)
    slot = torch.cat((own, target), dim=1).gather(1, at)
    plan = MergePlan(slot, size, kept, keep_norm=True)

    ours: Any = fused if place.type == "cuda" else cpu
    calls: dict[str, Callable[[Any], Any]] = {
        "attention, no bias": lambda ops: ops.attend(q, k, v, None, 0.0),
        "attention": lambda ops: ops.attend(q, k, v, bias, 0.0),
        "attention of one row": lambda ops: ops.attention_of_row(q[:, :, :1], k, 0.125, bias),
        "nearest above": lambda ops: ops.Cosines(x[:, 1:]).to_nearest_above(score),
        "split": lambda ops: ops.split(score, kept),
        "nearest kept": lambda ops: ops.Cosines(x[:, 1:]).nearest(order[:, kept:], order[:, :kept]),
        "merge": lambda ops: ops.merge(x, size, plan, 1),
    }
    name_of_ours = ours.__name__.rpartition(".")[2]
    print(f"{'microseconds':24s}{name_of_ours:>12s}{'dense':>12s}")
    for name, call in calls.items():
        turns = {"dense": partial(_with, call, dense), name_of_ours: partial(_with, call, ours)}
        times = take_turns(turns, x, 0.0, arguments.rounds)
        print(f"{name:24s}{_median(times[name_of_ours]):12.1f}{_median(times['dense']):12.1f}")
    copies = take_turns({"dense": torch.clone}, x, 0.0, arguments.rounds)["dense"]
    print(f"{'copy of the tokens':24s}{_median(copies):12.1f}")


def _with(call: Callable[[Any], Any], operators: Any, _: Tensor) -> Any:
    return call(operators)


def _median(milliseconds: list[float]) -> float:
    return 1000 * statistics.median(milliseconds)


if __name__ == "__main__":
    main()
