"""Dense with torch's fused attention and with timm's two products, and reduced models, in turns.

    python benchmarks/speed/attention.py deit_small_patch16_224 --batch-sizes 1 8 32

On CPUs without tiles for bfloat16 the fused attention, which timm takes, is the slower one. So this
says what a reduction is worth against the faster of the two dense models, too.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import timm
import torch

import mergence
from mergence.benchmark import take_turns

BUDGETS = (0.67, 0.5)


def build(name: str, dtype: torch.dtype, *, fused: bool) -> Any:
    """A model whose attention is torch's, or written out by timm."""
    timm.layers.set_fused_attn(fused)
    torch.manual_seed(0)
    return timm.create_model(name).eval().to(dtype)


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=10.0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dtype = getattr(torch, arguments.dtype)
    models = {
        "dense": build(arguments.model, dtype, fused=True),
        "dense, products": build(arguments.model, dtype, fused=False),
    }
    for share in BUDGETS:
        model = build(arguments.model, dtype, fused=True)
        models[f"{share:g}"] = mergence.apply(model, macs=share)
    size = models["dense"].pretrained_cfg["input_size"]
    for batch in arguments.batch_sizes:
        calls = {n: torch.compile(m) if arguments.compile else m for n, m in models.items()}
        with torch.inference_mode():
            times = take_turns(
                calls, torch.randn(batch, *size, dtype=dtype), arguments.seconds, rounds=7
            )
        middle = {name: statistics.median(found) for name, found in times.items()}
        dense = [ms for name, ms in middle.items() if name.startswith("dense")]
        for name, ms in middle.items():
            ideal = (
                ", ".join(f"{one / ms * float(name):.2f}" for one in dense)
                if name[0] == "0"
                else ""
            )
            print(f"batch {batch:3} {name:16} {ms:8.1f} ms   {ideal}")


if __name__ == "__main__":
    main()
