"""A run never loses work: what is resumed ends as if nothing had happened."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch

import mergence
from mergence.errors import (
    CheckpointError,
    DataError,
    OptionError,
    TrainingError,
    UnsupportedModelError,
)
from mergence.models import LoadedModel
from mergence.train import Config, Status, build, checkpoint, fit
from mergence.train.loop import _Loop
from mergence.train.run import Run

Build = Callable[..., Config]
Disk = Callable[[int], AbstractContextManager[None]]
EVERYTHING: dict[str, Any] = {
    "ema": 0.9, "mixup": 0.5, "drop_path": 0.2, "val": "demo", "val_limit": 10, "save_every": 1,
    "macs": [0.8, 0.6], "optimizer": "nadamw", "log_every": 1,
    "method": "mstm", "set": {"fusion": True}, "learned_lr": 0.02,
}  # fmt: skip


class Crash(Exception):
    """Stands for whatever ends a process between two steps."""


def crash_at(update: int) -> Callable[[Status], None]:
    def report(status: Status) -> None:
        if status.update == update:
            raise Crash

    return report


def results(folder: Path) -> list[bytes]:
    """Everything that a finished run has written and that must not depend on how often it fell."""
    files = ["model/model.safetensors", "epochs.csv", "checkpoints/step-000000008/ema.safetensors"]
    steps = (folder / "steps.csv").read_text().splitlines()
    timeless = "\n".join(line.rpartition(",")[0] for line in steps)  # the last is images/s
    return [*((folder / file).read_bytes() for file in files), timeless.encode()]


@pytest.fixture(scope="session")
def uninterrupted(
    config_in: Callable[[Path], Build], tmp_path_factory: pytest.TempPathFactory
) -> list[bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    fit(config_in(folder)(**EVERYTHING))
    return results(folder / "run")


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "updates", [(3, 6), *(pytest.param((u,), marks=SLOW) for u in (1, 4, 5, 8))], ids=str
)
def test_a_resumed_run_ends_as_an_uninterrupted_one(
    config: Build, tmp_path: Path, uninterrupted: list[bytes], updates: tuple[int, ...]
) -> None:
    settings = config(**EVERYTHING | {"save_every": 3})
    for update in updates:
        with pytest.raises(Crash):
            fit(settings, resume=True, report=crash_at(update))
        random.seed(update)
        torch.manual_seed(update)
    seen: list[int] = []
    fit(settings, resume=True, report=lambda status: seen.append(status.update))
    assert results(tmp_path / "run") == uninterrupted
    # It went on from the last checkpoint: every third step, and the end of each epoch of four.
    reached = max((u for u in (0, 3, 4, 6) if u < updates[-1]), default=0)
    assert seen == list(range(reached + 1, 9))


@pytest.mark.slow
def test_a_finished_run_stays_as_it_is(config: Build, tmp_path: Path) -> None:
    first = fit(config(**EVERYTHING))
    files = results(tmp_path / "run")
    again = fit(config(**EVERYTHING), resume=True)
    assert json.dumps(again.history) == json.dumps(first.history)
    assert results(tmp_path / "run") == files


def unmount(folder: Path) -> None:
    folder.rename(folder.with_name("away"))


def lose_one(folder: Path) -> None:
    min(folder.rglob("*.png")).unlink()


def damage_all(folder: Path) -> None:
    for file in folder.rglob("*.png"):
        file.write_bytes(b"")


@pytest.mark.parametrize(
    ("happens", "says"),
    [
        (unmount, "4 cannot be opened. First: .*FileNotFound"),
        (lose_one, "1 cannot be opened. First: Bag/.*FileNotFound"),
        (damage_all, "none can be read. First: .*the file is empty"),
    ],
)
def test_images_that_go_away_end_the_run_before_it_learns_without_them(
    config: Build, folders: Path, tmp_path: Path, happens: Callable[[Path], None], says: str
) -> None:
    def report(status: Status) -> None:
        if status.update == 3:
            happens(folders)

    fields = {"data": str(folders), "new_head": True, "batch_size": 4, "save_every": 1}
    with pytest.raises(DataError, match=f"{says}.*--resume") as stopped:
        fit(config(**fields), report=report)
    last = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert last is not None
    assert f"Of the 4 images of step {int(last.name[-1]) + 1}, " in str(stopped.value)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=SLOW)])
def test_a_request_to_stop_is_heard_between_steps(
    config: Build, tmp_path: Path, uninterrupted: list[bytes], number: int
) -> None:
    def report(status: Status) -> None:
        if status.update == 2:  # a terminal or a scheduler tells all processes of a job
            job = [os.getpid(), *(process.pid for process in multiprocessing.active_children())]
            subprocess.run(["kill", f"-{number}", *map(str, job)], check=True)
            time.sleep(0.2)

    settings = config(**EVERYTHING | {"save_every": 100, "workers": 1})
    before = signal.getsignal(number)
    with pytest.raises(TrainingError, match=r"Stopped on request .* after step 2; its state"):
        fit(settings, report=report)
    assert signal.getsignal(number) is before
    fit(settings, resume=True)
    assert results(tmp_path / "run") == uninterrupted


def worker(config: Config, started: Any, die_after: int | None, threads: int) -> None:
    """One life of a run, which may end itself in the middle of a write."""
    torch.set_num_threads(threads)  # sums depend on it
    calls = 0
    flush = checkpoint._flush

    def deadly(path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == die_after:
            os.kill(os.getpid(), signal.SIGKILL)
        flush(path)

    checkpoint._flush = deadly
    fit(config, resume=True, report=lambda status: started.set())


def live(config: Config, die_after: int | None = None, kill_after: float | None = None) -> int:
    """Run in a process of its own, perhaps until it is killed; its exit code."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mergence.train.loop", "timm", "accelerate", "PIL.Image"])
    started = context.Event()
    process = context.Process(
        target=worker, args=(config, started, die_after, torch.get_num_threads())
    )
    process.start()
    if kill_after is not None:
        # A run that the kills before have let come to its end takes no step that would tell.
        ready = (started.wait(timeout=0.01) or not process.is_alive() for _ in range(6000))
        assert any(ready), "the run does not begin"
        time.sleep(kill_after)
        process.kill()
    process.join(timeout=60)
    code = process.exitcode
    assert code is not None
    return code


