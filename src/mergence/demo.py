"""The main job on a real trained model and real images, with nothing to download."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from mergence.data import ImageData, loader, open_images
from mergence.evaluation import Evaluation, evaluate
from mergence.models import LoadedModel, load_model
from mergence.recipe import make
from mergence.visualize import explain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

METHODS = ("mergence", "mstm", "tome", "evit", "topk")
BUDGETS = (0.67, 0.5)


def load() -> LoadedModel:
    """The embedded model: a ViT for Fashion-MNIST, 196 patches, 12 blocks."""
    return load_model("demo")


def images(loaded: LoadedModel, limit: int | None = None, seed: int = 0) -> ImageData:
    """The embedded images: 2,000 of the Fashion-MNIST test split, or `limit` of them."""
    return open_images(
        "demo",
        transform=loaded.transform,
        mode=loaded.mode,
        class_names=loaded.label_names,
        limit=limit,
        seed=seed,
    )


def compare(
    loaded: LoadedModel, data: ImageData, progress: Callable[[int], None] = lambda images: None
) -> Evaluation:
    """Compare the dense model with all methods of the demo at both budgets.

    Args:
        loaded: The model that `load` returns.
        data: The images to use.
        progress: Called with the number of images done after each batch.
    """
    recipes = {
        f"{method} {budget}": make(method, macs=budget) for budget in BUDGETS for method in METHODS
    }
    return evaluate(
        loaded.model,
        loader(data, batch_size=50),
        recipes,
        model_name="demo (ViT, Fashion-MNIST)",
        data_name="demo",
        progress=progress,
    )


def picture(loaded: LoadedModel, data: ImageData) -> Figure:
    """Draw what the default method does with one image of four classes each, at half the MACs.

    Where there is none of these classes, it is the first image.

    Args:
        loaded: The model that `load` returns.
        data: Where the images are taken from.
    """
    wanted = ("Sneaker", "Trouser", "Bag", "Coat")
    labels = [loaded.label(label) for label in data.labels or ()]
    names = [name for name in wanted if name in labels] or labels[:1]
    samples = [data[labels.index(name)] for name in names]
    tensors = torch.stack([sample.image for sample in samples if hasattr(sample, "image")])
    return explain(loaded, tensors, make("mergence", macs=0.5), titles=names)
