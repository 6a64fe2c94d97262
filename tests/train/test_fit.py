"""A whole run on a tiny model and real images."""

from __future__ import annotations

import csv
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode

import mergence
from mergence.data import loader, open_images
from mergence.distances import kl_divergence
from mergence.errors import DataError, OptionError
from mergence.models import load_model
from mergence.recipe import make
from mergence.train import Config, Status, build, fit
from mergence.train.config import read_yaml
from mergence.train.result import WEIGHTS, save_model
from mergence.train.run import Run

Build = Callable[..., Config]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_run_learns_and_writes_what_it_did(config: Build, tmp_path: Path) -> None:
    seen: list[Status] = []
    settings = config(val="demo", limit=200, val_limit=40, epochs=2, log_every=7)
    summary = fit(settings, report=seen.append)
    losses = [row["loss"] for row in summary.history]
    assert losses[0] is None
    assert losses[2] < losses[1] < 2.4
    assert summary.history[2]["mergence 0.67 top1"] > summary.history[0]["mergence 0.67 top1"] + 10
    assert [status.update for status in seen] == list(range(1, 27))
    assert (seen[-1].updates, seen[-1].epoch, seen[-1].seconds_left) == (26, 2, 0)
    out = tmp_path / "run"
    assert Config.from_dict(read_yaml(out / "config.yaml")) == settings
    steps = rows(out / "steps.csv")
    assert [int(row["update"]) for row in steps] == [7, 14, 21, 26]
    assert float(steps[-1]["loss"]) == seen[-1].loss
    assert float(steps[0]["lr"]) > float(steps[-1]["lr"]) > 0
    assert [row["epoch"] for row in rows(out / "epochs.csv")] == ["0", "1", "2"]


def test_the_trained_model_is_loaded_by_name_with_its_recipe(config: Build) -> None:
    summary = fit(config(val="demo", val_limit=40, scratch=True))
    loaded = load_model(f"local-dir:{summary.model}")
    images = open_images(
        "demo", transform=loaded.transform, mode="L", class_names=loaded.label_names, limit=40
    )
    recipe = mergence.Recipe.load(summary.model / "mergence.json")
    found = mergence.evaluate(loaded.model, loader(images, batch_size=16), {"r": recipe})
    last = summary.history[-1]
    assert last["dense top1"] == pytest.approx(found.results[0].top1)
    assert last["mergence 0.67 top1"] == pytest.approx(found.results[1].top1)
    assert last["mergence 0.67 agreement"] == pytest.approx(found.results[1].agreement)


def test_what_is_taught_by_the_model_before_training_is_compared_with_it(config: Build) -> None:
    settings = config(val="demo", val_limit=40, distill=1.0, label_loss=0.0)
    summary = fit(settings)
    before, *_, after = summary.history
    assert before["dense agreement"] == 100
    assert before["dense kl"] == pytest.approx(0, abs=1e-6)
    assert after["dense kl"] > 1e-5  # its own dense path has moved, and is not what it is held to
    taught = mergence.load(summary.model).eval()
    initial = load_model(settings.model)
    data = open_images("demo", transform=initial.transform, mode="L", limit=40)
    (batch,) = loader(data, batch_size=40)
    with torch.no_grad():
        divergence = kl_divergence(initial.model(batch.images), taught(batch.images))
    assert after["mergence 0.67 kl"] == pytest.approx(float(divergence.mean()), rel=1e-4)


@pytest.mark.slow
def test_averaged_weights_are_validated_and_written(config: Build) -> None:
    plain, averaged = (
        fit(config(val="demo", val_limit=20, ema=ema, out=config().out + str(ema)))
        for ema in (0.0, 0.999)
    )
    assert plain.history[-1]["loss"] == averaged.history[-1]["loss"]
    assert plain.history[-1]["dense loss"] != averaged.history[-1]["dense loss"]
    weights = [load_model(f"local-dir:{s.model}").model.state_dict() for s in (plain, averaged)]
    assert not torch.equal(weights[0]["head.weight"], weights[1]["head.weight"])