@pytest.mark.slow
def test_kill_9_at_any_moment_costs_nothing(
    config: Build, tmp_path: Path, uninterrupted: list[bytes]
) -> None:
    settings = config(**EVERYTHING)
    draw = random.Random(0)
    # In the middle of a write: a checkpoint is five files and folders to flush.
    codes = [live(settings, die_after=calls) for calls in (1, 2, 4, 7)]
    partial = list((tmp_path / "run" / "checkpoints").glob("*.partial"))
    codes += [live(settings, kill_after=draw.uniform(0, 0.15)) for _ in range(2)]
    assert codes[:4] == [-signal.SIGKILL] * 4
    assert partial, "no kill left a partial checkpoint behind"
    assert live(settings) == 0
    assert results(tmp_path / "run") == uninterrupted
    assert not list((tmp_path / "run" / "checkpoints").glob("*.partial"))


@pytest.mark.parametrize(
    "size", [100_000, *(pytest.param(s, marks=SLOW) for s in (1_000, 300_000))]
)
def test_a_full_disk_leaves_the_last_checkpoint(
    config: Build,
    tmp_path: Path,
    uninterrupted: list[bytes],
    disk_with_room_for: Disk,
    size: int,
) -> None:
    def report(status: Status) -> None:
        if status.update == 3:
            full.__enter__()

    settings = config(**EVERYTHING)
    full = disk_with_room_for(size)
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written.*Make room"):
            fit(settings, report=report)
    finally:
        full.__exit__(None, None, None)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-000000001", "step-000000002"]
    fit(settings, resume=True)
    assert results(tmp_path / "run") == uninterrupted


def test_what_is_wrong_with_a_model_is_not_called_a_full_disk(tmp_path: Path) -> None:
    def fill(place: Path) -> None:
        raise UnsupportedModelError("It cannot be built again.")

    with pytest.raises(UnsupportedModelError, match=r"^It cannot be built again\.$"):
        checkpoint.write_folder(tmp_path / "model", fill)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["timm-vit", "torchvision-vit"])
