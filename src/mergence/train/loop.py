"""Fit a model: epochs, steps, and what is done about a step that goes wrong."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mergence.data import Batch
from mergence.errors import DataError, MergenceError, OptionError, TrainingError
from mergence.evaluation import DENSE
from mergence.files import write_text
from mergence.train import checkpoint
from mergence.train.claim import claimed
from mergence.train.config import Config
from mergence.train.levels import Choice
from mergence.train.logs import Logs, Row, Status
from mergence.train.result import save_model
from mergence.train.run import Run
from mergence.train.seeding import seed_all
from mergence.train.signals import Requests
from mergence.train.validation import Score, count_read, first, tensors


@dataclass(frozen=True)
class Summary:
    """What came of a run.

    Attributes:
        model: Folder of the trained model; `mergence.load` reads it.
        history: One row an epoch, the state before training first where there is validation.
        skipped: Images that could not be read, with the reason.
        seconds: Time since this process started training.
        images_per_s: Training images per second in that time, over all processes.
    """

    model: Path
    history: list[Row]
    skipped: dict[str, str]
    seconds: float
    images_per_s: float


def fit(
    config: Config, *, resume: bool = False, report: Callable[[Status], None] = lambda status: None
) -> Summary:
    """Train a model with reduction on, its tokens really removed.

    Run the same function in every process of `torchrun` or `accelerate launch` to train on several
    devices. `config.out` gets `config.yaml`, `steps.csv`, `epochs.csv`, `checkpoints/` and at the
    end `model/`.

    Example:
        >>> fit(Config(model="demo", data="demo", macs=(0.67,), out="runs/demo"))

    Args:
        config: What to do.
        resume: Go on from the last checkpoint in `config.out`, bit for bit; start where there is
            none.
        report: Called after each step, in the main process only.

    Raises:
        MergenceError: Something does not fit; raised before anything is written.
        TrainingError: The loss is no number, another process was lost, or the run was asked to stop
            (SIGINT, SIGTERM), for which its state is saved first.
        CheckpointError: A checkpoint cannot be read or written.
    """
    folder = Path(config.out).expanduser()
    found = (folder / "model").exists() or checkpoint.latest(folder / "checkpoints") is not None
    if found and not resume:
        raise OptionError(
            f"'{folder}' holds a run already. Go on with it (--resume, in Python resume=True), or "
            "choose another folder."
        )
    run = Run(config)
    try:
        with ExitStack() as held:
            run.on_main(lambda: held.enter_context(claimed(folder)))
            restored = resume and run.restore()
            # Whole, because the one that is there is what --resume reads.
            run.on_main(lambda: write_text(folder / "config.yaml", config.to_yaml()))
            if not restored and run.val is not None:
                run.history.append(_row(run, None, run.validate()))
            with Requests() as requests, warnings.catch_warnings():
                # Of DDP, once.
                warnings.filterwarnings("ignore", message="Grad strides do not match")
                return _Loop(run, report, requests).fit()
    except RuntimeError as error:
        if isinstance(error, MergenceError) or not _lost_another(run, error):
            raise
        last = checkpoint.latest(run.checkpoints)
        raise TrainingError(
            f"Another of the {run.feed.seat.world} training processes was lost "
            f"({str(error).splitlines()[0]}). Its own output says why. "
            + ("There is no checkpoint yet." if last is None else f"'{last}' is the last state; ")
            + ("" if last is None else "start all processes again with --resume.")
        ) from error
    finally:
        run.close()


def _lost_another(run: Run, error: RuntimeError) -> bool:
    """Whether an error is how this process learns that another one has ended."""
    known = isinstance(error, torch.distributed.DistError) or "gloo" in str(error).lower()
    return run.feed.seat.world > 1 and (known or "Connection" in str(error))


def _row(run: Run, loss: float | None, scores: dict[str, Score]) -> Row:
    row: Row = {"epoch": run.position.epoch, "update": run.position.update, "loss": loss}
    for name, score in scores.items():
        row |= {f"{name} top1": score.top1, f"{name} loss": score.loss}
        if name != DENSE or run.objective.teacher is not None:  # it is not compared with itself
            row |= {f"{name} agreement": score.agreement, f"{name} kl": score.kl}
    return row


class _Loop:
    """The epochs of a run, in one process of perhaps several."""

    def __init__(self, run: Run, report: Callable[[Status], None], requests: Requests) -> None:
        self.run = run
        self.report = report
        self.requests = requests
        self.logs: Logs | None = None
        if run.accelerator.is_main_process:
            tensorboard = run.config.tensorboard
            self.logs = Logs(run.out, run.position.update, tensorboard=tensorboard)
            for row in run.history if run.position.update == 0 else ():  # before training
                self.logs.epoch(row)
        self.began = time.perf_counter()
        self.images = 0

    def fit(self) -> Summary:
        run, position = self.run, self.run.position
        while position.epoch < run.config.epochs:
            for pieces in run.feed.epoch(position.epoch, position.step):
                self._step(pieces)
                asked = run.anyone(self.requests.name is not None)
                due = position.update % run.config.save_every == 0
                # The end of the epoch is saved anyhow; a stream may go on where it was planned.
                if asked or (due and position.step != run.feed.steps):
                    self._save()
                if asked:
                    raise TrainingError(
                        f"Stopped on request ({self.requests.name or 'in another process'}) after "
                        f"step {position.update}; its state is saved. Go on with --resume."
                    )
            self._end_epoch()
        return self._finish()

    def _step(self, pieces: list[Batch]) -> None:
        run, position = self.run, self.run.position
        choice = run.timetable.at(run.place, position.update)
        run.schedule.step_update(run.place)
        skipped = [item for batch in pieces for item in batch.skipped]
        what = f"step {position.update + 1}"
        images = count_read(sum(map(len, pieces)), skipped, what, run.accelerator)
        run.skipped |= {item.name: item.reason for item in skipped}
        loss, bad = torch.zeros((), device=run.accelerator.device), []
        for number, batch in enumerate(pieces if images else ()):
            seed_all(run.config.seed, "step", position.update, run.feed.seat.rank, number)
            together = number == len(pieces) - 1
            with nullcontext() if together else run.accelerator.no_sync(run.model):
                value = self._loss(batch, choice)
                if not math.isfinite(value.item()):
                    bad += batch.names
                # Gradients are averaged over the processes, the loss is a mean over all images.
                run.accelerator.backward(value * (run.feed.seat.world / images))
            loss += value.detach()
        total, broken = run.total(loss.item(), len(bad))
        if broken:
            self._stop("The loss", bad)
        if images:
            norm = run.accelerator.clip_grad_norm_(
                run.model.parameters(), run.config.clip_grad or math.inf
            )
            norm = getattr(norm, "full_tensor", lambda here=norm: here)()  # FSDP's is in parts
            # A scaler, as of fp16, skips steps whose gradients overflow, and scales down.
            if run.accelerator.scaler is None and not math.isfinite(float(norm)):
                self._stop("The gradient", [name for batch in pieces for name in batch.names])
            run.optimizer.step()
            run.optimizer.zero_grad()
            if run.ema is not None:
                run.ema.update(run.accelerator.unwrap_model(run.model), step=position.update)
        position.step += 1
        position.update += 1
        position.images += images
        position.loss += total
        self.images += images
        self._note(total / max(images, 1), choice.strength, choice.recipe)

    def _loss(self, batch: Batch, choice: Choice) -> Tensor:
        """Sum of the losses of a batch; zero for one of no images."""
        run = self.run
        x, labels = tensors(batch, run.loaded.input_size, run.accelerator.device)
        x, soft = run.targets(x, labels)
        with run.accelerator.autocast():
            loss = run.objective(run.model, x, soft, choice).sum()
        return loss if batch else loss * 0

    def _stop(self, what: str, names: list[str]) -> None:
        """End a run whose numbers have become none; nothing is saved over the last checkpoint."""
        from accelerate.utils import gather_object

        names = gather_object(names)
        last = checkpoint.latest(self.run.checkpoints)
        kept = "There is no checkpoint yet" if last is None else f"The checkpoint '{last}' is kept"
        raise TrainingError(
            f"{what} of step {self.run.position.update + 1} is not a finite number. Its images: "
            f"{', '.join(names)}. {kept}. Look at the images, lower the learning rate or clip the "
            "gradient, and go on with --resume."
        )

    def _note(self, loss: float, strength: float, recipe: str) -> None:
        run, position = self.run, self.run.position
        if self.logs is None:
            return
        speed = self.images / (time.perf_counter() - self.began)
        epoch = position.epoch + 1
        if position.update % run.config.log_every == 0 or not run.left:
            # The schedule's, of which layers, and what a method learns, have a multiple.
            groups = [g for g in run.optimizer.param_groups if g.get("lr_scale", 1.0)]
            rate = max(group["lr"] / group.get("lr_scale", 1.0) for group in groups)
            row = {"update": position.update, "epoch": epoch, "loss": loss, "lr": rate}
            row |= {"recipe": recipe, "strength": strength, "images_per_s": round(speed, 1)}
            self.logs.step(row)
        left = run.left * run.config.batch_size / max(speed, 1e-9)
        updates = position.update + run.left
        status = Status(position.update, updates, epoch, run.config.epochs, loss, speed, left)
        self.report(status)

    def _save(self) -> None:
        self.run.on_main(self._write_logs)
        self.run.save()

    def _write_logs(self) -> None:
        if self.logs is not None:
            self.logs.write(self.run.history)

    def _end_epoch(self) -> None:
        run, position = self.run, self.run.position
        if position.images == 0:
            raise DataError(f"No training image could be read. First: {first(run.skipped)}")
        mean = position.loss / position.images
        position.epoch += 1
        position.step, position.images, position.loss = 0, 0, 0.0
        row = _row(run, mean, run.validate())
        run.history.append(row)
        if self.logs is not None:
            self.logs.epoch(row)
        self._save()

    def _finish(self) -> Summary:
        run = self.run
        folder = run.out / "model"
        model = run.trained()
        run.on_main(
            lambda: checkpoint.write_folder(
                folder,
                lambda place: save_model(
                    place, model, run.class_names, run.recipes, run.loaded.processor
                ),
            )
        )
        if self.logs is not None:
            self.logs.close()
        seconds = time.perf_counter() - self.began
        return Summary(folder, run.history, run.skipped, seconds, self.images / seconds)
