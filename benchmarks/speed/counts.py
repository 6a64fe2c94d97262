"""Whether some token counts are faster than others: one block at many counts, in turns.

    OMP_NUM_THREADS=1 python benchmarks/speed/counts.py deit_small_patch16_224 --batch-size 8

Prints multiply-adds per second. The block's attention has a mask, as after a reduction. On a CPU
the clock is the process's own time, which other programs do not disturb.
"""

from __future__ import annotations

import argparse
import statistics
import time

import timm
import torch

from mergence.devices import synchronise


@torch.inference_mode()
def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a model of timm's VisionTransformer")
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=[*range(96, 106), *range(126, 137)]
    )
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    place = {"device": torch.device(arguments.device), "dtype": getattr(torch, arguments.dtype)}
    clock = time.process_time if place["device"].type == "cpu" else time.perf_counter
    model = timm.create_model(arguments.model).eval()
    block, batch, width = model.blocks[0].to(**place), arguments.batch_size, model.embed_dim
    inputs = {
        n: (torch.randn(batch, n, width, **place), torch.randn(batch, 1, 1, n, **place))
        for n in arguments.tokens
    }
    seconds: dict[int, list[float]] = {n: [] for n in inputs}
    for _ in range(1 + arguments.rounds):
        for n, (x, bias) in inputs.items():
            synchronise(place["device"])
            start = clock()
            block(x, attn_mask=bias)
            synchronise(place["device"])
            seconds[n].append(clock() - start)
    linear = sum(p.numel() for p in block.parameters() if p.ndim == 2)
    for n, (_, *counted) in seconds.items():
        macs = batch * (n * linear + 2 * n * n * width)
        median = statistics.median(counted)
        print(f"{n:5d} tokens  {1000 * median:8.3f} ms  {macs / median / 1e9:8.1f} GMACs/s")


if __name__ == "__main__":
    main()
