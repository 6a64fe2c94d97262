"""Which class an image is of: by its folder, matched to the classes that the model knows."""

from __future__ import annotations

import random
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mergence.errors import DataError, few


def class_folders(
    names: list[str], path: str | Path, known: Sequence[str]
) -> tuple[list[str], list[int] | None]:
    """Class folders in sorted order and the folder index of each image.

    Args:
        names: Paths of the images inside their collection, one or more.
        path: What the collection is called in an error.
        known: Names of the model's classes.

    Returns:
        No folders and None where the collection has no class folders.

    Raises:
        DataError: Only some of the images are in class folders.
    """
    parts = [name.split("/") for name in names]
    # A folder that holds everything is packaging ("val/"), unless the model knows it as a class.
    while all(len(p) > 1 and p[0] == parts[0][0] for p in parts) and parts[0][0] not in known:
        parts = [p[1:] for p in parts]
    loose = sum(len(p) == 1 for p in parts)
    if loose == len(parts):
        return [], None
    folders = sorted({p[0] for p in parts if len(p) > 1})
    if loose:
        raise DataError(
            f"'{path}' mixes {loose} images without a class with {len(folders)} class folders "
            f"({few(folders)}). Move the loose images away, or all images into one folder."
        )
    index = {folder: i for i, folder in enumerate(folders)}
    return folders, [index[p[0]] for p in parts]


def match_classes(
    folders: Sequence[str],
    class_names: Sequence[str] | None,
    num_classes: int | None,
    path: str | Path,
) -> tuple[Sequence[str], list[int] | range]:
    """The names of the class indices, and the class index of each folder.

    Args:
        folders: Class folders, or whatever a collection calls its classes.
        class_names: The model's classes in output order, where they have names.
        num_classes: Their number, where they have none.
        path: What the collection is called in an error.

    Raises:
        DataError: The classes do not fit.
    """
    if class_names is not None:
        if tuple(folders) == tuple(class_names):
            return class_names, range(len(folders))
        # Two ImageNet classes are both called "crane": such a name says nothing.
        counts = Counter(class_names)
        index = {name: i for i, name in enumerate(class_names) if counts[name] == 1}
        if index.keys() >= set(folders):
            return class_names, [index[folder] for folder in folders]
        num_classes = len(class_names)
    if num_classes is not None and num_classes != len(folders):
        wanted = f": {few(class_names)}" if class_names else ""
        raise DataError(
            f"'{path}' has {len(folders)} class folders ({few(folders)}), but the model has "
            f"{num_classes} classes{wanted}. Use the data that the model was trained for, or name "
            "the folders as the model names its classes."
        )
    if class_names is not None:
        warnings.warn(
            f"The class folders of '{path}' ({few(folders)}) are not called as the model's "
            f"classes ({few(class_names)}). They are taken in sorted order, folder by class; if "
            "that is not the order of the model's outputs, top-1 means nothing.",
            stacklevel=3,
        )
    elif num_classes is not None and list(folders) == sorted(folders):
        numbered = sorted(folders, key=_by_number)
        if numbered != list(folders):
            warnings.warn(
                f"The class folders of '{path}' are taken in alphabetical order ({few(folders)}), "
                "as torchvision does. timm counts by the numbers in their names "
                f"({few(numbered)}): for a model that was trained so, top-1 means nothing. Name "
                "its classes (`label_names` in config.json), or rename the folders with leading "
                "zeros.",
                stacklevel=3,
            )
    return folders, range(len(folders))


def _by_number(name: str) -> list[int | str]:
    """What timm sorts folders by: `class_2` comes before `class_10`."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name.lower())]


def balanced(labels: Sequence[int], limit: int, seed: int) -> list[int]:
    """Positions of `limit` images, in order: first one of every class, then a second one, ..."""
    shuffled = list(range(len(labels)))
    random.Random(seed).shuffle(shuffled)
    seen: Counter[int] = Counter()
    turns = []
    for position in shuffled:
        turns.append((seen[labels[position]], position))
        seen[labels[position]] += 1
    turns.sort(key=lambda turn: turn[0])  # stable: ties stay shuffled
    return sorted(position for _, position in turns[:limit])
