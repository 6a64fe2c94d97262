"""Models' folders that were made to do harm, or are damaged."""

from __future__ import annotations

import builtins
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

import mergence
from mergence.errors import CheckpointError
from mergence.families.transformers import FAMILY
from mergence.methods import Mstm
from mergence.models import DEMO_MODEL, load_model


def altered(file: Path, **values: Any) -> None:
    """Change the values of a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize("part", ["config", "preprocessor_config"])
def test_a_models_own_code_is_neither_run_nor_asked_about(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(question: str = "") -> str:
        questions.append(question)
        return "y"

    questions: list[str] = []
    monkeypatch.setattr(builtins, "input", asked)
    FAMILY.tiny()["vit"]().save_pretrained(tmp_path)
    transformers.ViTImageProcessor().save_pretrained(tmp_path)
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    auto = {"config": "AutoConfig", "preprocessor_config": "AutoImageProcessor"}[part]
    altered(
        tmp_path / f"{part}.json",
        auto_map={auto: "code.Its"},
        model_type="its",
        image_processor_type="Its",
    )
    with pytest.raises(CheckpointError, match=r"contains custom code.*Code that .*is never run"):
        load_model(f"hf:{tmp_path}")
    assert not questions
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", ["[" * 100_000, f'{{"architecture": {"9" * 5000}}}'])
def test_a_description_that_is_no_json_is_named(content: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    for source in ("local-dir", "hf"):
        with pytest.raises(CheckpointError, match=r"config\.json|cannot be had"):
            load_model(f"{source}:{tmp_path}")


@pytest.mark.parametrize(
    "wrong",
    [
        {"label_names": 5},
        {"mean": "abc"},
        {"crop_pct": "x"},
        {"interpolation": "evil"},
    ],
    ids=str,
)
def test_what_a_description_says_of_images_and_cannot_be_is_named(
    wrong: dict[str, Any], tmp_path: Path
) -> None:
    shutil.copytree(DEMO_MODEL, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    told = json.loads(file.read_text())["pretrained_cfg"]
    altered(file, **wrong, pretrained_cfg=told | wrong)
    with pytest.raises(CheckpointError, match=r"model' says of its images .*config\.json"):
        load_model(f"local-dir:{tmp_path}/model")


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64], ids=str)
def test_weights_that_would_be_cast_to_another_kind_of_number_are_refused(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    model = mergence.apply(load_model("demo").model, Mstm(fusion=True), macs=0.7)
    mergence.save(model, tmp_path)
    for name, part in (("mergence", "fine.bias"), ("model", "norm.weight")):
        file = tmp_path / f"{name}.safetensors"
        good = load_file(file)
        save_file({key: value.half() for key, value in good.items()}, file)
        mergence.load(tmp_path)
        save_file(
            {
                key: value.to(dtype if key.endswith(part) else value.dtype)
                for key, value in good.items()
            },
            file,
        )
        with pytest.raises(
            CheckpointError, match=rf"{name}\.safetensors' does not fit.*{part} {dtype}"
        ):
            mergence.load(tmp_path)
        save_file(good, file)
