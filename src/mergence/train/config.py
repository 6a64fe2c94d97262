"""What a training run is told: one flat dataclass, the same names in Python, YAML and as flags."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from mergence.errors import MissingExtraError, OptionError

_ANY = float("inf")


def _option(
    help_: str, default: Any = dataclasses.MISSING, low: float | None = None, high: float = _ANY
) -> Any:
    return field(default=default, metadata={"help": help_, "low": low, "high": high})


@dataclass(frozen=True, kw_only=True)
class Config:
    """One training run. Each field's help is its documentation; `mergence train --help` shows it.

    Raises:
        OptionError: A value is of the wrong type or out of range.
    """

    # What is trained, on what, and where it is written to.
    model: str = _option(
        "timm:NAME, local-dir:PATH (timm's hub layout), hf:NAME, demo or another; see eval --help."
    )
    data: tuple[str, ...] = _option(
        "Training images: a folder with a folder for each class, a .zip of one, demo, synthetic:N, "
        "wds:SHARDS (WebDataset) or hf:NAME@SPLIT (Hugging Face). Folders and archives may be "
        "several."
    )
    val: str | None = _option("Validation images, evaluated densely and reduced each epoch.", None)
    out: str = _option("Folder for checkpoints, logs, the configuration and the trained model.")
    checkpoint: str | None = _option("Load these weights into the model first.", None)
    scratch: bool = _option("Start from random weights.", False)
    new_head: bool = _option("Start with a new classifier for the classes of the data.", False)
    limit: int | None = _option("Train on so many images, spread evenly over the classes.", None, 1)
    val_limit: int | None = _option("Validate on so many images.", None, 1)

    epoch_images: int | None = _option("Images of a stream that does not say how many.", None, 1)
    shuffle_buffer: int = _option("Images of a stream among which each worker draws.", 1000, 1)

    # Reduction, as everywhere else; several budgets or recipes take turns at random.
    method: str = _option("A method's name.", "mergence")
    macs: tuple[float, ...] = _option(
        "Share of the dense MACs to keep, for example 0.67. Several train one model for all.", ()
    )
    keep_rate: float | None = _option("Share of the tokens to keep at blocks 4, 7, 10 of 12.", None)
    set: dict[str, Any] = field(
        default_factory=dict, metadata={"help": "Options of the method, e.g. alpha=0.5."}
    )
    recipe: tuple[str, ...] = _option("Recipe files. Several train one model for all.", ())

    # What the literature found to matter; sources in `mergence.train.levels` and `.objective`.
    reduction_warmup: float = _option("Epochs from dense to the full reduction (EViT).", 0.0, 0)
    reduce_epochs: str = _option("Epochs with reduction: all, none, or as in 1-8,10,12-.", "all")
    teacher: str = _option(
        "Whom to learn from: initial, the dense model as before training (DynamicViT), self, its "
        "own weights (MCTF), or another model, named as model is (DeiT).",
        "initial",
    )
    label_loss: float = _option(
        "Weight of the labels' loss; 0 learns from the teacher alone (Hinton et al.).", 1.0, 0
    )
    distill: float = _option("Weight of the divergence from the teacher's answer.", 0.0, 0)
    temperature: float = _option("Temperature of that divergence.", 1.0, 0.01)
    consistency: float = _option("Weight of the distance from the teacher's class token.", 0.0, 0)
    dense_loss: float = _option("Weight of the labels' loss on the model's own dense path.", 0.0, 0)

    # Images on their way to the model: timm's transforms.
    crop_scale: float = _option("Random crops hold at least this share of the image.", 0.3, 0.01, 1)
    hflip: float = _option("Probability of a horizontal flip.", 0.5, 0, 1)
    color_jitter: float = _option("Strength of colour jitter without auto_augment.", 0.0, 0)
    auto_augment: str | None = _option("timm's policy, for example rand-m9-mstd0.5-inc1.", None)
    erase: float = _option("Probability of random erasing.", 0.0, 0, 1)
    mixup: float = _option("Mixup alpha.", 0.0, 0)
    cutmix: float = _option("CutMix alpha.", 0.0, 0)
    smoothing: float = _option("Label smoothing.", 0.0, 0, 1)
    drop_path: float = _option("Stochastic depth: probability in the last block.", 0.0, 0, 1)

    # Optimisation: timm's optimisers and schedules.
    epochs: int = _option("Passes over the training images.", 10, 1)
    batch_size: int = _option("Images of one step, over all processes and pieces.", 64, 1)
    accumulate: int = _option("Process each step in so many pieces, one after the other.", 1, 1)
    optimizer: str = _option("timm's name of an optimiser.", "adamw")
    lr: float = _option("Learning rate at its highest.", 5e-5, 0)
    weight_decay: float = _option("Weight decay, not on biases and norms.", 0.05, 0)
    learned_lr: float | None = _option(
        "Rate of what a method learns, such as mstm's fusion; without it, lr.", None, 0
    )
    layer_decay: float | None = _option(
        "Factor on the rate from each layer to the next.", None, 0.01, 1
    )
    clip_grad: float | None = _option("Largest norm of the gradient.", None, 0)
    schedule: str = _option("timm's name of a schedule of the learning rate.", "cosine")
    warmup_epochs: float = _option("Epochs until the highest learning rate.", 0.0, 0)
    min_lr: float = _option("Learning rate at the end.", 1e-6, 0)
    ema: float = _option(
        "Decay of the averaged weights, which are then evaluated; 0: none.", 0.0, 0, 1
    )

    # The machine and the books.
    precision: Literal["no", "bf16", "fp16"] = _option(
        "Mixed precision: no, bf16 or, on a GPU, fp16.", "no"
    )
    device: Literal["auto", "cpu"] = _option("auto takes the best, cpu never another.", "auto")
    workers: int = _option("Processes that read images, for each training process.", 0, 0)
    seed: int = _option("Every draw follows from this and its place in the run.", 0)
    save_every: int = _option("Steps between checkpoints; each epoch ends with one too.", 500, 1)
    log_every: int = _option("Steps between rows of steps.csv.", 10, 1)
    tensorboard: bool = _option("Log for TensorBoard as well.", False)

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(type(self)).items():
            object.__setattr__(self, name, _checked(name, getattr(self, name), kind))
        if not self.data:
            raise OptionError("data is empty; give the images to train on.")
        for f in dataclasses.fields(self):
            value, low, high = getattr(self, f.name), f.metadata.get("low"), f.metadata.get("high")
            if None not in (value, low, high) and not low <= value <= high:
                bounds = f"at least {low:g}" if high == _ANY else f"from {low:g} to {high:g}"
                raise OptionError(f"{f.name} is {value}; give a number {bounds}.")

    @classmethod
    def names(cls) -> list[str]:
        """The names of all fields."""
        return [f.name for f in dataclasses.fields(cls)]

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], source: str = "The configuration") -> Config:
        """Make a configuration from plain values.

        Args:
            data: Values by field name.
            source: What the values are called in an error.

        Raises:
            OptionError: A key is unknown or missing, or a value is wrong.
        """
        known = cls.names()
        for key in data:
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(known)}."
                raise OptionError(f"{source} has an unknown key '{key}'. {hint}")
        needed = [f.name for f in dataclasses.fields(cls) if _required(f)]
        if missing := [name for name in needed if name not in data]:
            raise OptionError(
                f"{source} lacks {', '.join(missing)}. A run needs at least "
                f"{', '.join(needed)}, as flags or in the YAML file."
            )
        return cls(**data)

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain values."""
        values = dataclasses.asdict(self)
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}

    def to_yaml(self) -> str:
        """The configuration as a YAML file's text, in the order of the fields."""
        return str(_yaml().safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True))


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the values of a YAML file; `Config.from_dict` checks them.

    Raises:
        OptionError: The file is missing or is no YAML mapping.
        MissingExtraError: PyYAML is not installed.
    """
    yaml = _yaml()
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except Exception as error:  # no file, no YAML, or no such number, date or depth
        raise OptionError(f"The configuration '{path}' cannot be read: {error}.") from error
    if not isinstance(data, dict):
        raise OptionError(
            f"The configuration '{path}' holds a {type(data).__name__}; write lines 'key: value'."
        )
    return data


def _yaml() -> Any:
    if find_spec("yaml") is None:
        raise MissingExtraError("pyyaml", "train", "A training configuration")
    import yaml

    return yaml


def _required(f: dataclasses.Field[Any]) -> bool:
    return f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING


def _checked(name: str, value: Any, kind: Any) -> Any:
    """The value as its field's type; YAML reads 5e-5 as a string and lists as lists."""
    for option in get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,):
        match option, value:
            case (t, None) if t is type(None):
                return None
            case (t, bool()) if t is bool:
                return value
            case (t, False) if "no" in get_args(t):  # as YAML 1.1 reads it
                return "no"
            case (t, int() | str()) if t is int and not isinstance(value, bool):
                with suppress(ValueError):
                    return int(value)
            case (t, int() | float() | str()) if t is float and not isinstance(value, bool):
                with suppress(ValueError):
                    return float(value)
            case (t, str()) if t is str or (get_origin(t) is Literal and value in get_args(t)):
                return value
            case (t, dict()) if get_origin(t) is dict:
                return dict(value)
            case (t, list() | tuple()) if get_origin(t) is tuple:
                return tuple(_checked(name, item, get_args(t)[0]) for item in value)
            case (t, _) if get_origin(t) is tuple and not isinstance(value, dict | type(None)):
                return (_checked(name, value, get_args(t)[0]),)
    wanted = str(getattr(kind, "__name__", kind)).replace("typing.", "")
    if get_origin(kind) is Literal:
        wanted = "one of " + ", ".join(get_args(kind))
    raise OptionError(f"{name} is {value!r}, a {type(value).__name__}; give {wanted}.")
