"""Several processes with the same global batch are one run: gloo on the CPU."""

from __future__ import annotations

import csv
import io
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from mergence import demo
from mergence.devices import best_device
from mergence.errors import MergenceError, OptionError
from mergence.train import Config, fit
from mergence.train.loop import _Loop

pytestmark = pytest.mark.slow

Build = Callable[..., Config]
# 49 images in steps of 16: in the last step one process has one image and the other none.
SETTINGS: dict[str, Any] = {"limit": 49, "log_every": 1, "val": "demo", "val_limit": 15}
# Adam makes a step of full size of what is only rounding: keys' biases have no true gradient.
SETTINGS |= {"optimizer": "sgd", "lr": 0.05}
# Dense, weakened and full steps, and two forwards for one backward.
# In dense steps the fusion takes no part.
SETTINGS |= {"method": "mstm", "set": {"fusion": True}, "learned_lr": 0.5}
SETTINGS |= {"reduction_warmup": 0.5, "teacher": "self", "distill": 1.0, "dense_loss": 0.5}


def shard(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """What accelerate does for FSDP2, which it does on GPUs only: shard, and tell the optimiser."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    names = {parameter: name for name, parameter in model.named_parameters()}
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
    for block in model.blocks:  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    sharded = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [sharded[names[parameter]] for parameter in group["params"]]


def worker(rank: int, port: int, config: Config, options: dict[str, Any], ends: Any) -> None:
    """One of two processes, which tells how it ended."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {key: str(value) for key, value in place.items()} | {"MASTER_ADDR": "127.0.0.1"}
    note = _Loop._note

    def deadly(self: _Loop, *arguments: Any) -> None:
        note(self, *arguments)
        if rank == 1 and self.run.position.update == options.get("die_at"):
            os.kill(os.getpid(), signal.SIGKILL)

    _Loop._note = deadly  # type: ignore[method-assign]
    if options.get("fsdp"):
        from accelerate import Accelerator

        def prepare_both(self: Any, model: nn.Module, optimizer: Any) -> tuple[Any, Any]:
            shard(model, optimizer)
            return model, self.prepare_optimizer(optimizer)

        Accelerator.prepare = prepare_both
    try:
        fit(config, resume=options.get("resume", False))
        ends.put((rank, "done"))
    except MergenceError as error:
        ends.put((rank, str(error)))


def pair(config: Config, **options: Any) -> dict[int, str]:
    """Run two processes to their end; what each says that still could."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mergence.train.loop", "timm", "accelerate", "PIL.Image"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ends = context.Queue()
    processes = [
        context.Process(target=worker, args=(rank, port, config, options, ends)) for rank in (0, 1)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=100)
        assert process.exitcode is not None, "a process hangs"
    said: dict[int, str] = {}
    while not ends.empty():
        rank, text = ends.get()
        said[rank] = text
    return said


def rows(path: Path) -> list[dict[str, Any]]:
    with path.open() as file:
        return [
            {
                key: value if key == "recipe" or not value else float(value)
                for key, value in row.items()
            }
            for row in csv.DictReader(file)
        ]


def agree(one: Path, two: Path) -> None:
    """Two runs have the same curves, scores and weights within float error."""
    for name in ("steps.csv", "epochs.csv"):
        for a, b in zip(rows(one / name), rows(two / name), strict=True):
            for key in a.keys() - {"images_per_s"}:
                # A divergence is a difference of logarithms: of answers that are nearly the same,
                # as here, nothing is left but their float error.
                least = 1e-6 if key.endswith(" kl") else None
                expected = a[key]
                if not isinstance(expected, str):
                    expected = pytest.approx(expected, rel=1e-5, abs=least)
                assert b[key] == expected, (name, key)
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(b[name], a[name], rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def alone(config_in: Callable[[Path], Build], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("alone")
    fit(config_in(folder)(**SETTINGS))
    return folder / "run"


def test_two_processes_with_three_pieces_train_like_one(
    config: Build, tmp_path: Path, alone: Path
) -> None:
    assert pair(config(**SETTINGS, accumulate=3)) == {0: "done", 1: "done"}
    agree(alone, tmp_path / "run")


def test_sharded_parameters_train_like_whole_ones(
    config: Build, tmp_path: Path, alone: Path
) -> None:
    said = pair(config(**SETTINGS), fsdp=True, die_at=6)
    assert "was lost" in said[0]
    assert pair(config(**SETTINGS), fsdp=True, resume=True) == {0: "done", 1: "done"}
    agree(alone, tmp_path / "run")


@pytest.mark.parametrize("again", ["two", "one"])
def test_a_lost_process_ends_the_run_and_another_number_resumes_it(
    config: Build, tmp_path: Path, alone: Path, again: str
) -> None:
    settings = config(**SETTINGS | {"save_every": 2})
    said = pair(settings, die_at=7)
    assert said.keys() == {0}
    assert "Another of the 2 training processes was lost" in said[0]
    assert "step-000000006' is the last state; start all processes again with --resume" in said[0]
    if again == "two":
        assert pair(settings, resume=True) == {0: "done", 1: "done"}
    else:
        fit(settings, resume=True)
    agree(alone, tmp_path / "run")


def test_an_error_of_the_main_process_ends_all(config: Build, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    said = pair(config(out=str(tmp_path / "file")))
    assert all("cannot be written to" in text for text in said.values())
    assert said.keys() == {0, 1}


def test_torchrun_starts_two_that_train_like_one(
    config: Build, tmp_path: Path, alone: Path
) -> None:
    # As most people leave it; two processes have no accelerator each to be tested on.
    device = "auto" if best_device() == "cpu" else "cpu"
    (tmp_path / "config.yaml").write_text(config(**SETTINGS, device=device).to_yaml())
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "mergence.train", "--config", str(tmp_path / "config.yaml")]
    command += ["--workers", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=200, check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("What the run did") == 1
    agree(alone, tmp_path / "run")


def test_processes_that_cannot_be_joined_do_not_start(
    config: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a Mac's GPU, where accelerate leaves each process to itself."""
    monkeypatch.setattr("mergence.train.run.best_device", lambda: "mps")
    monkeypatch.setenv("WORLD_SIZE", "2")
    settings = config(device="auto")
    with pytest.raises(OptionError, match=r"2 processes were started, .* on mps"):
        fit(settings)
    assert not Path(settings.out).exists()


def test_uneven_shards_are_read_to_the_end(config: Build, tmp_path: Path) -> None:
    """One process has far more images than the other; both make as many steps."""
    pytest.importorskip("webdataset", reason="webdataset is not installed")
    data = demo.images(demo.load(), limit=20)
    for number, names in enumerate((data.names[:17], data.names[17:])):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as archive:
            for name in names:
                file = io.BytesIO()
                data.source.open(name).save(file, "png")
                for ending, content in (("png", file.getvalue()), ("cls", b"3")):
                    entry = tarfile.TarInfo(f"{Path(name).name}.{ending}")
                    entry.size = len(content)
                    archive.addfile(entry, io.BytesIO(content))
    stream = f"wds:{tmp_path}/*.tar"
    settings = config(
        data=stream, val=stream, limit=None, epoch_images=20, batch_size=8, epochs=1, log_every=1
    )
    assert pair(settings) == {0: "done", 1: "done"}
    # Four images a step for each process: five steps for seventeen images.
    assert [row["update"] for row in rows(tmp_path / "run" / "steps.csv")] == [1, 2, 3, 4, 5]
    fit(config(data=stream, val=stream, limit=None, epoch_images=20, out=str(tmp_path / "one")))
    start, again = (rows(tmp_path / name / "epochs.csv")[0] for name in ("run", "one"))
    assert start["dense loss"] == pytest.approx(again["dense loss"], rel=1e-5)


def test_parameters_that_a_forward_leaves_out_stop_nobody(config: Build, tmp_path: Path) -> None:
    """As DINOv2's mask token in transformers, which only its pretraining needs."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    size = {"hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 2, "num_labels": 4}
    made = transformers.Dinov2Config(**size, image_size=32, patch_size=8)
    transformers.Dinov2ForImageClassification(made).save_pretrained(tmp_path / "hf")
    processor = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    processor.save_pretrained(tmp_path / "hf")
    model = f"hf:{tmp_path / 'hf'}"
    settings = config(model=model, data="synthetic:8", limit=None, batch_size=4, epochs=1)
    assert pair(settings) == {0: "done", 1: "done"}


def test_half_precision_follows_the_full_one(config: Build, tmp_path: Path, alone: Path) -> None:
    settings = config(**SETTINGS, precision="bf16")
    assert pair(settings) == {0: "done", 1: "done"}
    for a, b in zip(rows(alone / "epochs.csv"), rows(tmp_path / "run" / "epochs.csv"), strict=True):
        assert b["dense loss"] == pytest.approx(a["dense loss"], rel=0.02)
        assert b["dense loss"] != a["dense loss"]
    weights = load_file(tmp_path / "run" / "model" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.float32}
