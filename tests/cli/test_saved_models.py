"""Commands on a folder that mergence.save wrote: its recipe and what it learned are used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from typer.testing import CliRunner

import mergence
from mergence import surgery
from mergence.cli import app
from mergence.data import loader, open_images
from mergence.distances import kl_divergence
from mergence.errors import OptionError
from mergence.models import load_model

Run = Callable[..., Any]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model with a fusion that does something, saved."""
    size: dict[str, Any] = {"embed_dim": 24, "depth": 4, "num_heads": 2, "img_size": 64}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **size)
    mergence.apply(model, "mstm", keep_rate=0.5, fusion=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    mergence.save(model, tmp_path / "saved")
    return tmp_path / "saved"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for label in "abc":
        place = tmp_path / "images" / label
        place.mkdir(parents=True)
        Image.effect_noise((64, 64), 90).convert("RGB").save(place / "one.png")
    return tmp_path / "images"


@pytest.fixture
def run(folder: Path, tmp_path: Path) -> Run:
    """Runs a command on the folder and reads the JSON that it wrote."""

    def call(command: str, *arguments: object) -> Any:
        words = [command, f"local-dir:{folder}", *arguments, "--json", tmp_path / "out.json"]
        result = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
        assert result.exit_code == 0, result.output
        return json.loads((tmp_path / "out.json").read_text())

    return call


@pytest.mark.filterwarnings("ignore:The class folders of")
@torch.no_grad()
def test_eval_takes_the_recipe_and_what_was_learned(folder: Path, images: Path, run: Run) -> None:
    dense, row = run("eval", "--data", images)["results"]
    model = mergence.load(folder)
    assert (dense["name"], row["name"]) == ("dense", "mstm")
    assert row["recipe"]["method"]["fusion"] is True

    data = open_images(images, transform=load_model(f"local-dir:{folder}").transform)
    (batch,) = loader(data, batch_size=3)
    with mergence.disabled(model):
        expected = model(batch.images)
    found = float(kl_divergence(expected, model(batch.images)).mean())
    assert row["kl"] == pytest.approx(found, rel=1e-4)
    # A fusion that has learned nothing says something else.
    blocks = map(surgery.learned_module, model.modules())
    (gates,) = (m for m in blocks if m is not None)
    for parameter in gates.parameters():
        parameter.zero_()
    other = float(kl_divergence(expected, model(batch.images)).mean())
    assert row["kl"] != pytest.approx(other, rel=1e-2)

    # By name and beside others it has what it learned, too.
    how = ("--method", "tome", "--method", "mstm", "--keep-rate", 0.5, "--set", "fusion=true")
    with pytest.raises(OptionError, match="fusion"):
        run("eval", "--data", images, *how)
    how = ("--method", "mstm", "--keep-rate", 0.5, "--set", "fusion=true")
    _, again = run("eval", "--data", images, *how)["results"]
    assert again["kl"] == pytest.approx(row["kl"], rel=1e-4)


@pytest.mark.filterwarnings("ignore:The class folders of")
def test_what_is_asked_for_comes_before_what_was_saved(images: Path, run: Run) -> None:
    rows = run("eval", "--data", images, "--method", "tome", "--macs", 0.8)["results"]
    assert [row["name"] for row in rows] == ["dense", "tome"]
    rows = run("eval", "--data", images, "--macs", 0.8)["results"]
    assert [row["name"] for row in rows] == ["dense", "mergence"]


def test_other_weights_do_not_bring_the_recipe(folder: Path, images: Path, run: Run) -> None:
    with pytest.raises(OptionError, match="how much to reduce"):
        run("eval", "--data", images, "--checkpoint", folder / "model.safetensors")


def test_bench_and_visualize_take_the_recipe(images: Path, run: Run, tmp_path: Path) -> None:
    benched = run("bench", "--batch-size", 1, "--seconds", 0)
    assert [row["name"] for row in benched["rows"]] == ["dense", "mstm"]
    picture = (images / "a" / "one.png", "--out", tmp_path / "picture.png")
    assert run("visualize", *picture)["recipe"]["method"]["method"] == "mstm"
    assert run("visualize", *picture, "--macs", 0.8)["recipe"]["method"]["method"] == "mergence"
    with pytest.raises(OptionError, match="--method and --recipe"):
        run("visualize", *picture, "--method", "tome", "--recipe", "mine.json")


@pytest.mark.slow
def test_export_takes_the_recipe_and_what_was_learned(
    images: Path, run: Run, tmp_path: Path
) -> None:
    written = run("export", "--data", images, "--out", tmp_path / "model.pt2")
    assert written["recipe"]["method"]["method"] == "mstm"
    assert written["export"]["agreement"]["off"] == 0
