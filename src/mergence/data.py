"""Image collections, labelled or not: a folder, a zip archive or the embedded demo, in batches.

Damaged images do not stop a run: they are named, skipped and counted. What is wrong with the
collection as a whole stops it before any work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from mergence.classes import balanced, class_folders, match_classes
from mergence.errors import DataError, MissingExtraError, OptionError, few
from mergence.sources import (
    FASHION_MNIST_CLASSES,
    Demo,
    Folder,
    Joined,
    Source,
    Synthetic,
    open_source,
)

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
NARROWEST = 1000
"""How many times as long as wide an image may be.

Where the shorter side is brought to the model's, the longer one grows with it: a file of 200 bytes,
65,000 pixels long and one wide, to 3 billion pixels. At 1,000 times, a model of 384 pixels still
gets fewer than Pillow itself would decode.
"""


@dataclass(frozen=True)
class Sample:
    """One image, transformed, with its class index (None: unlabelled)."""

    image: Tensor
    label: int | None
    name: str


@dataclass(frozen=True)
class Skipped:
    """An image that cannot be read, and why."""

    name: str
    reason: str


class Lost(Skipped):
    """An image whose file cannot be opened: it may be a good one, and there again tomorrow.

    What only measures names it and goes on; training stops (`train.validation.count_read`).
    """


def skip(name: str, error: Exception, what: str = "") -> Skipped:
    """What there is to say about an image, or a part of a collection, that cannot be read.

    Args:
        name: What it is called.
        error: Why. Only the operating system numbers its errors; no decoder of images does.
        what: Stands before the error.
    """
    numbered = isinstance(error, OSError) and error.errno is not None
    gone = isinstance(error, FileNotFoundError | PermissionError)  # datasets 4.0 numbers neither
    kind = Lost if numbered or gone else Skipped
    return kind(name, f"{what}{type(error).__name__}: {error}")


@dataclass(frozen=True)
class Batch:
    """The readable images of one step, and the ones that had to be skipped.

    `len(batch)` counts the readable ones. Where every image was bad it is 0, so the batch is false
    in a condition, and `images` is an empty tensor: count `skipped`, then go on to the next.
    """

    images: Tensor
    labels: Tensor | None
    names: list[str]
    skipped: list[Skipped]

    def __len__(self) -> int:
        return len(self.names)

    def pin_memory(self) -> Batch:
        """The same in memory that a GPU copies from by itself; a DataLoader asks for it."""
        labels = None if self.labels is None else self.labels.pin_memory()
        return replace(self, images=self.images.pin_memory(), labels=labels)


Batches = Iterable[Batch | Tensor | Sequence[Any] | Mapping[str, Any]]
"""Images as `loader` yields them, or as any other loader does: alone, or with labels.

A mapping is what transformers and datasets make: images are its `pixel_values`, and labels its
`labels` or its `label`.
"""


def as_batches(batches: Batches) -> Iterator[Batch]:
    """The same as `Batch`es.

    Raises:
        DataError: One holds no images.
    """
    for found in batches:
        if isinstance(found, Batch):
            yield found
            continue
        images: Any
        if isinstance(found, Tensor):
            images, labels = found, None
        elif isinstance(found, Mapping):
            images, labels = found.get("pixel_values"), found.get("labels", found.get("label"))
        else:
            images, labels = (*found, None, None)[:2]
        if not isinstance(images, Tensor) or images.ndim < 4:
            raise DataError(
                f"A batch is a {type(found).__name__} without images. Give tensors [B, C, H, W], "
                "pairs of images and labels, mappings with pixel_values and labels, or what "
                "mergence.data.loader yields."
            )
        try:
            labels = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError):  # names, boxes, or nothing
            labels = None
        yield Batch(images, labels, [""] * len(images), [])


@dataclass(frozen=True)
class ImageData(Dataset[Sample | Skipped]):
    """Images with their class indices; made by `open_images`, batched by `loader`.

    An item is a `Sample`, or a `Skipped` where the image cannot be read.

    Attributes:
        names: Path of each image inside the collection.
        labels: Class index of each image; None where the collection has no class folders.
        class_names: What the class indices stand for, where known.
    """

    names: list[str]
    labels: list[int] | None
    class_names: tuple[str, ...] | None
    transform: Callable[[Image], Tensor]
    mode: str
    source: Source

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Sample | Skipped:
        name = self.names[index]
        image = open_image(name, lambda: self.source.open(name), self.mode)
        if isinstance(image, Skipped):
            return image
        label = None if self.labels is None else self.labels[index]
        return Sample(self.transform(image), label, name)


def open_image(name: str, opener: Callable[[], Image], mode: str) -> Image | Skipped:
    """Decode an image, or say why that cannot be done."""
    try:
        image = opener()
        if max(image.size) > NARROWEST * min(image.size):
            raise ValueError(
                f"it has {image.width} x {image.height} pixels; an image may be {NARROWEST:,} "
                "times as long as it is wide"
            )
        # convert() decodes all of the file, so that a truncated one is noticed here.
        return _in_8_bits(image).convert(mode)
    except Exception as error:  # damaged bytes fail in as many ways as there are decoders
        return skip(name, error)


def _in_8_bits(image: Image) -> Image:
    """Scale 16 bits down, of which convert() would clip all but the darkest greys to white.

    Raises:
        ValueError: The values are of an unknown scale.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    wide = image if image.mode == "F" else image.convert("I")
    span: Any = wide.getextrema()
    low, high = span
    if image.mode == "F" or not 0 <= low <= high <= 65535:
        raise ValueError(
            f"its values span {low:g} to {high:g}, and which of them is white is unknown; save it "
            "with 8 or 16 bits"
        )
    return wide.point(lambda value: value / 256).convert("L")


