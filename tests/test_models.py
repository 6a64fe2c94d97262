"""Model specs and weights: what loads, and what the errors say."""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from mergence.data import loader, open_images
from mergence.errors import CheckpointError, UnknownNameError, UnsupportedModelError
from mergence.models import DEMO_MODEL, load_model

TINY = "test_vit"  # timm's own test model: a 160 x 160 ViT of 0.4 M parameters
Change = Callable[[Path], object]


@pytest.fixture
def hub_folder(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))


def configure(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.slow
def test_the_demo_model_classifies_the_demo_images() -> None:
    demo = load_model("demo")
    assert (demo.mode, demo.input_size, demo.model.training) == ("L", (1, 28, 28), False)
    assert {p.dtype for p in demo.model.parameters()} == {torch.float32}
    data = open_images(
        "demo", transform=demo.transform, mode=demo.mode, class_names=demo.label_names, limit=100
    )
    right = 0
    with torch.inference_mode():
        for batch in loader(data, batch_size=25):
            right += int((demo.model(batch.images).argmax(-1) == batch.labels).sum())
    assert right > 85


def test_random_weights_need_no_network() -> None:
    loaded = load_model(f"timm-random:{TINY}")
    assert (loaded.mode, loaded.input_size) == ("RGB", (3, 160, 160))
    assert loaded.label_names is not None
    assert loaded.label_names[0] == "n01440764"  # 1,000 classes: the folders of ImageNet


def test_pretrained_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(CheckpointError, match=f"no network.*--checkpoint F.*timm-random:{TINY}"):
        load_model(f"timm:{TINY}")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_checkpoint_replaces_the_download(tmp_path: Path, suffix: str) -> None:
    state = timm.create_model(TINY).state_dict()
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"model": state, "epoch": 3}, file)
    else:
        save_file({key: value.half() for key, value in state.items()}, file)
    model = load_model(f"timm:{TINY}", checkpoint=file).model
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, state[key], atol=1e-3, rtol=1e-3)
        assert value.dtype == torch.float32


def test_a_local_folder_with_pytorch_weights(hub_folder: Path) -> None:
    state = load_file(hub_folder / "model.safetensors")
    (hub_folder / "model.safetensors").unlink()
    torch.save(state, hub_folder / "pytorch_model.bin")
    model = load_model(f"local-dir:{hub_folder}").model
    assert torch.equal(model.state_dict()["head.bias"], state["head.bias"].float())


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("timm:deit_smal_patch16_224", "Did you mean deit_small_patch16_224"),
        ("timm:vit_tiny", r"Did you mean vit_tiny_\w+ or "),
        ("timm:a/b", "no model called 'a/b'"),
        ("timm:vit_base_patch16_224.nope", "no weights 'nope'.*augreg"),
        ("timm:", "'timm:NAME'"),
        ("tim:resnet18", "Did you mean 'timm:resnet18'"),
        ("vit_tiny_patch16_224", "use 'timm:vit_tiny_patch16_224'"),
        ("dmo", "Did you mean 'demo'"),
        ("s3:bucket", "'s3' is no model source.*timm:NAME"),
        ("s3:bucket", "'s3' is no.*hf:NAME_OR_PATH.*torchvision:NAME.*open_clip:NAME/WEIGHTS"),
        ("torchvision:vit_b_61", "Did you mean vit_b_16"),
        ("torchvision:vit_b_16.V9", "no weights 'V9' for 'vit_b_16'.*IMAGENET1K_V1"),
        ("torchvision:", "'torchvision:NAME'"),
        ("open_clip:ViT-B-23", "Did you mean ViT-B-"),
        ("open_clip:ViT-B-32", "Name some of its own: open_clip:ViT-B-32/openai"),
        ("open_clip:ViT-B-32/none", "no weights 'none' for 'ViT-B-32'"),
        (str(DEMO_MODEL), f"use 'local-dir:{DEMO_MODEL}'"),
    ],
)
def test_an_unknown_name_comes_with_the_fix(spec: str, message: str) -> None:
    with pytest.raises(UnknownNameError, match=message):
        load_model(spec)


def test_a_folder_of_the_other_library_is_sent_there(hub_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=f"a model of timm. Use 'local-dir:{hub_folder}'"):
        load_model(f"hf:{hub_folder}")
    # A model of timm that transformers wraps names both.
    (tmp_path / "config.json").write_text(
        '{"architectures": ["ViTModel"], "architecture": "vit", "model_type": "vit"}'
    )
    with pytest.raises(CheckpointError, match=f"a model of transformers. Use 'hf:{tmp_path}'"):
        load_model(f"local-dir:{tmp_path}")
    with pytest.raises(UnknownNameError, match=f"use 'hf:{tmp_path}'"):
        load_model(str(tmp_path))


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:100_000])


