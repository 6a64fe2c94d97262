"""The recipes of examples/ are read, and run on images that stand for theirs."""

from __future__ import annotations

import gzip
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from timm.data.auto_augment import rand_augment_transform

from mergence import demo
from mergence.data import open_images
from mergence.sources import ASSETS
from mergence.train import Config, fit
from mergence.train.config import read_yaml
from mergence.train.seeding import seeded

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = sorted((ROOT / "examples").rglob("*.yaml"))


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: f"{file.parent.name}-{file.stem}")
def test_every_recipe_is_a_configuration(file: Path) -> None:
    config = Config.from_dict(read_yaml(file), str(file))
    assert config.macs
    assert config.out.startswith("runs/")


@pytest.mark.slow
def test_the_imagenet_recipe_runs_on_synthetic_images(tmp_path: Path) -> None:
    values = read_yaml(ROOT / "examples" / "imagenet" / "deit-small.yaml") | {
        "model": "timm-random:deit_small_patch16_224", "data": "synthetic:3", "val": "synthetic:1",
        "batch_size": 2, "epochs": 1, "workers": 0, "precision": "no", "out": str(tmp_path / "run"),
        "device": "cpu",
    }  # fmt: skip
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    summary = fit(Config.from_dict(values))
    assert [row["update"] for row in summary.history] == [0, 2]
    assert summary.history[-1]["loss"] > 6
    assert (summary.model / "config.json").exists()


def test_the_imagenet_recipe_augments_as_strongly_as_it_can() -> None:
    """Levels are drawn around 9 and end at 10: posterization to 0 bits, which Pillow 13 refuses."""
    policy = read_yaml(ROOT / "examples" / "imagenet" / "deit-small.yaml")["auto_augment"]
    transform = rand_augment_transform(policy.replace("m9", "m10"), {"magnitude_std": 0})
    image = Image.new("RGB", (8, 8), (200, 100, 50))
    for seed in range(200):
        with seeded(seed):
            assert transform(image).size == (8, 8)


@pytest.mark.slow
def test_the_fashion_mnist_recipe_learns(tmp_path: Path) -> None:
    """The embedded test images stand for the training images, in the files' own format."""
    folder = ROOT / "examples" / "fashion-mnist"
    unpacked = tmp_path / "images"
    unpacked.write_bytes(
        gzip.decompress((ASSETS / "fashion_mnist_test_images.idx3-ubyte.gz").read_bytes())
    )
    labels = ASSETS / "fashion_mnist_test_labels.idx1-ubyte.gz"
    command = [sys.executable, str(folder / "make_zip.py"), str(unpacked), str(labels)]
    subprocess.run([*command, str(tmp_path / "train.zip")], check=True, timeout=60)
    with zipfile.ZipFile(tmp_path / "train.zip") as archive:
        assert len(archive.namelist()) == 2000
    loaded = demo.load()
    with pytest.warns(UserWarning, match="not called as the model's classes"):
        data = open_images(
            tmp_path / "train.zip", transform=loaded.transform, mode="L",
            class_names=loaded.label_names,
        )  # fmt: skip
    original = demo.images(loaded)
    labels_of = dict(zip(original.names, original.labels or (), strict=True))
    for place in (0, 500, 1999):
        number = int(Path(data.names[place]).stem)
        assert (data.labels or ())[place] == labels_of[f"demo/{number:04d}"]
    values = read_yaml(folder / "train.yaml") | {
        "data": str(tmp_path / "train.zip"), "val": None, "out": str(tmp_path / "run"),
        "limit": 8, "epochs": 1, "batch_size": 4, "workers": 0, "device": "cpu", "precision": "no",
    }  # fmt: skip
    with pytest.warns(UserWarning, match="not called as the model's classes"):
        assert fit(Config.from_dict(values)).history[-1]["loss"] < 4


@pytest.mark.slow
def test_the_tiny_imagenet_recipe_finds_its_data(monkeypatch: pytest.MonkeyPatch) -> None:
    if not (ROOT.parent / "shared" / "data" / "tiny_imagenet_val.zip").exists():
        pytest.skip("there is no shared folder beside the checkout")
    from mergence.train import build

    monkeypatch.chdir(ROOT)
    config = Config.from_dict(read_yaml(ROOT / "examples" / "tiny-imagenet" / "train.yaml"))
    train, val = build.open_data(config, build.open_model(config))
    assert len(train) == 40_000
    assert val is not None
    assert len(val) == 5_000
    assert train.class_names == val.class_names
