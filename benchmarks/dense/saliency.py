"""What a real dense head makes of restored tokens: maps of saliency, against the dense model's.

    python benchmarks/dense/saliency.py FOLDER --data IMAGES --picture maps.jpg

FOLDER is what `dinov2.py` wrote: a DINOv2 ViT-S/14 and the decoder of its patch tokens. Prints, for
each method and budget, over all images: the mean absolute difference of the maps (values from 0 to
1), their correlation, and the mean IoU of the most salient fifth of each. The decoder is used as it
is.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.utils import make_grid, save_image

import mergence
from mergence.data import loader, open_images
from mergence.models import load_model


class Decoder(nn.Module):
    """Three steps up and one map, under the names that the package has for its parts."""

    def __init__(self) -> None:
        super().__init__()
        widths = (384, 256, 128, 64)
        for step, (before, after) in enumerate(pairwise(widths), 1):
            self.add_module(f"upconv{step}", nn.ConvTranspose2d(before, after, 4, 2, 1))
            self.add_module(f"bn{step}", nn.BatchNorm2d(after))
        self.final_conv = nn.Conv2d(widths[-1], 1, 1)

    def forward(self, patches: Tensor, side: int) -> Tensor:
        """`[B, patches, C]` to maps `[B, side, side]` of values from 0 to 1."""
        rows = int(patches.shape[1] ** 0.5)
        x = patches.transpose(1, 2).unflatten(2, (rows, rows))
        for step in (1, 2, 3):
            up, norm = self.get_submodule(f"upconv{step}"), self.get_submodule(f"bn{step}")
            x = norm(up(x)).relu()
        x = nn.functional.interpolate(self.final_conv(x), (side, side), mode="bilinear")
        return x.sigmoid()[:, 0]


@torch.inference_mode()
def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--methods", nargs="+", default=["mergence", "tome", "evit", "topk"])
    parser.add_argument("--macs", type=float, nargs="+", default=[0.67, 0.5])
    parser.add_argument("--picture", type=Path, help="images, and their maps in a row for each run")
    arguments = parser.parse_args()
    loaded = load_model(f"local-dir:{arguments.folder}")
    model = loaded.model
    decoder = Decoder().eval()
    decoder.load_state_dict(load_file(arguments.folder / "decoder.safetensors"), strict=False)

    def maps(tokens: Tensor, images: Tensor) -> Tensor:
        return decoder(tokens[:, model.num_prefix_tokens :], images.shape[-1])

    data = open_images(
        arguments.data, transform=loaded.transform, mode=loaded.mode, limit=arguments.limit
    )
    runs = [(name, macs) for name in arguments.methods for macs in arguments.macs]
    found: dict[tuple[str, float], list[Tensor]] = {run: [] for run in runs}
    rows: list[Tensor] = []
    for batch in loader(data, batch_size=16):
        dense = maps(model.forward_features(batch.images), batch.images)
        shown = [_seen(batch.images), dense[:, None].expand(-1, 3, -1, -1)]
        for run in runs:
            with mergence.applied(model, run[0], macs=run[1]):
                tokens = mergence.restore(model.forward_features(batch.images))
            reduced = maps(tokens, batch.images)
            found[run].append(_compared(dense, reduced))
            shown.append(reduced[:, None].expand(-1, 3, -1, -1))
        rows = rows or [row[:8] for row in shown]
    print("| | difference | correlation | IoU of the most salient fifth |\n|---|---|---|---|")
    for (name, macs), values in found.items():
        difference, correlation, iou = torch.cat(values, 1).mean(1).tolist()
        print(f"| `{name}` {macs:g} | {difference:.4f} | {correlation:.4f} | {iou:.3f} |")
    if arguments.picture:
        small = nn.functional.interpolate(torch.cat(rows), (128, 128), mode="area")
        save_image(make_grid(small, nrow=len(rows[0]), padding=3, pad_value=1), arguments.picture)


def _compared(dense: Tensor, reduced: Tensor) -> Tensor:
    """Difference, correlation and IoU of each image's maps, `[3, B]`."""
    one, other = dense.flatten(1), reduced.flatten(1)
    pairs = zip(one, other, strict=True)
    correlation = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in pairs])
    salient = [x > x.quantile(0.8, dim=1, keepdim=True) for x in (one, other)]
    iou = (salient[0] & salient[1]).sum(1) / (salient[0] | salient[1]).sum(1)
    return torch.stack([(one - other).abs().mean(1), correlation, iou])


def _seen(images: Tensor) -> Tensor:
    """Images as they were before ImageNet's normalization."""
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[..., None, None]
    return (images * std + mean).clamp(0, 1)


if __name__ == "__main__":
    main()
