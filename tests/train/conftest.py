"""A tiny model and real small images: a training run takes a second."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from mergence import demo
from mergence.models import DEMO_MODEL
from mergence.train import Config


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The embedded model's architecture with 49 patches, four narrow blocks, random weights."""
    import timm

    folder: Path = tmp_path_factory.mktemp("tiny")
    config = json.loads((DEMO_MODEL / "config.json").read_text())
    config["model_args"] |= {"embed_dim": 32, "depth": 4, "num_heads": 2, "patch_size": 4}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(0)
    model = timm.create_model(f"local-dir:{folder}")
    save_file(model.state_dict(), folder / "model.safetensors")
    return f"local-dir:{folder}"


@pytest.fixture(scope="session")
def config_in(tiny: str) -> Callable[[Path], Callable[..., Config]]:
    """Builds configurations of short runs on the CPU below a folder; any field can be given."""

    def place(folder: Path) -> Callable[..., Config]:
        def build(**fields: Any) -> Config:
            usual: dict[str, Any] = {
                "model": tiny,
                "data": "demo",
                "out": str(folder / "run"),
                "limit": 50,
                "batch_size": 16,
                "epochs": 2,
                "lr": 2e-3,
                "device": "cpu",
            }
            if not {"macs", "keep_rate", "recipe"} & fields.keys():
                usual["macs"] = 0.67
            return Config.from_dict(usual | fields)

        return build

    return place


@pytest.fixture
def config(
    config_in: Callable[[Path], Callable[..., Config]], tmp_path: Path
) -> Callable[..., Config]:
    """Builds configurations of short runs in the test's own folder."""
    return config_in(tmp_path)


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    """Twelve of the embedded images in three class folders."""
    loaded = demo.load()
    data = demo.images(loaded, limit=40)
    wanted = ("Bag", "Coat", "Dress")
    root = tmp_path / "images"
    for name, label in zip(data.names, data.labels or (), strict=True):
        if loaded.label(label) in wanted:
            (root / loaded.label(label)).mkdir(parents=True, exist_ok=True)
            data.source.open(name).save(root / loaded.label(label) / f"{Path(name).name}.png")
    return root
