"""A training run: its parts, its position, and how it is saved and taken up again."""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mergence.devices import best_device
from mergence.errors import CheckpointError, MergenceError, OptionError
from mergence.evaluation import DENSE
from mergence.recipe import Recipe
from mergence.train import build, checkpoint
from mergence.train.checkpoint import State
from mergence.train.config import Config
from mergence.train.feed import Seat
from mergence.train.levels import Choice, Reducer, Timetable
from mergence.train.logs import Row
from mergence.train.objective import Objective
from mergence.train.seeding import seed_all
from mergence.train.targets import Targets
from mergence.train.teacher import teacher_of
from mergence.train.validation import Examiner, Score, validate


@dataclass
class Position:
    """How far a run has come, and what it has added up in the epoch under way.

    Attributes:
        epoch: Epochs done.
        step: Steps done in this epoch.
        update: Steps done altogether.
        loss: Sum of the losses of this epoch's images.
        images: Images of this epoch so far, unreadable ones left out.
    """

    epoch: int = 0
    step: int = 0
    update: int = 0
    loss: float = 0.0
    images: int = 0


class Run:
    """Everything that a training run consists of, built and checked before the first step.

    Args:
        config: What to do.

    Raises:
        MergenceError: Something does not fit; nothing has been written then.
    """

    def __init__(self, config: Config) -> None:
        build.check_packages(config)
        from accelerate import Accelerator, DistributedDataParallelKwargs

        self.config = config
        place = "cpu" if config.device == "cpu" else best_device()
        if place == "cpu" and config.precision == "fp16":
            raise OptionError(
                "precision fp16 needs a GPU, and this run is on a CPU, where accelerate computes "
                "in float32 all the same. Take bf16 or no."
            )
        # With the counts that it is trained with, wherever the result is loaded.
        self.recipes = {name: one.on(place) for name, one in build.recipes_of(config).items()}
        seed_all(config.seed, "start")
        self.loaded = build.open_model(config)
        train, val = build.open_data(config, self.loaded)
        model = self.loaded.model
        self.reducer = Reducer(model, self.recipes)
        build.load_learned(config, model)
        # DDP must be told that a forward may leave parameters out: a learned module in dense steps,
        # and what other libraries than timm keep for pretraining, such as DINOv2's mask token.
        unused = not hasattr(model, "pretrained_cfg")
        unused |= any(program.learned for program in self.reducer.programs.values())
        try:
            self.accelerator = Accelerator(
                cpu=place == "cpu",  # or accelerate leaves processes on CPUs each to itself
                mixed_precision=config.precision,
                kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=unused)],
            )
        except ValueError as error:  # it is set up once for a process
            raise OptionError(
                f"accelerate cannot be set up for precision {config.precision} on {config.device}: "
                f"{error} A run of another kind needs a process of its own."
            ) from error
        if config.ema and self.accelerator.distributed_type == "FSDP":
            raise OptionError(
                "Weights cannot be averaged (ema) while FSDP keeps each process a part of them. "
                "Leave ema out, or train with DDP."
            )
        seat = Seat(self.accelerator.process_index, self.accelerator.num_processes)
        started = int(os.environ.get("WORLD_SIZE", 1))
        if seat.world != started:
            raise OptionError(
                f"{started} processes were started, and accelerate cannot join them on {place}, so "
                "each would train the whole run by itself. Start one, or take --device cpu."
            )
        self.feed = build.feed_of(train, config, seat, self.anyone, training=True)
        self.val = None
        if val is not None:
            self.val = build.feed_of(val, config, seat, self.anyone, training=False)
        self.timetable = Timetable(
            recipes=tuple(self.recipes),
            steps=self.feed.steps,
            warmup=config.reduction_warmup,
            epochs=config.reduce_epochs,
            seed=config.seed,
        )
        known = None if config.new_head else self.loaded.label_names
        self.class_names = known or train.class_names or ()
        self.targets = Targets.of(config, len(self.class_names), seat.world)
        self._template = copy.deepcopy(model)
        model.to(self.accelerator.device).train()
        self.ema = self._averaged(model) if config.ema else None
        teacher = teacher_of(config, self.loaded, self.class_names)
        self.objective = Objective(config, model, self.reducer, teacher)
        self._check_dense_epochs()
        self.examiner = None if teacher is None else Examiner(teacher)
        optimizer = build.optimizer_of(model, config)
        self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        self.schedule = build.schedule_of(self.optimizer, config, self.feed.steps)
        self.position = Position()
        self.history: list[Row] = []
        self.skipped: dict[str, str] = {}
        self.out = Path(config.out).expanduser()

    def _check_dense_epochs(self) -> None:
        """Check that epochs without reduction learn something."""
        config, steps = self.config, self.feed.steps
        if self.objective.teacher is not None or config.label_loss or config.dense_loss:
            return
        # The last step of each: a warm-up has only its first one without reduction.
        ends = [self.timetable.at((epoch + 1) * steps - 1) for epoch in range(config.epochs)]
        if dense := [epoch for epoch, end in enumerate(ends, 1) if end.strength == 0]:
            raise OptionError(
                "A model that has nothing but its own dense path to learn from (teacher self, "
                "label_loss 0, dense_loss 0) learns nothing in epochs without reduction, as epoch "
                f"{dense[0]} is. Give label_loss or dense_loss a weight, or reduce in all epochs."
            )

    @property
    def place(self) -> int:
        """The step that comes, by the plan: where an epoch of a stream is longer, its last one."""
        return self.position.epoch * self.feed.steps + min(self.position.step, self.feed.steps - 1)

    @property
    def left(self) -> int:
        """Steps until the end, by the plan."""
        epochs = self.config.epochs - self.position.epoch
        return epochs * self.feed.steps - min(self.position.step, self.feed.steps)

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints are."""
        return self.out / "checkpoints"

    def _averaged(self, model: nn.Module) -> Any:
        from timm.utils import ModelEmaV3

        # Without a warm-up, the weights that a short run starts from would hardly fade.
        ema = ModelEmaV3(model, decay=self.config.ema, use_warmup=True)
        self.ema_reducer = Reducer(ema.module, self.recipes)
        return ema

    def close(self) -> None:
        """End the processes that read images."""
        for feed in (self.feed, self.val):
            if feed is not None:
                feed.close()

    def validate(self) -> dict[str, Score]:
        """Scores of the dense path and of each reduced one; of the averaged weights, if any.

        They are compared with the teacher where it is fixed, and otherwise with the dense path.
        Empty without validation images.
        """
        if self.val is None:
            return {}
        model = self.model if self.ema is None else self.ema.module
        reducer = self.reducer if self.ema is None else self.ema_reducer
        choices = {DENSE: Choice(next(iter(self.recipes)), 0.0)}
        choices |= {name: Choice(name, 1.0) for name, p in reducer.programs.items() if p.reduces}
        return validate(
            model,
            self.val,
            {name: partial(reducer.select, choice) for name, choice in choices.items()},
            examiner=self.examiner,
            shape=self.loaded.input_size,
            accelerator=self.accelerator,
            skipped=self.skipped,
        )

    def save(self) -> None:
        """Write a checkpoint; every process takes part.

        Raises:
            CheckpointError: It cannot be written; the last one is still there.
        """
        from accelerate.utils import gather_object
        from torch.distributed.checkpoint.state_dict import get_state_dict

        whole = _whole()
        model: Any
        model, optimizer = get_state_dict(self.model, self.optimizer.optimizer, options=whole)
        for part in gather_object([self.skipped]):
            self.skipped |= part
        scaler = self.accelerator.scaler
        trainer = {
            "optimizer": optimizer,
            "scaler": None if scaler is None else scaler.state_dict(),
            "position": asdict(self.position),
            "history": self.history,
            "skipped": self.skipped,
            "images": len(self.feed.data),
            "config": self.config.to_dict(),
            "recipes": {name: one.to_dict() for name, one in self.recipes.items()},
        }
        ema = {} if self.ema is None else self.ema.module.state_dict()
        state = State(model, ema, trainer)
        self.on_main(lambda: checkpoint.save(self.checkpoints, self.position.update, state))

    def restore(self) -> bool:
        """Go back to the last checkpoint; False where there is none. Every process takes part.

        Raises:
            CheckpointError: It is damaged, or belongs to another number of images, steps of another
                size, another optimiser or another model.
        """
        from torch.distributed.checkpoint.state_dict import (
            set_model_state_dict,
            set_optimizer_state_dict,
        )

        self.on_main(lambda: checkpoint.clean(self.checkpoints))
        place = checkpoint.latest(self.checkpoints)
        if place is None:
            return False
        state = checkpoint.load(place)
        saved = state.trainer
        if saved["images"] != len(self.feed.data):
            raise CheckpointError(
                f"The run in '{self.out}' trains on {saved['images']} images and '"
                f"{', '.join(self.config.data)}' now has {len(self.feed.data)}, so its order is "
                "lost. Give the same images, or start a new run from its weights with --checkpoint."
            )
        taken = saved["config"]["batch_size"]  # a place in a run is counted in steps
        if taken != self.config.batch_size:
            raise CheckpointError(
                f"The run in '{self.out}' takes {taken} images a step and batch_size is now "
                f"{self.config.batch_size}, so its place and its schedules are lost. Go on with "
                f"batch_size {taken}; where memory is short, raise accumulate."
            )
        made = saved["config"]["optimizer"]  # some states look alike, as those of adam and adamw
        if made != self.config.optimizer:
            raise CheckpointError(
                f"The run in '{self.out}' is trained by {made} and optimizer is now "
                f"{self.config.optimizer}, so what it keeps of the steps before means something "
                f"else. Go on with {made}, or start a new run from its weights with --checkpoint."
            )
        optimizer = self.optimizer.optimizer
        told = [
            {key: group[key] for key in _TOLD & group.keys()} for group in optimizer.param_groups
        ]
        try:
            set_model_state_dict(self.model, dict(state.model), options=_whole())
            # Parameters that no forward uses have no state, which torch 2.9 misses by their names.
            kept = saved["optimizer"]
            for group in kept["param_groups"]:
                for name in group["params"]:
                    kept["state"].setdefault(name, {})
            set_optimizer_state_dict(self.model, optimizer, kept, options=_whole(strict=False))
            if self.ema is not None:
                self.ema.module.load_state_dict(state.ema)
        except (RuntimeError, KeyError, ValueError) as error:
            raise CheckpointError(
                f"The checkpoint '{place}' does not fit this run: {error}. Resume with the model, "
                "method, optimiser and averaging that it was made with."
            ) from error
        for group, values in zip(optimizer.param_groups, told, strict=True):
            group.update(values)
        self._note_changes(saved)
        if self.accelerator.scaler is not None and saved["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(saved["scaler"])
        self.position = Position(**saved["position"])
        self.history = saved["history"]
        self.skipped = saved["skipped"]
        return True

    def _note_changes(self, saved: Mapping[str, Any]) -> None:
        """Say which options differ from those of the checkpoint; they hold from here on."""
        before, now = saved["config"], self.config.to_dict()
        changes = [
            f"{key} {before.get(key)!r} is now {now[key]!r}"
            for key in now
            if key not in _FREE and now[key] != before.get(key)
        ]
        for name, recipe in saved.get("recipes", {}).items() if self.config.recipe else ():
            if name in self.recipes:  # the file is the same; it may say something else
                # By way of a recipe, in which options have defaults that were none then.
                old, new = Recipe.from_dict(recipe).to_dict(), self.recipes[name].to_dict()
                changes += [
                    f"{key} of '{name}' {old[key]!r} is now {new[key]!r}"
                    for key in ("method", "schedule", "align")
                    if old[key] != new[key]
                ]
        if changes:
            warnings.warn(
                f"The run goes on with other options: {'; '.join(changes)}. Its end will differ "
                "from that of an uninterrupted run.",
                stacklevel=3,
            )

    def trained(self) -> nn.Module:
        """A copy of the model with the weights of now, averaged where they are averaged.

        Every process takes part; only the main process gets the weights.
        """
        from torch.distributed.checkpoint.state_dict import get_model_state_dict

        state = get_model_state_dict(self.model, options=_whole())
        if self.accelerator.is_main_process:
            averaged = None if self.ema is None else self.ema.module.state_dict()
            self._template.load_state_dict(averaged or state)
        return self._template

    def total(self, *values: float) -> list[float]:
        """Sums over all processes."""
        here = torch.tensor(values, dtype=torch.float32, device=self.accelerator.device)
        sums: list[float] = self.accelerator.reduce(here, "sum").tolist()
        return sums

    def anyone(self, here: bool) -> bool:
        """Whether something is so in any process."""
        return self.total(here)[0] > 0

    def on_main(self, action: Callable[[], object]) -> None:
        """Do something in one process; if it fails there, it fails in all of them.

        Raises:
            MergenceError: What the action raised.
        """
        from accelerate.utils import gather_object

        problem: MergenceError | None = None
        if self.accelerator.is_main_process:
            try:
                action()
            except MergenceError as error:
                problem = error
        problems = [text for text in gather_object([problem and str(problem)]) if text]
        if problem is not None:
            raise problem
        if problems:
            raise CheckpointError(problems[0])


# What the configuration says about a group of parameters, whatever a checkpoint says.
_TOLD = {"weight_decay", "lr_scale", "initial_lr"}

# What may differ from run to run without changing what is learned. Not the number of pieces: images
# are mixed, and layers dropped, within each.
_FREE = ("out", "workers", "save_every", "log_every", "tensorboard", "device")


def _whole(*, strict: bool = True) -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True, strict=strict)
