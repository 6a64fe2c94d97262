"""Compare reductions with the dense model on a set of images."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mergence import family, surgery
from mergence.api import applied, apply, remove
from mergence.data import Batches, Skipped, as_batches
from mergence.devices import placed, stop_training, synchronise, warn_of_slow_type
from mergence.distances import check_classes, compared, cosine_distance, kl_divergence
from mergence.errors import DataError, OptionError
from mergence.macs import count
from mergence.program import program_of, require_images_alone
from mergence.recipe import Recipe
from mergence.tracing import trace

DENSE = "dense"


@dataclass(frozen=True)
class Result:
    """How one reduction did; the dense model is the first of them.

    Attributes:
        name: `dense`, or the name that the recipe was given.
        recipe: The recipe as JSON values; None for the dense model.
        gmacs: Multiply-adds of one image, in units of 1e9, at the size that the images had; where
            they differ in size, the mean over them.
        macs_ratio: The same as a share of the dense model's.
        top1: Percent of labelled images whose label is the first guess; None without labels.
        top5: Percent of labelled images whose label is among the first five; None without labels.
        agreement: Percent of images with the dense model's first guess; None without class scores.
        kl: Mean Kullback-Leibler divergence from the dense model's distribution, in nats; None
            without class scores.
        cosine: Mean cosine distance from the dense model's features; None for class scores.
        images_per_s: Images per second of forward time, in batches as evaluated.
    """

    name: str
    recipe: dict[str, Any] | None
    gmacs: float
    macs_ratio: float
    top1: float | None
    top5: float | None
    agreement: float | None
    kl: float | None
    cosine: float | None
    images_per_s: float


@dataclass(frozen=True)
class Evaluation:
    """The results of one run over the images.

    Attributes:
        model: What was evaluated, as named by the caller.
        data: The images, as named by the caller.
        images: How many were used.
        skipped: Which ones could not be read, and why.
        results: One for the dense model, then one a recipe.
    """

    model: str
    data: str
    images: int
    skipped: tuple[Skipped, ...]
    results: tuple[Result, ...]

    def to_dict(self) -> dict[str, Any]:
        """The evaluation as plain JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class _Path:
    """One way to run the model: what makes it take it, and its MACs for so many patches."""

    take: Callable[[], None]
    macs: Callable[[int], int]


_METRICS = ("top1", "top5", "agreement", "kl", "cosine")


@dataclass
class _Features:
    """Sums over the images of one reduction, of a model without class scores."""

    cosine: float = 0.0
    seconds: float = 0.0

    def add(self, features: Tensor, dense: Tensor, labels: Tensor | None) -> None:
        self.cosine += float(cosine_distance(dense, features).sum())

    def means(self, images: int) -> dict[str, float | None]:
        return dict.fromkeys(_METRICS) | {"cosine": self.cosine / images}


@dataclass
class _Tally:
    """Sums over the images of one reduction, of a classifier."""

    top1: int = 0
    top5: int = 0
    agreement: int = 0
    kl: float = 0.0
    labelled: int = 0
    seconds: float = 0.0

    def add(self, logits: Tensor, dense: Tensor, labels: Tensor | None) -> None:
        self.kl += float(kl_divergence(dense, logits).sum())
        self.agreement += int((logits.argmax(dim=1) == dense.argmax(dim=1)).sum())
        if labels is not None:
            labels = _indices(labels, len(logits))
            hits = logits.topk(min(5, logits.shape[1])).indices == labels[:, None]
            self.labelled += len(labels)
            self.top1 += int(hits[:, 0].sum())
            self.top5 += int(hits.sum())

    def means(self, images: int) -> dict[str, float | None]:
        return dict.fromkeys(_METRICS) | {
            "top1": 100 * self.top1 / self.labelled if self.labelled else None,
            "top5": 100 * self.top5 / self.labelled if self.labelled else None,
            "agreement": 100 * self.agreement / images,
            "kl": self.kl / images,
        }


def _indices(labels: Tensor, images: int) -> Tensor:
    """The class index of each image, `[B]`, from labels that may be `[B, 1]`."""
    if labels.shape not in ((images,), (images, 1)):
        raise DataError(
            f"The labels of a batch of {images} images are of shape {list(labels.shape)}. Give the "
            "class index of each image, [B]: of labels that are one-hot or mixed .argmax(dim=1), "
            "and images alone where there are none."
        )
    return labels.reshape(images)


def runs_of(recipes: Mapping[str, Recipe]) -> dict[str, Recipe | None]:
    """What is compared, by name: the dense model, whose recipe is None, and the recipes.

    Raises:
        OptionError: They are not recipes by name, or one is called as the dense model is.
    """
    given: Any = recipes
    if not isinstance(given, Mapping) or not all(isinstance(r, Recipe) for r in given.values()):
        raise OptionError(
            f"recipes is {given!r}; give a dict of recipes by name, for example "
            '{"tome": mergence.recipe.make("tome", macs=0.67)}.'
        )
    if DENSE in recipes:
        raise OptionError(
            f"A recipe is called '{DENSE}', as the dense model is that all are compared with. Give "
            "it another name; a recipe file's name is that of the file."
        )
    return {DENSE: None, **recipes}


