"""The script that gives restored tokens to a decoder of maps."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "dense" / "saliency.py"


def test_maps_are_those_of_the_dense_model_where_nothing_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = runpy.run_path(str(SCRIPT))
    # A new one's blocks would add next to nothing.
    sizes = {"img_size": 84, "depth": 2, "num_classes": 0, "init_values": 1.0}
    model = timm.create_model("vit_small_patch14_dinov2", **sizes)
    model.pretrained_cfg.update(input_size=(3, 84, 84))
    timm.models.save_for_hf(model, tmp_path / "folder", safe_serialization=True)
    decoder = script["Decoder"]().state_dict()
    decoder["final_conv.weight"] *= 10  # random ones make maps of next to one value
    save_file(decoder, tmp_path / "folder" / "decoder.safetensors")
    picture = tmp_path / "maps.png"
    arguments = ["--data", "synthetic:4", "--methods", "mergence", "--macs", "1", "0.7"]
    command = [str(SCRIPT), str(tmp_path / "folder"), *arguments, "--picture", str(picture)]
    monkeypatch.setattr(sys, "argv", command)
    script["main"]()
    printed = capsys.readouterr().out
    assert "| `mergence` 1 | 0.0000 | 1.0000 | 1.000 |" in printed
    merged = re.search(r"\| `mergence` 0.7 \| ([\d.]+) \| [\d.]+ \| ([\d.]+) \|", printed)
    assert merged is not None
    assert float(merged[1]) > 0
    assert float(merged[2]) < 1
    # Four images; in rows themselves, and the maps of the dense and the two reduced models.
    assert Image.open(picture).size == (4 * 131 + 3, 4 * 131 + 3)


def test_the_most_salient_fifth_is_that_of_each_map() -> None:
    script = runpy.run_path(str(SCRIPT))
    dense = torch.arange(100.0).view(1, 10, 10) / 100
    difference, correlation, iou = script["_compared"](dense, dense + 0.5)
    assert difference.item() == pytest.approx(0.5)
    assert correlation.item() == pytest.approx(1)
    assert iou.item() == 1
    (other,) = script["_compared"](dense, 1 - dense)[2]
    assert other.item() == 0
