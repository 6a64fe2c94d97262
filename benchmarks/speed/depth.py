"""A whole depth model, and its backbone alone, dense and reduced, in turns.

    python benchmarks/speed/depth.py --threads 2

Depth Anything with random weights of the size of its small checkpoint, one image of 518 x 518.
The share of the MACs is that of the backbone; neck and head come on top, dense and reduced.
"""

from __future__ import annotations

import argparse

import torch
from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation

import mergence

SIDE = 518
SMALL = {
    "model_type": "dinov2",
    "hidden_size": 384,
    "num_hidden_layers": 12,
    "num_attention_heads": 6,
    "image_size": SIDE,
    "patch_size": 14,
    "out_indices": [3, 6, 9, 12],
    "reshape_hidden_states": False,
    "apply_layernorm": True,
}


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--macs", type=float, nargs="*", default=[0.67, 0.5])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    whole = DepthAnythingForDepthEstimation(DepthAnythingConfig(backbone_config=SMALL)).eval()
    recipes = {}
    for share in arguments.macs:
        with mergence.applied(whole, macs=share):
            recipes[f"{share:g}"] = mergence.recipe_of(whole)
    for name, model in (("whole", whole), ("backbone", whole.backbone)):
        result = mergence.bench(
            model,
            recipes,
            input_size=(3, SIDE, SIDE),
            batches=[arguments.batch_size],
            dtypes=[getattr(torch, arguments.dtype)],
            device=arguments.device,
        )
        for row in result.rows:
            print(f"{name:9} {row.name:6} {row.ms:8.1f} ms   {row.speedup:5.2f} times as fast")


if __name__ == "__main__":
    main()
