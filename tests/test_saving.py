"""Models that travel with their recipes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import SwiGLUPacked
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import mergence
from mergence import family
from mergence.errors import (
    CheckpointError,
    MergenceError,
    OptionError,
    RecipeError,
    UnsupportedModelError,
)
from mergence.files import staged

TINY = {"embed_dim": 24, "depth": 4, "num_heads": 2, "img_size": 64, "num_classes": 5}
FUSED = {"method": "mstm", "keep_rate": 0.6, "fusion": True}


def make(name: str = "vit_tiny_patch16_224", **options: Any) -> Any:
    model = timm.create_model(name, **TINY, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 64, 64)


def files(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("vit_tiny_patch16_224", {}),
        ("vit_tiny_patch16_224", {"global_pool": "avg", "init_values": 0.1, "qk_norm": True}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("vit_small_patch14_reg4_dinov2", {"patch_size": 16}),
        ("vit_base_patch16_siglip_224", {}),
        ("vit_tiny_patch16_224", {"in_chans": 13, "patch_size": 4}),  # no picture has as many
    ],
)
def test_a_saved_model_comes_back_reduced_and_the_original_is_as_before(
    name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    model = make(name, **options)
    image = torch.randn(2, options.get("in_chans", 3), 64, 64)
    dense = model(image)
    mergence.apply(
        model,
        mergence.Recipe.from_dict(
            mergence.recipe_of(mergence.apply(model, macs=0.7, align=2)).to_dict()
            | {"notes": {"from": "here"}}
        ),
    )
    reduced = model(image)
    mergence.save(model, tmp_path / "new")
    assert torch.equal(model(image), reduced)
    assert files(tmp_path / "new") == ["config.json", "mergence.json", "model.safetensors"]
    loaded = mergence.load(tmp_path / "new")
    assert torch.equal(loaded(image), reduced)
    assert mergence.recipe_of(loaded) == mergence.recipe_of(model)
    assert torch.equal(mergence.remove(loaded)(image), dense)


@pytest.mark.slow
@torch.no_grad()
def test_without_mergence_the_folder_is_the_dense_model(image: Tensor, tmp_path: Path) -> None:
    model = make()
    mergence.apply(model, **FUSED)
    with mergence.disabled(model):
        expected = model(image)
    mergence.save(model, tmp_path / "new")
    torch.save(image, tmp_path / "image.pt")
    code = """
import sys, timm, torch
sys.modules["mergence"] = None
folder, file = sys.argv[1:]
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
with torch.no_grad():
    torch.save(model(torch.load(file)), file)
