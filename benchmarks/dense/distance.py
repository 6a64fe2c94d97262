"""How far restored patch features are from those of the dense model, and copied ones.

    python benchmarks/dense/distance.py MODEL --data VAL --limit 200 --dtype bfloat16

MODEL is what `mergence eval` takes, of timm. Prints the mean cosine distance after some blocks, the
last with the model's norm: where every patch has its token's value (*copied*: by the source map),
and with what set it apart from that (*restored*: `forward_intermediates`, as `mergence.restore`).
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

import mergence
from mergence.data import loader, open_images
from mergence.distances import cosine_distance
from mergence.models import load_model


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--methods", nargs="+", default=["mergence", "tome", "evit", "topk"])
    parser.add_argument("--macs", type=float, nargs="+", default=[0.67, 0.5])
    parser.add_argument("--blocks", type=int, nargs="+", default=[6, 9, 12])
    arguments = parser.parse_args()
    loaded = load_model(arguments.model)
    model: Any = loaded.model.to(getattr(torch, arguments.dtype))
    data = open_images(
        arguments.data, transform=loaded.transform, mode=loaded.mode, limit=arguments.limit
    )
    runs = [(name, macs) for name in arguments.methods for macs in arguments.macs]
    far = {run: torch.zeros(2, len(arguments.blocks)) for run in runs}
    for batch in loader(data, batch_size=50):
        images = batch.images.to(next(model.parameters()).dtype)
        dense = _features(model, images, arguments.blocks)
        for run in runs:
            with mergence.applied(model, run[0], macs=run[1]):
                copied = _copied(model, images, arguments.blocks)
                restored = _features(model, images, arguments.blocks)
            for row, found in enumerate((copied, restored)):
                for column, (one, other) in enumerate(zip(dense, found, strict=True)):
                    distance = cosine_distance(one.flatten(0, 1), other.flatten(0, 1)).mean()
                    far[run][row, column] += distance.cpu() * len(images) / len(data)
    print("| | " + " | ".join(f"block {b}, copied | restored" for b in arguments.blocks) + " |")
    print("|---" * (1 + 2 * len(arguments.blocks)) + "|")
    for (name, macs), found in far.items():
        cells = " | ".join(f"{value:.4f}" for value in found.T.flatten().tolist())
        print(f"| `{name}` {macs:g} | {cells} |")


def _features(model: Any, images: Tensor, blocks: list[int]) -> list[Tensor]:
    """Patch features `[B, patches, C]` after each of these blocks."""
    found = model.forward_intermediates(
        images, [block - 1 for block in blocks], output_fmt="NLC", intermediates_only=True
    )
    return [
        model.norm(y) if b == len(model.blocks) else y for b, y in zip(blocks, found, strict=True)
    ]


def _copied(model: Any, images: Tensor, blocks: list[int]) -> list[Tensor]:
    """The same where every patch has its token's value."""
    tokens: dict[int, Tensor] = {}
    hooks = [
        model.blocks[b - 1].register_forward_hook(lambda _, x, y, b=b: tokens.update({b: y}))
        for b in blocks
    ]
    points = mergence.trace(model, images).points
    for hook in hooks:
        hook.remove()
    found = []
    for block in blocks:
        y = tokens[block][:, model.num_prefix_tokens :]
        y = model.norm(y) if block == len(model.blocks) else y
        until = [point for point in points if point.block <= block]
        found.append(mergence.restore(y, until[-1].source) if until else y)
    return found


if __name__ == "__main__":
    main()
