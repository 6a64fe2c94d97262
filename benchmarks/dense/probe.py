"""What restored feature maps are worth to a segmentation head: a linear probe, dense and reduced.

    python benchmarks/dense/probe.py --out benchmarks/dense/results/fashion-mnist.json

The embedded model on the embedded images. A patch of 2 x 2 pixels is foreground where its mean is
above a threshold. A linear head is fitted by ridge regression on the patch tokens of half of the
images and judged on the other half by the mean IoU of foreground and background: fitted on the
dense tokens and used as it is on the restored ones ("same head", what happens to a head that
exists), and fitted on the restored tokens ("own head").
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import mergence
from mergence.data import loader, open_images
from mergence.models import LoadedModel, load_model

RIDGE = 1e-3
"""Penalty on the weights, as a share of the mean square of the features."""


def foreground(pixels: Tensor, grid: tuple[int, int], threshold: float) -> Tensor:
    """Which patches show something, `[B, patches]` bool, of pixels `[B, 1, H, W]` in [0, 1]."""
    return F.adaptive_avg_pool2d(pixels, grid).flatten(1) > threshold


def tokens(model: Any, images: Tensor, blocks: list[int]) -> Tensor:
    """Normalised patch tokens after each block (counted from 1), `[blocks, B, patches, C]`."""
    return torch.stack(
        model.forward_intermediates(
            images,
            indices=[block - 1 for block in blocks],
            norm=True,
            output_fmt="NLC",
            intermediates_only=True,
        )
    )


def fit(features: Tensor, labels: Tensor) -> Tensor:
    """The weights of a linear head, bias last, for `[B, patches, C]` and `[B, patches]` bool."""
    x = _with_bias(features).flatten(0, 1).double()
    y = labels.flatten().double() * 2 - 1
    penalty = RIDGE * x.square().mean() * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    penalty[-1, -1] = 0
    return torch.linalg.solve(x.T @ x + penalty, x.T @ y)


def mean_iou(features: Tensor, labels: Tensor, head: Tensor) -> float:
    """Mean IoU of foreground and background in percent, over all patches of all images."""
    said = _with_bias(features).double() @ head > 0
    ious = [
        (said & labels).sum() / (said | labels).sum()
        for said, labels in (
            (said, labels),
            (~said, ~labels),
        )
    ]
    return 100 * float(torch.stack(ious).mean())


def _with_bias(features: Tensor) -> Tensor:
    return F.pad(features, (0, 1), value=1.0)


@torch.inference_mode()
def probe(
    loaded: LoadedModel,
    runs: Mapping[str, Mapping[str, Any]],
    *,
    images: int = 1000,
    blocks: list[int],
    threshold: float = 0.1,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Run the probe.

    Args:
        loaded: The embedded model.
        runs: What `mergence.apply` is given, by name.
        images: Half of them to fit on, half to judge by.
        blocks: After which blocks to read tokens, counted from 1.
        threshold: From which mean a patch is foreground.
        seed: Which images are drawn.

    Returns:
        One row a run and block, those of the dense model first.
    """
    data = open_images(
        "demo",
        transform=loaded.transform,
        mode=loaded.mode,
        class_names=loaded.label_names,
        limit=images,
        seed=seed,
    )
    found: dict[str, list[Tensor]] = {"dense": [], **{name: [] for name in runs}}
    labels = []
    for batch in loader(data, batch_size=50):
        rows, columns = loaded.model.patch_embed.grid_size
        labels.append(foreground(loaded.pixels(batch.images), (rows, columns), threshold))
        found["dense"].append(tokens(loaded.model, batch.images, blocks))
        for name, how in runs.items():
            with mergence.applied(loaded.model, **how):
                found[name].append(tokens(loaded.model, batch.images, blocks))
    # The images come sorted by number, which says nothing about their class.
    label, half = torch.cat(labels), len(data) // 2
    features = {name: torch.cat(parts, dim=1) for name, parts in found.items()}
    rows_ = []
    for name, of_run in features.items():
        for block, dense, own in zip(blocks, features["dense"], of_run, strict=True):
            same = mean_iou(own[half:], label[half:], fit(dense[:half], label[:half]))
            refitted = mean_iou(own[half:], label[half:], fit(own[:half], label[:half]))
            rows_.append({"run": name, "block": block, "same_head": same, "own_head": refitted})
    return rows_


def main(arguments: list[str] | None = None) -> None:
    """Print a table, and write it as JSON where asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--blocks", type=int, nargs="+", default=[6, 9, 12])
    parser.add_argument("--methods", nargs="+", default=["mergence", "tome", "topk"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.67, 0.5])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    runs = {
        f"{method} {budget}": {"method": method, "macs": budget}
        for budget in given.budgets
        for method in given.methods
    }
    rows = probe(load_model("demo"), runs, images=given.images, blocks=given.blocks)
    dense = {row["block"]: row for row in rows if row["run"] == "dense"}
    print("| tokens | block | same head | change | own head | change |\n|---|---|---|---|---|---|")
    for row in rows:
        cells = [f"`{row['run']}`", str(row["block"])]
        for head in ("same_head", "own_head"):
            change = row[head] - dense[row["block"]][head]
            cells += [f"{row[head]:.1f}", f"{change:+.1f}" if row["run"] != "dense" else ""]
        print("|", " | ".join(cells), "|")
    if given.out is not None:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {"images": given.images, "torch": torch.__version__}
        given.out.write_text(json.dumps(settings | {"rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