"""
    arguments = [str(tmp_path / "new"), str(tmp_path / "image.pt")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    # Another process may have another number of threads, and so another order of summing.
    found = torch.load(tmp_path / "image.pt")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_a_method_has_learned_travels_too(image: Tensor, tmp_path: Path) -> None:
    model = mergence.apply(make(), **FUSED)
    learned = [p for n, p in model.named_parameters() if ".mergence." in n]
    assert learned
    for parameter in learned:
        parameter.copy_(torch.randn_like(parameter))
    mergence.save(model, tmp_path / "new")
    loaded = mergence.load(tmp_path / "new")
    assert torch.equal(loaded(image), model(image))
    with mergence.disabled(model):
        assert not torch.equal(loaded(image), model(image))


@torch.no_grad()
def test_saving_again_replaces_weights_and_leaves_other_files(
    image: Tensor, tmp_path: Path
) -> None:
    mergence.save(mergence.apply(make(), **FUSED), tmp_path)
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "pytorch_model.bin").write_text("old")
    (tmp_path / "model-00001-of-00002.safetensors").write_text("old")
    (tmp_path / "model.safetensors.index.json").write_text("old")
    mine = ["model_best.safetensors", "pytorch_model_run1.pt"]
    for name in mine:
        (tmp_path / name).write_text("mine")
    (tmp_path / "pytorch_model_fsdp_0").mkdir()
    other = mergence.apply(make(), "tome", macs=0.8)
    mergence.save(other, tmp_path)
    written = ["README.md", "config.json", "mergence.json", "model.safetensors"]
    assert files(tmp_path) == sorted([*written, *mine, "pytorch_model_fsdp_0"])
    assert torch.equal(mergence.load(tmp_path)(image), other(image))


def test_a_save_that_fails_changes_nothing(
    image: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mergence.apply(make(), macs=0.7)
    mergence.save(model, tmp_path / "old")
    before = {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    with torch.no_grad():
        expected = model(image)
    monkeypatch.setattr(mergence.Recipe, "to_json", full)
    for folder in ("old", "new"):
        said = rf"{folder}' cannot be written: No space left on device\. Nothing was changed"
        with pytest.raises(OptionError, match=said):
            mergence.save(model, tmp_path / folder)
    after = {file.name: file.read_bytes() for file in (tmp_path / "old").iterdir()}
    assert after == before
    assert files(tmp_path) == ["old"]
    with torch.no_grad():
        assert torch.equal(model(image), expected)


def test_files_appear_together_and_the_last_one_last(tmp_path: Path) -> None:
    seen = []
    with staged(tmp_path, last="a") as temporary:
        for name in ("a", "b"):
            (temporary / name).write_text(name)
            seen.append(files(tmp_path))
    assert seen == [[temporary.name]] * 2
    assert files(tmp_path) == ["a", "b"]
    times = [(tmp_path / name).stat().st_ctime_ns for name in ("b", "a")]
    assert times == sorted(times)


def test_what_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    model = make()
    with pytest.raises(MergenceError, match="not reduced"):
        mergence.save(model, tmp_path / "x")
    mergence.apply(model, macs=0.7)
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match="is a file"):
        mergence.save(model, tmp_path / "file")
    with pytest.raises(OptionError, match="There is no folder"):
        mergence.save(model, tmp_path / "missing" / "x")
    model.blocks[0].mlp.fc1 = nn.Linear(24, 50)
    model.blocks[0].mlp.fc2 = nn.Linear(50, 24)
    with pytest.raises(UnsupportedModelError, match="another model"):
        mergence.save(model, tmp_path / "x")
    del model.pretrained_cfg
    with pytest.raises(UnsupportedModelError, match=r"no folder layout.*recipe_of"):
        mergence.save(model, tmp_path / "x")
    assert files(tmp_path) == ["file"]


@torch.no_grad()
def test_a_model_that_takes_a_class_as_an_argument_is_made_again_in_code(
    image: Tensor, tmp_path: Path
) -> None:
    model = mergence.apply(make(mlp_layer=SwiGLUPacked), **FUSED)
    with pytest.raises(UnsupportedModelError, match=r"'mlp_layer' .*make the model in code again"):
        mergence.save(model, tmp_path / "new")
    # What the message says.
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    mergence.recipe_of(model).save(tmp_path / "recipe.json")
    again = mergence.apply(make(mlp_layer=SwiGLUPacked), tmp_path / "recipe.json")
    again.load_state_dict(torch.load(tmp_path / "weights.pt"))
    assert torch.equal(again(image), model(image))


def test_what_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    mergence.save(mergence.apply(make(), **FUSED), tmp_path / "good")

    def broken(name: str, content: str | None) -> Path:
        folder = tmp_path / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(tmp_path / "good", folder)
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content)
        return folder

    for name, content, kind, message in [
        ("mergence.json", None, RecipeError, r"no mergence\.json.*mergence\.apply"),
        ("mergence.json", "{", RecipeError, "not valid JSON"),
        ("config.json", None, CheckpointError, r"config\.json' cannot be read"),
        ("config.json", "[" * 100_000, CheckpointError, r"config\.json' cannot be read"),
        ("config.json", f'{{"a": {"9" * 5000}}}', CheckpointError, r"config\.json' cannot be read"),
        ("config.json", "{}", CheckpointError, "names no model of timm.*or transformers"),
        ("config.json", "[1]", CheckpointError, "names no model of timm.*or transformers"),
        ("config.json", '{"architectures": 5}', CheckpointError, "names no model.*found 5"),
        ("config.json", '{"architectures": ["utils"]}', CheckpointError, "found 'utils'"),
        ("config.json", '{"architectures": ["AutoModel"]}', CheckpointError, "found 'AutoModel'"),
        ("model.safetensors", None, CheckpointError, "missing"),
        ("model.safetensors", "rubbish", CheckpointError, "cannot be read as weights"),
        ("mergence.safetensors", None, CheckpointError, "learned cannot be read"),
        ("mergence.safetensors", "rubbish", CheckpointError, "learned cannot be read"),
    ]:
        with pytest.raises(kind, match=message):
            mergence.load(broken(name, content))
    save_file({"blocks.9.mergence.x": torch.zeros(3)}, tmp_path / "good" / "mergence.safetensors")
    with pytest.raises(CheckpointError, match=r"does not fit.*blocks\.9\.mergence\.x"):
        mergence.load(tmp_path / "good")
    with pytest.raises(RecipeError, match=r"no mergence\.json"):
        mergence.load(tmp_path / "nowhere")


@pytest.mark.skipif(
    "transformers" not in family.registry(), reason="this version has no family for transformers"
)
@torch.no_grad()
def test_transformers_models_keep_their_own_layout(tmp_path: Path) -> None:
    import transformers

    config = transformers.ViTConfig(
        hidden_size=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
        image_size=64,
        num_labels=5,
    )
    model = transformers.ViTForImageClassification(config).eval()
    image = torch.randn(2, 3, 64, 64)
    dense = model(image).logits
    mergence.apply(model, macs=0.7)
    mergence.save(model, tmp_path / "new")
    names = files(tmp_path / "new")
    assert names == ["config.json", "mergence.json", "model.safetensors"]
    assert json.loads((tmp_path / "new" / "config.json").read_text())["model_type"] == "vit"
    assert torch.equal(mergence.load(tmp_path / "new")(image).logits, model(image).logits)
    plain = transformers.ViTForImageClassification.from_pretrained(tmp_path / "new").eval()
    assert torch.equal(plain(image).logits, dense)
    weights = load_file(tmp_path / "new" / "model.safetensors")
    del weights["classifier.weight"]
    save_file(weights, tmp_path / "new" / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"no weights for 1 .*classifier\.weight"):
        mergence.load(tmp_path / "new")
    for options in ({"add_pooling_layer": False}, {"use_mask_token": True}):
        tower = transformers.ViTModel(config, **options).eval()
        mergence.save(mergence.apply(tower, macs=0.7), tmp_path / "new")
        again = mergence.load(tmp_path / "new")
        assert again.state_dict().keys() == tower.state_dict().keys()
        assert torch.equal(again(image).last_hidden_state, tower(image).last_hidden_state)
    parametrizations.weight_norm(model.vit.layers[1].mlp.fc1)
    with pytest.raises(UnsupportedModelError, match=r"original0 is \[48, 1\] in it"):
        mergence.save(model, tmp_path / "other")
    assert files(tmp_path) == ["new"]


def test_a_class_of_ones_own_that_cannot_be_built_without_numbers_is_saved(tmp_path: Path) -> None:
    import transformers

    class Own(transformers.ViTForImageClassification):
        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.rates = torch.linspace(0, 0.1, 4).tolist()

    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=4, num_attention_heads=2, image_size=64
    )
    mergence.save(mergence.apply(Own(config), macs=0.7), tmp_path / "new")
    assert files(tmp_path / "new") == ["config.json", "mergence.json", "model.safetensors"]