def open_images(
    path: str | Path,
    *,
    transform: Callable[[Image], Tensor],
    mode: str = "RGB",
    class_names: Sequence[str] | None = None,
    num_classes: int | None = None,
    limit: int | None = None,
    seed: int = 0,
) -> ImageData:
    """Open a collection of images and check it against the model's classes.

    Class folders are matched to `class_names` by name where every folder is one of them, and by
    sorted order where only the number agrees. Folders around the class folders are passed over.

    Args:
        path: An image folder (`root/class/image.jpg`), a `.zip` of the same layout, either without
            class folders (unlabelled), the word "demo" for the embedded Fashion-MNIST images, or
            "synthetic:N" for N random images of the model's classes.
        transform: Turns a PIL image into the tensor the model takes.
        mode: PIL mode to convert to: "L" for a model with one input channel.
        class_names: The model's label names, in the order of its outputs.
        num_classes: The model's number of classes, where it has no names.
        limit: Use this many images at most, spread evenly over the classes.
        seed: Which images `limit` draws.

    Raises:
        DataError: The path, the archive or its classes cannot be used.
        OptionError: `limit` is below 1.
        MissingExtraError: Pillow is not installed.
    """
    if find_spec("PIL") is None:
        raise MissingExtraError("pillow", "timm", "Reading images")
    if limit is not None and limit < 1:
        raise OptionError(f"limit is {limit}. Ask for 1 image or more, or for none to take all.")
    source = open_source(path)
    names = sorted(source.names())
    folders: Sequence[str]
    labels: list[int] | None
    if isinstance(source, Demo):
        folders, labels = FASHION_MNIST_CLASSES, source.labels
    elif isinstance(source, Synthetic):
        folders = class_names or tuple(map(str, range(num_classes or 10)))
        labels = [index % len(folders) for index in range(len(names))]
    else:
        names = [name for name in names if _is_image(name)]
        if not names:
            raise DataError(
                f"'{path}' holds no image. Looked in all of its folders for files that end in "
                f"{', '.join(IMAGE_SUFFIXES)}. Pass a folder or archive that holds some."
            )
        folders, labels = class_folders(names, path, class_names or ())
    if labels is not None:
        class_names, order = match_classes(folders, class_names, num_classes, path)
        labels = [order[label] for label in labels]
    if limit is not None:
        kept = balanced(labels or [0] * len(names), limit, seed)
        names = [names[i] for i in kept]
        labels = labels and [labels[i] for i in kept]
    return ImageData(
        names, labels, None if class_names is None else tuple(class_names), transform, mode, source
    )


def join(parts: Mapping[str, ImageData]) -> ImageData:
    """One collection of several, by the name that each is called by in the names of its images.

    Raises:
        DataError: They do not have the same classes.
    """
    (first, one), *others = parts.items()
    for name, other in others:
        if other.class_names != one.class_names or (other.labels is None) != (one.labels is None):
            raise DataError(
                f"'{first}' and '{name}' do not have the same classes: "
                f"{few(one.class_names or ())} and {few(other.class_names or ())}. Give parts "
                "of one collection."
            )
    if not others:
        return one
    labels = None if one.labels is None else [x for p in parts.values() for x in p.labels or ()]
    return replace(
        one,
        names=[f"{name}/{file}" for name, part in parts.items() for file in part.names],
        labels=labels,
        source=Joined({name: part.source for name, part in parts.items()}),
    )


def image_files(
    paths: Sequence[str | Path], *, transform: Callable[[Image], Tensor], mode: str = "RGB"
) -> ImageData:
    """Take single image files as an unlabelled collection.

    Raises:
        DataError: A file does not exist.
    """
    for path in paths:
        if not Path(path).is_file():
            raise DataError(f"There is no image file '{path}' (looked in {Path.cwd()}).")
    names = [str(path) for path in paths]
    return ImageData(names, None, None, transform, mode, Folder(Path()))


def loader(data: ImageData, *, batch_size: int, workers: int = 0) -> Iterable[Batch]:
    """Read `data` in order, in batches of at most `batch_size` images."""
    return DataLoader(data, batch_size=batch_size, num_workers=workers, collate_fn=collate)


def collate(items: Sequence[Sample | Skipped]) -> Batch:
    """Build a `Batch` from items of an `ImageData`, for a DataLoader of one's own."""
    good = [item for item in items if isinstance(item, Sample)]
    labels = [item.label for item in good if item.label is not None]
    return Batch(
        images=torch.stack([item.image for item in good]) if good else torch.empty(0),
        labels=torch.tensor(labels) if labels else None,
        names=[item.name for item in good],
        skipped=[item for item in items if isinstance(item, Skipped)],
    )


def _is_image(name: str) -> bool:
    parts = name.split("/")
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    return not hidden and name.lower().endswith(IMAGE_SUFFIXES)