BROKEN: list[tuple[Change, str]] = [
    (truncate, "model.safetensors' cannot be read as weights.*SafetensorError"),
    (lambda f: (f / "model.safetensors").unlink(), "missing: there is no file '.*safetensors'"),
    (lambda f: (f / "config.json").unlink(), "has no config.json"),
    (lambda f: (f / "config.json").write_text("{"), "describes no model.*JSONDecodeError"),
    (lambda f: (f / "config.json").write_text("[1]"), "describes no model"),
    (lambda f: configure(f, model_args={"embed_dim": 25, "num_heads": 2}), "describes no model"),
    (lambda f: configure(f, architecture="vit_none"), "describes no model.*vit_none"),
    (lambda f: configure(f, model_args={"depht": 3}), "describes no model.*depht"),
    (lambda f: configure(f, label_names=["a"]), "1 label_names for 10 classes"),
    (lambda f: configure(f, num_classes=7), r"2 of another shape \(head.bias \[10\] instead of"),
]


@pytest.mark.parametrize(("change", "message"), BROKEN)
def test_a_broken_local_folder_is_explained(hub_folder: Path, change: Change, message: str) -> None:
    change(hub_folder)
    with pytest.raises(CheckpointError, match=message):
        load_model(f"local-dir:{hub_folder}")


def test_a_checkpoint_for_another_model_names_the_keys(tmp_path: Path) -> None:
    state = timm.create_model(TINY, num_classes=5).state_dict()
    state["extra"] = state.pop("norm.bias")
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(CheckpointError) as raised:
        load_model(f"timm:{TINY}", checkpoint=tmp_path / "other.pth")
    message = str(raised.value)
    assert "1 missing (norm.bias); 1 unexpected (extra); 2 of another shape" in message
    assert "head.weight [5, 64] instead of [1000, 64]" in message


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_the_arguments_that_training_scripts_save_beside_the_weights_are_no_code(
    key: str, tmp_path: Path
) -> None:
    """timm's train.py and DeiT's main.py."""
    state = timm.create_model(TINY).state_dict()
    content = {key: state, "args": argparse.Namespace(lr=1e-3, output=None), "epoch": 3}
    torch.save(content, tmp_path / "last.pth.tar")
    model = load_model(f"timm:{TINY}", checkpoint=tmp_path / "last.pth.tar").model
    assert torch.equal(model.state_dict()["norm.bias"], state["norm.bias"])
    with torch.serialization.safe_globals([argparse.Namespace]):  # somebody else's leave to read it
        load_model(f"timm:{TINY}", checkpoint=tmp_path / "last.pth.tar")
        assert torch.load(tmp_path / "last.pth.tar")["epoch"] == 3


def test_what_a_checkpoint_holds_beside_tensors_is_named(tmp_path: Path) -> None:
    file = tmp_path / "run.pth"
    content = {"model": {}, "args": argparse.Namespace(output=PurePosixPath("a"))}
    for legacy, says in ((False, "it holds pathlib.PurePosixPath"), (True, "damaged, or holds")):
        torch.save(content, file, _use_new_zipfile_serialization=not legacy)
        with pytest.raises(CheckpointError) as raised:
            load_model(f"timm:{TINY}", checkpoint=file)
        message = str(raised.value)
        assert says in message
        assert "torch.save(model.state_dict(), F)" in message
        assert message.isprintable()


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(1, 1), tmp_path / "pickled.pth")
    (tmp_path / "garbage.pth").write_bytes(b"garbage")
    for name in ("pickled.pth", "garbage.pth"):
        with pytest.raises(CheckpointError, match=f"{name}' cannot be read as weights"):
            load_model(f"timm:{TINY}", checkpoint=tmp_path / name)


def test_other_channel_counts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model(TINY, in_chans=4)
    model.pretrained_cfg["input_size"] = (4, 160, 160)
    model.pretrained_cfg["mean"] = model.pretrained_cfg["std"] = (0.5,) * 4
    monkeypatch.setattr(timm, "create_model", lambda *args, **kwargs: model)
    with pytest.raises(UnsupportedModelError, match="images of 4 channels"):
        load_model(f"timm-random:{TINY}")


def test_a_class_is_called_by_its_description_where_there_is_one() -> None:
    loaded = load_model("demo")
    assert loaded.label(1) == "Trouser"
    loaded.model.pretrained_cfg["label_descriptions"] = {"Trouser": "trousers, pants"}
    assert loaded.label(1) == "trousers"
    assert loaded.label(2) == "Pullover"
    assert replace(loaded, label_names=None).label(1) == "class 1"
