"""Checkpoints that are whole or not there, whatever happens while one is written.

A checkpoint is a folder: `model.safetensors`, `ema.safetensors` where weights are averaged, and
`trainer.pt`, which holds plain values and tensors and is read with `weights_only=True`. It is
written beside its place under a temporary name, flushed to the disk, and then renamed, which a
file system does in one go. Older ones are removed only after that.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergence.errors import CheckpointError, MergenceError

KEEP = 2
"""Checkpoints that stay; the one before the last is there in case a disk damages the last."""

_FORMAT = 1
_PARTIAL = ".partial"
_NAME = re.compile(r"step-(\d{9})")


@dataclass(frozen=True)
class State:
    """Everything that a run needs to go on.

    Attributes:
        model: Weights by name.
        ema: Averaged weights by name; empty without averaging.
        trainer: Optimiser, position and books: plain values and tensors.
    """

    model: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    trainer: Mapping[str, Any]


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make a folder that is complete once it has its name.

    Args:
        folder: The folder; an older one of the same name is replaced.
        fill: Writes the files into the folder that it is given.

    Raises:
        CheckpointError: It cannot be written; what was there before still is.
        MergenceError: What `fill` raises.
    """
    partial = folder.with_name(folder.name + _PARTIAL)
    old = folder.with_name(folder.name + ".old" + _PARTIAL)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        fill(partial)
        for file in partial.iterdir():
            _flush(file)
        _flush(partial)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            folder.rename(old)
        partial.rename(folder)
        _flush(folder.parent)
    except MergenceError:  # it is not the disk
        raise
    except Exception as error:  # OSError, and what safetensors and torch make of one
        raise CheckpointError(
            f"'{folder}' cannot be written: {error}. Make room, or correct the folder's rights; "
            "earlier checkpoints are untouched, and --resume goes on from the last one."
        ) from error
    finally:  # once it has its name nothing is left here
        shutil.rmtree(partial, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)


def save(folder: Path, update: int, state: State) -> Path:
    """Write a checkpoint below `folder` and remove the oldest ones.

    Raises:
        CheckpointError: It cannot be written; the last one is still there.
    """

    def fill(place: Path) -> None:
        from safetensors.torch import save_file

        for name, tensors in (("model", state.model), ("ema", state.ema)):
            if tensors:
                plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
                save_file(plain, place / f"{name}.safetensors")
        torch.save({"format": _FORMAT, **state.trainer}, place / "trainer.pt")

    place = folder / f"step-{update:09d}"
    if not place.exists():
        write_folder(place, fill)
    for older in _found(folder)[:-KEEP]:
        shutil.rmtree(older, ignore_errors=True)
    return place


def latest(folder: Path) -> Path | None:
    """The last complete checkpoint below `folder`, or None."""
    return next(reversed(_found(folder)), None)


def clean(folder: Path) -> None:
    """Remove what an interrupted run has left of a checkpoint below `folder`."""
    for partial in folder.glob(f"*{_PARTIAL}") if folder.is_dir() else ():
        shutil.rmtree(partial, ignore_errors=True)


def load(place: Path) -> State:
    """Read a checkpoint.

    Raises:
        CheckpointError: It is damaged or of another format.
    """
    from safetensors.torch import load_file

    try:
        trainer = torch.load(place / "trainer.pt", map_location="cpu", weights_only=True)
        model = load_file(place / "model.safetensors")
        ema = place / "ema.safetensors"
        averaged = load_file(ema) if ema.exists() else {}
        found = trainer.get("format")
    except Exception as error:  # damaged bytes fail in as many ways as the readers have
        raise CheckpointError(
            f"The checkpoint '{place}' cannot be read ({type(error).__name__}: {error}). Remove "
            "that folder to go on from the one before it."
        ) from error
    if found != _FORMAT:
        raise CheckpointError(
            f"The checkpoint '{place}' has format {found!r} and this mergence "
            f"reads format {_FORMAT}. Go on with the version that wrote it."
        )
    return State(model, averaged, trainer)


def _found(folder: Path) -> list[Path]:
    """Complete checkpoints, the oldest first."""
    if not folder.is_dir():
        return []
    return sorted(place for place in folder.iterdir() if _NAME.fullmatch(place.name))


def _flush(path: Path) -> None:
    """Wait until a file or a folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
