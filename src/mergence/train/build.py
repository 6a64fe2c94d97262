"""The parts of a run, made from its configuration: model, images, optimiser and schedule."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from mergence import family, saving, surgery
from mergence.data import ImageData, join, open_images
from mergence.errors import DataError, MissingExtraError, OptionError, UnsupportedModelError
from mergence.evaluation import DENSE
from mergence.models import LoadedModel, load_model
from mergence.recipe import Recipe, make
from mergence.train.config import Config
from mergence.train.feed import Feed, Seat
from mergence.train.shards import is_stream
from mergence.train.stream import StreamData, StreamFeed, open_stream
from mergence.train.targets import classes_of

if TYPE_CHECKING:
    from PIL.Image import Image

Data = ImageData | StreamData

# The schedules that are a function of the step alone, so that a run can go on at any of them.
SCHEDULES = ("cosine", "tanh", "poly", "step", "constant")


def check_packages(config: Config) -> None:
    """Check that the libraries that a run needs are there.

    Raises:
        MissingExtraError: One is not installed.
    """
    needed = ["timm", "accelerate"] + (["tensorboard"] if config.tensorboard else [])
    for package in needed:
        if find_spec(package) is None:
            raise MissingExtraError(package, "train", "Training")


def recipes_of(config: Config) -> dict[str, Recipe]:
    """The reductions of a run by name: the first one is what the model is trained for.

    Raises:
        OptionError: The options contradict each other, or a file's name stands for something else.
    """
    if config.recipe:
        unset: tuple[Any, ...] = (Config.method, None, (), {})
        names = ("method", "macs", "keep_rate", "set")
        if told := [name for name in names if getattr(config, name) not in unset]:
            raise OptionError(
                "A recipe already says how much to reduce and how. Leave out "
                f"{' and '.join(told)}, or leave out recipe."
            )
        recipes = {Path(file).stem: make(Path(file)) for file in config.recipe}
        # Validation has a path of that name, and these files stand beside the trained model's own.
        taken = {DENSE, *(set(list(recipes)[1:]) & {Path(saving.RECIPE).stem, "config"})}
        if clash := [name for name in recipes if name in taken]:
            raise OptionError(
                f"A recipe file is called '{clash[0]}', a name that a run, or the folder of its "
                "model, has for something else. Rename the file."
            )
        given = len(config.recipe)
    else:
        if not config.macs and config.keep_rate is None and not {"r", "schedule"} & set(config.set):
            raise OptionError(
                "Nothing says how much to reduce. Give macs, for example 0.67 for two thirds of "
                "the work, or keep_rate, or recipe."
            )
        shares: tuple[float | None, ...] = config.macs or (None,)
        recipes = {
            config.method if share is None else f"{config.method} {share:g}": make(
                config.method, macs=share, keep_rate=config.keep_rate, **config.set
            )
            for share in shares
        }
        given = len(shares)
    if len(recipes) < given:
        raise OptionError(
            f"Two reductions have the same name ({', '.join(recipes)}). Give each once, and rename "
            "recipe files of the same name."
        )
    return recipes


def open_model(config: Config) -> LoadedModel:
    """The dense model as it is trained, with the weights that training starts from.

    Raises:
        MergenceError: It cannot be loaded, or an option does not fit it.
    """
    loaded = load_model(config.model, checkpoint=config.checkpoint)
    if config.scratch:
        # What transformers calls so passes over weights that were loaded.
        timms = hasattr(loaded.model, "pretrained_cfg")
        reset = getattr(loaded.model, "init_weights", None) if timms else None
        if reset is None or config.checkpoint is not None:
            raise OptionError(
                "scratch starts from random weights: it goes with timm's models and without a "
                "checkpoint."
            )
        with torch.no_grad():
            reset()
    if config.drop_path:
        _add_drop_path(loaded.model, config.drop_path)
    return loaded


def load_learned(config: Config, model: nn.Module) -> None:
    """Give a reduced model what an earlier run has learned beside the weights that it starts from.

    Raises:
        CheckpointError: The file is damaged.
    """
    source, _, name = config.model.partition(":")
    if config.checkpoint is not None:
        folder = Path(config.checkpoint).parent
    elif source in ("local-dir", "hf") and not config.scratch:
        folder = Path(name)
    else:
        return
    file = folder.expanduser() / saving.LEARNED_WEIGHTS
    if file.exists() and (misfit := saving.load_learned(model, file)):
        warnings.warn(
            f"'{file}' does not fit this run and is left out: {misfit}. To go on with what an "
            f"earlier run has learned, give the recipe beside it ({saving.RECIPE}).",
            stacklevel=3,
        )


def _add_drop_path(model: nn.Module, rate: float) -> None:
    from timm.layers import DropPath

    blocks = family.spec_of(model).blocks
    if not all(hasattr(block, "drop_path1") for block in blocks):
        raise UnsupportedModelError(
            f"The blocks of this {type(model).__name__} have no drop path. Leave out drop_path."
        )
    for block, probability in zip(blocks, torch.linspace(0, rate, len(blocks)), strict=True):
        for name in ("drop_path1", "drop_path2"):
            setattr(block, name, DropPath(float(probability)))


def open_data(config: Config, loaded: LoadedModel) -> tuple[Data, Data | None]:
    """Training and validation images, with the transforms of the model and of the configuration.

    With `new_head` the model gets a fresh classifier for the classes of the training images here.

    Raises:
        DataError: The images do not fit the model, or have no labels.
    """
    known: dict[str, Any] = {}
    if not config.new_head:
        known = {"class_names": loaded.label_names, "num_classes": classes_of(loaded.model)}
    transform = _training_transform(config, loaded)
    train = _open(config, config.data, config.limit, loaded.mode, transform, known)
    if train.labels is None or train.class_names is None:
        raise DataError(
            f"'{config.data[0]}' has no class folders, so there is nothing to learn from. Put each "
            "image into a folder that is called as its class."
        )
    if config.new_head:
        _replace_head(loaded.model, len(train.class_names))
        known = {"class_names": train.class_names}
    if config.val is None:
        return train, None
    val = _open(config, (config.val,), config.val_limit, loaded.mode, loaded.transform, known)
    if val.labels is None:
        raise DataError(f"'{config.val}' has no class folders, so nothing can be validated on it.")
    return train, val


def _open(
    config: Config,
    paths: Sequence[str],
    limit: int | None,
    mode: str,
    transform: Any,
    known: dict[str, Any],
) -> Data:
    known = known | {"transform": transform, "mode": mode}
    if len({Path(path).expanduser().resolve() for path in paths}) < len(paths):
        raise OptionError(
            f"{', '.join(paths)} names the same images twice. Give each once; epochs says how "
            "often they are seen."
        )
    if not any(map(is_stream, paths)):
        each = limit and -(-limit // len(paths))
        whole = join({p: open_images(p, limit=each, seed=config.seed, **known) for p in paths})
        return replace(
            whole, names=whole.names[:limit], labels=whole.labels and whole.labels[:limit]
        )
    if limit is not None or len(paths) > 1:
        raise OptionError(
            f"'{paths[0]}' is a stream, which is read alone and to its end. Leave out limits and "
            "other data."
        )
    return open_stream(paths[0], size=config.epoch_images, **known)


def feed_of(
    data: Data, config: Config, seat: Seat, anyone: Callable[[bool], bool], *, training: bool
) -> Feed | StreamFeed:
    """A collection in steps, for training or in order and whole batches for validation.

    Raises:
        OptionError: Nobody knows how many images a stream has, or its steps would be smaller than
            asked for.
    """
    if training and len(data) == 0:
        raise OptionError(
            f"'{config.data[0]}' does not say how many images it has, and the schedules of the run "
            "must know. Say it with epoch_images."
        )
    pieces = config.accumulate if training else 1
    # Without a gradient a process manages its whole part at once, and as much as a piece was.
    batch_size = config.batch_size if training else -(-config.batch_size // config.accumulate)
    if isinstance(data, ImageData):
        return Feed(data, batch_size, pieces, training, config.seed, seat, config.workers)
    parts = seat.world * config.accumulate
    if training and (over := batch_size % parts):
        near = " or ".join(str(n) for n in (batch_size - over, batch_size - over + parts) if n)
        raise OptionError(
            f"A stream is read in equal parts, and batch_size {batch_size} over {parts} (processes "
            f"times accumulate) leaves {over} over. Give batch_size {near}, another accumulate, or "
            "another number of processes."
        )
    return StreamFeed(
        *(data, batch_size, anyone, pieces, training, config.seed, seat, config.workers),
        buffer=config.shuffle_buffer,
    )


def _replace_head(model: nn.Module, classes: int) -> None:
    reset: Any = getattr(model, "reset_classifier", None)
    if reset is None:
        raise UnsupportedModelError(
            f"A {type(model).__name__} cannot be given a new classifier; timm's models can."
        )
    reset(classes)


def _training_transform(config: Config, loaded: LoadedModel) -> Callable[[Image], torch.Tensor]:
    from timm.data import create_transform, resolve_data_config

    found = resolve_data_config({}, model=loaded.model)
    try:
        transform: Callable[[Image], torch.Tensor] = create_transform(
            input_size=loaded.input_size,
            is_training=True,
            scale=(config.crop_scale, 1.0),
            ratio=(3 / 4, 4 / 3) if config.crop_scale < 1 else (1.0, 1.0),
            hflip=config.hflip,
            color_jitter=config.color_jitter or None,
            auto_augment=config.auto_augment,
            interpolation=found["interpolation"],
            mean=loaded.mean,
            std=loaded.std,
            re_prob=config.erase,
            re_mode="pixel",
        )
    except (AssertionError, ValueError) as error:  # how timm says that it does not know a policy
        raise OptionError(
            f"timm does not read auto_augment '{config.auto_augment}': {error}. Write a policy as "
            "rand-m9-mstd0.5-inc1, augmix-m5-w4-d2, original, v0 or 3a."
        ) from error
    return transform


def optimizer_of(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Timm's optimiser, with weight decay where it belongs and rates that fall with depth.

    What a method has put in to be learned starts at zero effect in a model that is trained already:
    it gets a rate of its own, `learned_lr`, and no weight decay, which would hold it there.

    Raises:
        OptionError: There is no such optimiser, not on this machine, it cannot be saved or needs
            more than a gradient, the model does not tell its layers, or `learned_lr` is a multiple
            of nothing.
    """
    from timm.optim import create_optimizer_v2, get_optimizer_info, list_optimizers

    _known("optimizer", config.optimizer, list_optimizers())
    if get_optimizer_info(config.optimizer).second_order:
        raise OptionError(
            f"The optimiser '{config.optimizer}' needs second derivatives, which are not computed "
            "here. Take another, for example adamw."
        )
    if config.layer_decay is not None and not hasattr(model, "group_matcher"):
        raise OptionError(
            f"layer_decay needs to know the layers of a {type(model).__name__}, which only timm's "
            "models tell. Leave it out."
        )
    if config.learned_lr is not None and not config.lr:
        raise OptionError(
            "learned_lr follows lr as a multiple of it, and lr is 0. Give lr a rate that is too "
            "small to matter: lr 1e-12 with min_lr 0."
        )
    try:
        optimizer: torch.optim.Optimizer = create_optimizer_v2(
            model,
            config.optimizer,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
        )
    except (AssertionError, ImportError) as error:  # of APEX and bitsandbytes, which need a GPU
        raise OptionError(
            f"The optimiser '{config.optimizer}' cannot be had here: {error}. Take another, for "
            "example adamw."
        ) from error
    if any(isinstance(value, torch.dtype) for value in optimizer.defaults.values()):
        raise OptionError(
            f"The optimiser '{config.optimizer}' has a type among its settings, which torch cannot "
            "save with them: the run could not be resumed. Take another, for example adafactor."
        )
    inserted = [m for m in map(surgery.learned_module, model.modules()) if m is not None]
    learned = {parameter for module in inserted for parameter in module.parameters()}
    for group in list(optimizer.param_groups) if learned else ():
        group["params"] = [p for p in group["params"] if p not in learned]
    if learned:
        scale = 1.0 if config.learned_lr is None else config.learned_lr / config.lr
        parameters = [p for p in model.parameters() if p in learned]  # in a fixed order
        optimizer.add_param_group({"params": parameters, "weight_decay": 0.0, "lr_scale": scale})
    return optimizer


def schedule_of(optimizer: torch.optim.Optimizer, config: Config, steps: int) -> Any:
    """Timm's schedule of the learning rate, a function of the step.

    Raises:
        OptionError: There is no such schedule, or its rates contradict each other.
    """
    from timm.scheduler import create_scheduler_v2

    _known("schedule", config.schedule, SCHEDULES)
    if config.min_lr > config.lr:
        raise OptionError(f"min_lr {config.min_lr:g} is above lr {config.lr:g}. Lower it.")
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=config.schedule,
        num_epochs=config.epochs,
        warmup_epochs=config.warmup_epochs,
        warmup_lr=min(config.min_lr, config.lr),
        min_lr=config.min_lr,
        decay_epochs=config.epochs / 3,
        step_on_epochs=False,
        updates_per_epoch=steps,
    )
    return scheduler


def _known(option: str, name: str, names: Any) -> None:
    if name not in names:
        close = difflib.get_close_matches(name, names, n=1)
        hint = f"Did you mean '{close[0]}'?" if close else f"Known: {', '.join(sorted(names))}."
        raise OptionError(f"There is no {option} '{name}'. {hint}")
