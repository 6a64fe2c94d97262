"""The reference benchmark, where it lies beside the checkout: accuracy is what all this is for."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergence.data import loader, open_images
from mergence.evaluation import evaluate
from mergence.models import load_model
from mergence.recipe import make

SHARED = Path(__file__).parents[2] / "shared"
MODEL = SHARED / "models" / "deit_small_tinyimagenet"
IMAGES = SHARED / "data" / "tiny_imagenet_val.zip"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (MODEL.is_dir() and IMAGES.is_file()),
        reason="the reference model and images are for research only and not part of the project",
    ),
]


def test_the_default_method_stays_closest_to_a_real_dense_model() -> None:
    loaded = load_model(f"local-dir:{MODEL}")
    data = open_images(IMAGES, transform=loaded.transform, class_names=loaded.label_names, limit=30)
    recipes = {name: make(name, macs=0.67) for name in ("mergence", "tome", "evit")}
    rows = {r.name: r for r in evaluate(loaded.model, loader(data, batch_size=30), recipes).results}
    assert (rows["dense"].top1 or 0) > 65
    assert rows["mergence"].agreement > 90
    assert rows["mergence"].kl < rows["tome"].kl < rows["evit"].kl
