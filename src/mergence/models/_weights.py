"""Weights from a file, checked against the model before any of them is used."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from threading import Lock
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from mergence.errors import CheckpointError, few

_HOLDERS = ("state_dict_ema", "model_ema", "state_dict", "model")
"""Where training scripts keep the weights in their files, the better ones first."""
_ALLOWING = Lock()


def load_weights(model: nn.Module, file: Path, spec: str) -> None:
    """Load a .safetensors file, or a PyTorch file of tensors only, into a model.

    Raises:
        CheckpointError: The file is missing, damaged or made for another model.
    """
    state = read_weights(file, spec)
    own = model.state_dict()
    shapes = [
        f"{key} {list(getattr(state[key], 'shape', ()))} instead of {list(own[key].shape)}"
        for key in own.keys() & state.keys()
        if getattr(state[key], "shape", None) != own[key].shape
    ]
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [key for key in state if key not in own],
        "of another shape": sorted(shapes),
        "of another type": not_floating(state, own),
    }
    if found := "; ".join(f"{len(p)} {what} ({few(p)})" for what, p in problems.items() if p):
        raise CheckpointError(
            f"'{file}' does not fit '{spec}': {found}. Name the architecture that the weights were "
            "made for; for another number of classes, put them beside a config.json that says it "
            "and use local-dir:PATH."
        )
    model.load_state_dict(state)


def not_floating(state: Mapping[str, Any], own: Mapping[str, Tensor]) -> list[str]:
    """The weights that loading would make floating-point numbers of, with the type they have."""
    return [
        f"{key} {found.dtype}"
        for key, value in own.items()
        if isinstance(found := state.get(key), Tensor)
        and value.is_floating_point()
        and not found.is_floating_point()
    ]


def read_weights(file: Path, spec: str) -> dict[str, Any]:
    """Read a .safetensors file, or a PyTorch file of tensors only.

    Raises:
        CheckpointError: The file is missing or damaged.
    """
    if not file.is_file():
        raise CheckpointError(
            f"The weights of '{spec}' are missing: there is no file '{file}'. "
            "Put it there, or name another one with --checkpoint F (in Python: checkpoint=F)."
        )
    try:
        return _read(file)
    except Exception as error:  # damaged bytes fail in as many ways as the readers have
        raise CheckpointError(
            f"'{file}' cannot be read as weights ({_problem(file, error)}). It must be an "
            "undamaged .safetensors file, or a PyTorch file that holds tensors only (code in a "
            "file from elsewhere is never run). Download it again, or save the weights alone: "
            "torch.save(model.state_dict(), F)."
        ) from error


def _read(file: Path) -> dict[str, Any]:
    if file.suffix == ".safetensors":
        return load_file(file)
    with _arguments_allowed():
        content: Any = torch.load(file, map_location="cpu", weights_only=True)
    state: dict[str, Any] = next((content[key] for key in _HOLDERS if key in content), content)
    # What DistributedDataParallel and torch.compile put in front.
    return {key.removeprefix("module.").removeprefix("_orig_mod."): v for key, v in state.items()}


@contextmanager
def _arguments_allowed() -> Iterator[None]:
    """Let torch read what timm and DeiT save beside the weights: values, and it runs nothing."""
    # torch's list is that of the process, and it would take off what somebody else has put on.
    with _ALLOWING:
        allowed = torch.serialization.get_safe_globals()
        new: list[Any] = [] if Namespace in allowed else [Namespace]
        with torch.serialization.safe_globals(new):
            yield


def require_weights(info: Mapping[str, Any], place: str, kind: str) -> None:
    """Refuse a model of transformers of which a part was not in its file.

    Args:
        info: What `from_pretrained` says of the loading.
        place: Where the weights came from.
        kind: The model's class.

    Raises:
        CheckpointError: Something is missing.
    """
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"'{place}' holds no weights for {len(missing)} parameters of {kind} ({missing[0]}, "
            "...), which would stay random. Use a checkpoint that was saved from this class."
        )


def _problem(file: Path, error: Exception) -> str:
    """Why a file cannot be read; torch itself would say how to run what is in it."""
    if not isinstance(error, UnpicklingError):
        return f"{type(error).__name__}: {first_line(error)}"
    try:
        with _arguments_allowed():
            held = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except Exception:  # an older format, or damaged bytes
        held = []
    return f"it holds {few(sorted(held))}" if held else "it is damaged, or holds more than tensors"


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    return str(error).partition("\n")[0]