def evaluate(
    model: nn.Module,
    batches: Batches,
    recipes: Mapping[str, Recipe],
    *,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    model_name: str = "",
    data_name: str = "",
    progress: Callable[[int], None] = lambda images: None,
) -> Evaluation:
    """Run the dense model and each reduction over the same batches, interleaved.

    The model is left as it was. In between it is changed for all threads, unless another `device`
    or `dtype` is given: then it is a copy that runs.

    Args:
        model: A model of a known family. Where it gives no class scores, its embeddings, maps or
            depths are compared by their cosine.
        batches: Images and labels, as `mergence.data.loader` yields them or any other loader.
        recipes: What to compare, by name.
        device: Where to run. None is where the model is; images are moved there.
        dtype: Type of weights and images. None is the model's; metrics are computed in float32.
        model_name: Goes into the result.
        data_name: Goes into the result.
        progress: Called after each batch with the number of images in it, skipped ones included.

    Raises:
        DataError: No image could be read, or labels are no class indices.
        OptionError: The model answers with tokens, with a single value or with values that are not
            finite, which cannot be compared, or a recipe is called `dense`.
        MergenceError: A recipe does not fit the model.
    """
    runs = runs_of(recipes)
    require_images_alone(model)
    spec = family.spec_of(model)
    check_classes(spec.classes)
    kind = _Tally if spec.classes else _Features
    model, place, type_ = placed(model, device, dtype)
    warn_of_slow_type(place, type_)
    tallies = {name: kind() for name in runs}
    patches: dict[torch.Size, int] = {}
    sizes = Counter[int]()
    skipped: list[Skipped] = []
    back = surgery.bookmark(model)
    back_to_training = stop_training(model)
    try:
        paths: dict[str, _Path] = {}
        for name, recipe in runs.items():
            back()  # each starts from the model as it was, with what that has learned
            paths[name] = _path(model, recipe)
        for batch in as_batches(batches):
            skipped += batch.skipped
            if batch:
                pixels = batch.images.to(device=place, dtype=type_)
                shape = pixels.shape[1:]
                if shape not in patches:
                    patches[shape] = patches_in(model, pixels)
                sizes[patches[shape]] += len(batch)
                _run_batch(model, pixels, batch.labels, paths, tallies)
            progress(len(batch) + len(batch.skipped))
    finally:
        back()
        back_to_training()
    images = sizes.total()
    if images == 0:
        first = "".join(f" First: {bad.name}: {bad.reason}." for bad in skipped[:1])
        raise DataError(f"None of the {len(skipped)} images could be read.{first}")

    def macs(name: str) -> int:
        return sum(number * paths[name].macs(n) for n, number in sizes.items())

    def result(name: str, recipe: Recipe | None) -> Result:
        tally = tallies[name]
        return Result(
            name=name,
            recipe=None if recipe is None else recipe.to_dict(),
            gmacs=macs(name) / images / 1e9,
            macs_ratio=macs(name) / macs(DENSE),
            images_per_s=images / tally.seconds,
            **tally.means(images),
        )

    results = tuple(result(name, recipe) for name, recipe in runs.items())
    return Evaluation(model_name, data_name, images, tuple(skipped), results)


def patches_in(model: nn.Module, images: Tensor) -> int:
    """How many patches a model makes of each image, which may be of another size than its own.

    It runs on the first, dense, and is left as it was.

    Args:
        model: A model of a known family, reduced or not.
        images: `[B, C, H, W]`, prepared as for the model.
    """
    with applied(model, keep_rate=1.0):
        rows, columns = trace(model, images[:1]).grid
    return rows * columns


# Not around all of `evaluate`: what a caller's loader makes and keeps is to be of use in training.
@torch.inference_mode()
def _run_batch(
    model: nn.Module,
    images: Tensor,
    labels: Tensor | None,
    paths: Mapping[str, _Path],
    tallies: Mapping[str, _Tally | _Features],
) -> None:
    labels = None if labels is None else labels.to(images.device)
    if not any(tally.seconds for tally in tallies.values()):
        model(images)  # a warm-up, so that no run pays for being the first
    dense = None
    for name, path in paths.items():
        whose = "The dense model" if name == DENSE else f"The model with the recipe '{name}'"
        path.take()
        synchronise(images.device)
        start = time.perf_counter()
        output = model(images)
        synchronise(images.device)
        tallies[name].seconds += time.perf_counter() - start
        found = compared(output, whose)
        dense = found if dense is None else dense
        tallies[name].add(found, dense, labels)


def _path(model: nn.Module, recipe: Recipe | None) -> _Path:
    """Reduce a model, or make it dense, and remember what it is then: schedules are solved once."""
    if recipe is None:
        spec = family.spec_of(remove(model))
        return _Path(surgery.bookmark(model), lambda patches: count(spec.cost, patches).total)
    program = program_of(apply(model, recipe))
    return _Path(surgery.bookmark(model), lambda patches: program.macs(patches).total)