def test_a_full_disk_at_the_end_says_how_to_go_on(
    fresh: Any, tmp_path: Path, disk_with_room_for: Disk, kind: str
) -> None:
    model = mergence.apply(fresh(kind), macs=0.7)

    def fill(place: Path) -> None:
        build.save_model(place, model, [], {"mergence": mergence.recipe_of(model)})

    said = r"model' cannot be written: .*Make room.*--resume"
    with disk_with_room_for(100), pytest.raises(CheckpointError, match=said):
        checkpoint.write_folder(tmp_path / "model", fill)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_no_number_names_its_images(
    config: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    settings = config(save_every=2)
    loss = _Loop._loss
    seen: list[list[str]] = []

    def poisoned(self: _Loop, batch: Any, choice: Any) -> torch.Tensor:
        value = loss(self, batch, choice)
        seen.append(batch.names)
        if len(seen) == 6:
            # The root of zero: its value is fine, its gradient is not.
            value = value * float("nan") if what == "loss" else value + (value * 0).sqrt()
        return value

    monkeypatch.setattr(_Loop, "_loss", poisoned)
    with pytest.raises(TrainingError) as problem:
        fit(settings)
    assert f"The {what} of step 6 is not a finite number" in str(problem.value)
    assert ", ".join(seen[5]) in str(problem.value)
    kept = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert kept == ["step-000000002", "step-000000004"]
    monkeypatch.undo()
    assert fit(settings, resume=True).history[-1]["epoch"] == 2


def test_checkpoints_are_read_without_running_code(config: Build, tmp_path: Path) -> None:
    fit(config(epochs=1))
    (place,) = (tmp_path / "run" / "checkpoints").iterdir()
    assert {file.name for file in place.iterdir()} == {"model.safetensors", "trainer.pt"}
    torch.load(place / "trainer.pt", weights_only=True)
    (place / "trainer.pt").write_bytes((place / "trainer.pt").read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cannot be read.*Remove that folder"):
        fit(config(epochs=1), resume=True)
    torch.save([1], place / "trainer.pt")
    with pytest.raises(CheckpointError, match=r"cannot be read.*Remove that folder"):
        fit(config(epochs=1), resume=True)


@pytest.mark.slow
def test_another_run_cannot_be_resumed(config: Build) -> None:
    fit(config(epochs=1))
    with pytest.raises(CheckpointError, match="trains on 50 images and 'demo' now has 40"):
        fit(config(limit=40), resume=True)
    with pytest.raises(CheckpointError, match="does not fit this run"):
        fit(config(model="demo"), resume=True)
    with pytest.raises(CheckpointError, match="does not fit this run"):
        fit(config(ema=0.9), resume=True)
    with pytest.warns(
        UserWarning, match=r"goes on with other options: epochs 1 is now 2; lr 0\.00"
    ):
        fit(config(lr=1e-4), resume=True)


def test_another_batch_size_is_refused(config: Build, tmp_path: Path) -> None:
    fit(config(epochs=1, limit=16))
    with pytest.raises(CheckpointError, match=r"16 images a step and batch_size is now 8.*accumul"):
        fit(config(epochs=2, limit=16, batch_size=8), resume=True)


def test_another_optimizer_is_refused(config: Build, tmp_path: Path) -> None:
    """Also one whose state looks alike."""
    fit(config(epochs=1, limit=16, optimizer="adamw"))
    with pytest.raises(CheckpointError, match="is trained by adamw and optimizer is now adam, so"):
        fit(config(epochs=2, limit=16, optimizer="adam"), resume=True)


def test_a_parameter_that_no_forward_uses_has_no_state(
    config: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As DINOv2's mask token in transformers, which only its pretraining needs."""

    def with_spare(config: Config) -> LoadedModel:
        loaded = open_model(config)
        loaded.model.register_parameter("spare", torch.nn.Parameter(torch.zeros(3)))
        return loaded

    open_model = build.open_model
    monkeypatch.setattr(build, "open_model", with_spare)
    settings = config(save_every=1)
    with pytest.raises(Crash):
        fit(settings, report=crash_at(2))
    run = Run(settings)
    assert run.restore()
    assert run.position.update == 1


def test_other_pieces_are_noted(config: Build) -> None:
    """Images are mixed within a piece."""
    fit(config(epochs=1, limit=16, mixup=0.5))
    with pytest.warns(UserWarning, match="goes on with other options: accumulate 1 is now 2"):
        assert Run(config(epochs=1, limit=16, mixup=0.5, accumulate=2)).restore()


def test_the_configuration_is_there_whatever_a_full_disk_does(
    config: Build, tmp_path: Path, disk_with_room_for: Disk
) -> None:
    settings = config(epochs=1, limit=16)
    fit(settings)
    written = (tmp_path / "run" / "config.yaml").read_bytes()
    with disk_with_room_for(0), pytest.raises(OptionError, match=r"config.yaml' cannot be written"):
        fit(settings, resume=True)
    assert (tmp_path / "run" / "config.yaml").read_bytes() == written


def test_new_options_hold_from_the_checkpoint_on(config: Build) -> None:
    fit(config(epochs=1, weight_decay=0.5, layer_decay=0.5))
    run = Run(config(epochs=2, weight_decay=0.25, layer_decay=0.8, lr=1e-4))
    with pytest.warns(UserWarning, match=r"layer_decay 0\.5 is now 0\.8"):
        assert run.restore()
    run.schedule.step_update(run.position.update)
    groups = run.optimizer.param_groups
    assert {group["weight_decay"] for group in groups} == {0.0, 0.25}
    assert max(group["lr"] for group in groups) < 1e-4
    assert sorted({group["lr_scale"] for group in groups})[-2] == pytest.approx(0.8)


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    def fill(text: str) -> Callable[[Path], None]:
        return lambda place: (place / "file").write_text(text) and None

    def fail(place: Path) -> None:
        fill("half")(place)
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = tmp_path / "model"
    checkpoint.write_folder(folder, fill("first"))
    with pytest.raises(CheckpointError, match="No space left on device"):
        checkpoint.write_folder(folder, fail)
    assert (folder / "file").read_text() == "first"
    checkpoint.write_folder(folder, fill("second"))
    assert (folder / "file").read_text() == "second"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
