"""The plainest way to fewer tokens: a smaller image. What it costs, to compare with.

    python benchmarks/accuracy/smaller_input.py MODEL --data VAL --limit 500

A copy of the model takes images of each size (timm resamples its position embedding), made from the
very images that the model gets at its own size. Prints the share of the MACs, top-1 and the KL
divergence to the model at its own size.
"""

from __future__ import annotations

import argparse
import copy

import torch
from torch.nn import functional as F

from mergence import family
from mergence.data import loader, open_images
from mergence.distances import kl_divergence
from mergence.macs import count
from mergence.models import load_model


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--sizes", type=int, nargs="+", default=[208, 192, 176, 160, 144])
    arguments = parser.parse_args()
    loaded = load_model(arguments.model)
    own = loaded.model.patch_embed.img_size[0]
    models = {own: loaded.model}
    for side in arguments.sizes:
        models[side] = copy.deepcopy(loaded.model)
        models[side].set_input_size((side, side))
    data = open_images(
        arguments.data,
        transform=loaded.transform,
        mode=loaded.mode,
        class_names=loaded.label_names,
        num_classes=loaded.model.num_classes,
        limit=arguments.limit,
    )
    right, far, images = dict.fromkeys(models, 0), dict.fromkeys(models, 0.0), 0
    for batch in loader(data, batch_size=32):
        images += len(batch)
        dense = None
        for side, model in models.items():
            small = batch.images
            if side != own:
                small = F.interpolate(small, size=(side, side), mode="bicubic", antialias=True)
            logits = model(small)
            dense = logits if dense is None else dense
            right[side] += int((logits.argmax(dim=1) == batch.labels).sum())
            far[side] += float(kl_divergence(dense, logits).sum())
    costs = {}
    for side, model in models.items():
        spec = family.find(model).inspect(model)
        costs[side] = count(spec.cost, spec.patches).total
    print(f"{images} images\n\n| side | MACs | top-1 | KL |\n|---|---|---|---|")
    for side in models:
        top1, share = 100 * right[side] / images, costs[side] / costs[own]
        print(f"| {side} | {share:.3f} | {top1:.2f} | {far[side] / images:.4f} |")


if __name__ == "__main__":
    main()
