"""Models by name: what a `MODEL` argument means, and how its weights are read and checked."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from mergence.errors import MissingExtraError, UnknownNameError
from mergence.models import _open_clip, _timm, _torchvision, _transformers
from mergence.models._loaded import Built, LoadedModel, source_of
from mergence.models._timm import DEMO_MODEL
from mergence.models._weights import load_weights

__all__ = ["DEMO_MODEL", "LoadedModel", "build_model", "load_model"]


def load_model(spec: str, *, checkpoint: str | Path | None = None) -> LoadedModel:
    """Load the model that `spec` names.

    * `timm:NAME` with its pretrained weights, downloaded at first use; they are not asked for
      where `checkpoint` is given.
    * `timm-random:NAME` with random weights, for speed measurements.
    * `local-dir:PATH`, a folder in timm's hub layout: config.json and model.safetensors.
    * `hf:NAME_OR_PATH` of transformers: a folder that save_pretrained wrote, or a name in the hub.
    * `torchvision:NAME` or `torchvision:NAME.WEIGHTS`.
    * `open_clip:NAME/WEIGHTS`.
    * `demo`, the embedded Fashion-MNIST model.

    Args:
        spec: Where the model comes from and what it is called.
        checkpoint: A file with weights for it: .safetensors, or PyTorch's with tensors and plain
            values only.

    Raises:
        UnknownNameError: No such source, or no such model in it.
        CheckpointError: The weights are missing, damaged or do not fit the model.
        UnsupportedModelError: The model takes images of neither one nor three channels.
        MissingExtraError: The library of the source is not installed.
    """
    built = build_model(spec, checkpoint)
    return built.describe(built.model, spec)


def build_model(spec: str, checkpoint: str | Path | None = None) -> Built:
    """Build the model that `spec` names, whatever it takes for images; see `load_model`."""
    source, _, name = spec.partition(":")
    if source not in _SOURCES or (source != "demo" and not name):
        raise _unknown_source(spec)
    source_ = _SOURCES[source]
    if find_spec(source_.package) is None:
        raise MissingExtraError(source_.package, source_.extra, f"Loading '{spec}'")
    built = source_.build(name, None if checkpoint is None else Path(checkpoint))
    if built.weights is not None:
        load_weights(built.model, built.weights.expanduser(), spec)
    built.model.float().eval()
    return built


@dataclass(frozen=True)
class _Source:
    """A source of models: what it needs, and what builds the model that a name stands for."""

    package: str
    extra: str
    build: Callable[[str, Path | None], Built]
    form: str


_SOURCES: dict[str, _Source] = {
    "timm": _Source("timm", "timm", _timm.named, "timm:NAME"),
    "timm-random": _Source("timm", "timm", _timm.random, "timm-random:NAME"),
    "local-dir": _Source("timm", "timm", _timm.local_dir, "local-dir:PATH"),
    "hf": _Source("transformers", "transformers", _transformers.named, "hf:NAME_OR_PATH"),
    "torchvision": _Source("torchvision", "torchvision", _torchvision.named, "torchvision:NAME"),
    "open_clip": _Source("open_clip", "open-clip", _open_clip.named, "open_clip:NAME/WEIGHTS"),
    "demo": _Source("timm", "timm", _timm.demo, "demo"),
}


def _unknown_source(spec: str) -> UnknownNameError:
    source, colon, name = spec.partition(":")
    known = ", ".join(s.form for s in _SOURCES.values())
    close = difflib.get_close_matches(source, _SOURCES, n=1)
    if (folder := Path(spec).expanduser()).is_dir():
        fix = f"For this folder use '{source_of(folder) or 'local-dir'}:{spec}'."
    elif close:
        fix = f"Did you mean '{close[0]}{colon}{name}'?"
        if close[0] == source:
            fix = f"Name the model after the colon: '{_SOURCES[source].form}'."
    elif not colon:
        fix = f"For a timm model use 'timm:{spec}'."
    else:
        fix = f"'{source}' is no model source."
    return UnknownNameError(
        f"'{spec}' does not say where the model comes from. {fix} Has: {known}."
    )