def test_a_dense_control_is_validated_once(config: Build) -> None:
    summary = fit(config(macs=(1.0, 0.6), val="demo", val_limit=20, limit=32))
    assert [k for k in summary.history[0] if k.endswith("top1")] == [
        "dense top1", "mergence 0.6 top1"
    ]  # fmt: skip


@pytest.mark.parametrize("share", [1.0, 0.6])
def test_tokens_are_really_removed_in_training(config: Build, share: float) -> None:
    """By the MLPs: what torch counts of attention and its gradient changes with its version."""
    run = Run(config(macs=share))
    program = run.reducer.select(run.timetable.at(0))
    dense = program.macs(dense=True).total
    assert program.macs().total / dense == pytest.approx(share, abs=0.03)
    with FlopCounterMode(display=False) as counter:
        run.model.train()(torch.zeros(2, 1, 28, 28)).sum().backward()
    mlps = {k: sum(n.values()) for k, n in counter.get_flop_counts().items() if k.endswith(".mlp")}
    assert len(mlps) == program.depth
    images, per_mac, passes = 2, 2, 3  # a gradient takes two forwards
    assert sum(mlps.values()) == images * per_mac * passes * program.macs().mlp


@pytest.mark.slow
def test_pieces_add_up_to_the_same_step(config: Build) -> None:
    whole, pieces = (fit(config(accumulate=n, out=config().out + str(n))).history for n in (1, 3))
    for a, b in zip(whole, pieces, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


@pytest.mark.slow
def test_several_budgets_train_one_model(config: Build, tmp_path: Path) -> None:
    summary = fit(config(macs=[0.8, 0.5], val="demo", val_limit=20, log_every=1))
    assert {"dense top1", "mergence 0.8 top1", "mergence 0.5 top1"} <= summary.history[-1].keys()
    drawn = {row["recipe"] for row in rows(tmp_path / "run" / "steps.csv")}
    assert drawn == {"mergence 0.8", "mergence 0.5"}


def test_a_new_head_learns_the_classes_of_the_data(config: Build, folders: Path) -> None:
    summary = fit(config(data=str(folders), val=str(folders), new_head=True))
    loaded = load_model(f"local-dir:{summary.model}")
    assert loaded.label_names == ("Bag", "Coat", "Dress")
    assert loaded.model(torch.zeros(1, 1, 28, 28)).shape == (1, 3)


def test_unreadable_images_are_counted_and_named(config: Build, folders: Path) -> None:
    bad = sorted(folders.rglob("*.png"))[::4]
    for file in bad:
        file.write_bytes(file.read_bytes()[:50])
    settings = config(data=str(folders), new_head=True, batch_size=4, epochs=1, workers=1)
    summary = fit(settings)
    assert sorted(summary.skipped) == [file.relative_to(folders).as_posix() for file in bad]
    assert "image" in next(iter(summary.skipped.values()))
    for file in folders.rglob("*.png"):
        file.write_bytes(b"")
    with pytest.raises(DataError, match="Of the 12 images of step 1, none can be read"):
        fit(config(data=str(folders), new_head=True, out=config().out + "2"))


def test_augmentation_and_regularisation_run_together(config: Build) -> None:
    everything = {"mixup": 0.8, "cutmix": 1.0, "smoothing": 0.1, "drop_path": 0.2, "erase": 0.5}
    everything |= {"layer_decay": 0.7, "clip_grad": 1.0, "warmup_epochs": 0.5, "ema": 0.9}
    summary = fit(config(color_jitter=0.3, optimizer="lamb", schedule="poly", **everything))
    assert summary.history[-1]["loss"] < 3


def test_layers_have_their_own_rates(config: Build) -> None:
    run = Run(config(layer_decay=0.5, lr=1.0))
    run.schedule.step_update(0)
    rates = {}
    for group in run.optimizer.param_groups:
        for parameter in group["params"]:
            rates[parameter] = group["lr"]
    model = run.loaded.model
    assert rates[model.head.weight] == 1.0
    first, second = (model.blocks[i].mlp.fc1.weight for i in (0, 1))
    assert rates[second] == pytest.approx(2 * rates[first])
    assert [g["weight_decay"] for g in run.optimizer.param_groups].count(0.0) > 1


def test_a_second_run_does_not_overwrite_the_first(config: Build) -> None:
    fit(config(epochs=1))
    with pytest.raises(OptionError, match=r"holds a run already.*--resume"):
        fit(config(epochs=1))


def test_a_folder_called_model_is_not_replaced(config: Build, tmp_path: Path) -> None:
    kept = tmp_path / "run" / "model" / "notes.txt"
    kept.parent.mkdir(parents=True)
    kept.touch()
    with pytest.raises(OptionError, match=r"holds a run already.*another folder"):
        fit(config(epochs=1, limit=16))
    assert list(kept.parents[1].rglob("*")) == [kept.parent, kept]


FUSION = {"method": "mstm", "set": {"fusion": True}}
WRONG = {
    "second derivatives": ({"optimizer": "adahessian"}, "needs second derivatives"),
    "an optimiser that needs more than torch": ({"optimizer": "fusedadam"}, "cannot be had here"),
    "an optimiser torch cannot save": ({"optimizer": "adafactorbv"}, "could not be resumed"),
    "unknown optimiser": ({"optimizer": "adamm"}, "Did you mean 'adam'?"),
    "unknown augmentation": ({"auto_augment": "rnd-m9"}, "does not read auto_augment 'rnd-m9'"),
    "unknown section": ({"auto_augment": "rand-m9-q1"}, "Unknown RandAugment config section"),
    "a multiple of no rate": ({"lr": 0, "min_lr": 0, "learned_lr": 1e-3} | FUSION, "lr is 0"),
    "one image to mix": ({"mixup": 0.5, "accumulate": 16}, "over 16 (processes times accumulate)"),
    "unknown schedule": ({"schedule": "cosin"}, "Did you mean 'cosine'?"),
    "rates upside down": ({"min_lr": 1.0}, "min_lr 1 is above lr 0.002"),
    "no reduction": ({"macs": []}, "how much to reduce. Give macs, for"),
    "a recipe and a budget": ({"macs": 0.5, "recipe": "a.json"}, "Leave out macs"),
    "a recipe and a method": ({"recipe": "a.json", "method": "tome"}, "Leave out method"),
    "a share twice": ({"macs": [0.5, 0.5]}, "Two reductions have the same name"),
    "a share out of range": ({"macs": 1.5}, "above 0 and at most 1"),
    "an ignorant teacher": ({"scratch": True, "distill": 1}, "teacher self"),
    "a teacher that nobody asks": ({"teacher": "slef"}, "is 'slef', and nothing asks it"),
    "a temperature of nothing": ({"temperature": 4}, "temperature is 4, and distill 0"),
    "nothing to learn from": ({"label_loss": 0}, "Give distill 1"),
    "epochs that cannot be read": ({"reduce_epochs": "1:2"}, "reduce_epochs is '1:2'"),
    "a checkpoint from scratch": ({"scratch": True, "checkpoint": "x"}, "x"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_stops_before_anything_is_written(
    config: Build, tmp_path: Path, case: str
) -> None:
    fields, says = WRONG[case]
    with pytest.raises(mergence.MergenceError) as problem:
        fit(config(**fields))
    assert says in str(problem.value)
    assert not (tmp_path / "run").exists()


def test_images_without_classes_are_refused(config: Build, folders: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for file in folders.rglob("*.png"):
        file.rename(flat / file.name)
    with pytest.raises(DataError, match="nothing to learn from"):
        fit(config(data=str(flat)))
    with pytest.raises(DataError, match="nothing can be validated"):
        fit(config(val=str(flat)))


def test_a_limit_is_that_of_all_folders(config: Build, folders: Path, tmp_path: Path) -> None:
    shutil.copytree(folders, tmp_path / "more")
    both = config(data=[str(folders), str(tmp_path / "more")], new_head=True, limit=5)
    assert len(build.open_data(both, build.open_model(both))[0]) == 5
    twice = config(data=[str(folders), f"{folders}/."])
    with pytest.raises(OptionError, match=r"names the same images twice.*epochs"):
        build.open_data(twice, build.open_model(twice))


@pytest.mark.slow
def test_tensorboard_gets_the_curves(config: Build, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    fit(config(val="demo", val_limit=10, tensorboard=True, log_every=1))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert {"train/loss", "train/lr", "epoch/dense top1"} <= set(events.Tags()["scalars"])
    assert [e.step for e in events.Scalars("train/loss")] == list(range(1, 9))
    assert [e.step for e in events.Scalars("epoch/dense top1")] == [0, 4, 8]


@pytest.mark.slow
def test_the_resolved_configuration_repeats_the_run(config: Build, tmp_path: Path) -> None:
    first = fit(config(mixup=0.5, drop_path=0.2))
    values = read_yaml(tmp_path / "run" / "config.yaml")
    again = fit(Config.from_dict(values | {"out": str(tmp_path / "again")}))
    assert json.dumps(first.history) == json.dumps(again.history)
    weights = [(s.model / "model.safetensors").read_bytes() for s in (first, again)]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_multi_scale_fusion_is_learned_at_its_own_rate(config: Build, tmp_path: Path) -> None:
    moved = {}
    for rate in (None, 0.1):
        out = str(tmp_path / str(rate))
        settings = config(method="mstm", set={"fusion": True}, learned_lr=rate, val="demo",
                          val_limit=40, layer_decay=0.5, out=out)  # fmt: skip
        run = Run(settings)
        run.schedule.step_update(0)
        (gates,) = (p for n, p in run.loaded.model.named_parameters() if n.endswith("gates"))
        (group,) = (g for g in run.optimizer.param_groups if any(p is gates for p in g["params"]))
        assert len(group["params"]) == 7
        assert (group["lr"], group["weight_decay"]) == (pytest.approx(rate or settings.lr), 0)
        summary = fit(settings)
        model = mergence.load(summary.model)
        (gates,) = (p for n, p in model.named_parameters() if n.endswith("gates"))
        moved[rate] = float(gates.detach().abs().mean())
    assert 0 < 10 * moved[None] < moved[0.1]
    loaded = load_model(f"local-dir:{summary.model}")
    images = open_images("demo", transform=loaded.transform, mode="L", limit=40)
    fused = {"fused": mergence.recipe_of(model)}
    found = mergence.evaluate(model, loader(images, batch_size=64), fused)
    last = summary.history[-1]
    assert last["dense top1"] == pytest.approx(found.results[0].top1)
    assert last["mstm 0.67 top1"] == pytest.approx(found.results[1].top1)
    assert last["mstm 0.67 agreement"] == pytest.approx(found.results[1].agreement)


@pytest.mark.parametrize("learned_lr", [0.1, 0.0])
def test_the_rate_that_is_written_down_is_lr(
    config: Build, tmp_path: Path, learned_lr: float
) -> None:
    fit(config(**FUSION, epochs=1, limit=16, learned_lr=learned_lr, layer_decay=0.5, log_every=1))
    assert [float(row["lr"]) for row in rows(tmp_path / "run" / "steps.csv")] == [2e-3]


def test_a_second_run_goes_on_with_what_the_first_has_learned(config: Build) -> None:
    first = fit(config(**FUSION, epochs=1, limit=16, learned_lr=0.1)).model
    learned = load_file(first / "mergence.safetensors")
    starts = {"model": f"local-dir:{first}"}, {"checkpoint": str(first / "model.safetensors")}
    for start in starts:
        run = Run(config(**FUSION, **start, ema=0.9))
        for model in (run.loaded.model, run.ema.module):
            assert all(torch.equal(model.state_dict()[name], learned[name]) for name in learned)
    with pytest.warns(UserWarning, match=r"mergence\.safetensors' does not fit .* is left out"):
        Run(config(**starts[0]))


@pytest.mark.slow
def test_a_model_of_transformers_is_trained(config: Build, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    size = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "num_labels": 4}
    shape = {"image_size": 32, "patch_size": 8, "intermediate_size": 48}
    made = transformers.ViTForImageClassification(transformers.ViTConfig(**size, **shape))
    made.save_pretrained(tmp_path / "hf")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(
        tmp_path / "hf"
    )
    fields = {"data": "synthetic:8", "val": "synthetic:4", "limit": None, "distill": 1.0}
    settings = config(model=f"hf:{tmp_path / 'hf'}", consistency=1.0, **fields)
    summary = fit(settings)
    assert summary.history[-1]["loss"] < 3
    trained = mergence.load(summary.model)
    assert type(trained).__name__ == "ViTForImageClassification"
    assert mergence.recipe_of(trained) == make("mergence", macs=0.67, align=1)
    assert load_model(f"hf:{summary.model}").input_size == (3, 32, 32)  # by its image processor
    with pytest.raises(OptionError, match=r"scratch starts from random weights.*timm's models"):
        build.open_model(config(model=settings.model, scratch=True))
    with pytest.raises(OptionError, match="only timm's models tell"):
        fit(config(model=settings.model, layer_decay=0.7, out=str(tmp_path / "2"), **fields))


@pytest.mark.slow
def test_each_budget_has_its_recipe_beside_the_model(config: Build) -> None:
    summary = fit(config(macs=[0.8, 0.5], epochs=1))
    shares = [
        mergence.Recipe.load(summary.model / name).schedule.macs  # type: ignore[attr-defined]
        for name in ("mergence.json", "mergence-0.5.json")
    ]
    assert shares == [0.8, 0.5]


def test_fp16_without_a_gpu_is_refused(config: Build) -> None:
    with pytest.raises(OptionError, match=r"fp16 needs a GPU.*Take bf16 or no"):
        Run(config(precision="fp16"))


@pytest.mark.slow
def test_an_error_that_leaves_a_run_lets_the_process_end(tmp_path: Path) -> None:
    script = f"""
from mergence.train import Config, fit
def report(step):
    raise KeyError("mine")
run = dict(model="demo", data="synthetic:16", val="synthetic:8", out={str(tmp_path / "o")!r})
fit(Config(macs=(0.67,), batch_size=4, epochs=1, workers=1, device="cpu", **run), report=report)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=120)
    assert done.returncode == 1
    assert b"KeyError: 'mine'" in done.stderr


def test_what_was_learned_is_kept_for_libraries_without_a_folder(
    fresh: Any, tmp_path: Path
) -> None:
    model = mergence.apply(fresh("torchvision-vit"), "mstm", keep_rate=0.7, fusion=True)
    learned = {n: torch.randn_like(p) for n, p in model.state_dict().items() if ".mergence." in n}
    model.load_state_dict(learned, strict=False)
    save_model(tmp_path, model, [], {"mstm": mergence.recipe_of(model)})
    start = Config(
        model="torchvision:vit_b_16", data="demo", checkpoint=str(tmp_path / WEIGHTS), out="o"
    )
    again = mergence.apply(fresh("torchvision-vit"), tmp_path / "mergence.json")
    build.load_learned(start, again)
    assert learned
    assert all(torch.equal(again.state_dict()[name], value) for name, value in learned.items())
