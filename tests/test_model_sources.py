"""Models of transformers, torchvision and open_clip by name, offline."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from PIL import Image
from torch import Tensor, nn

import mergence
from mergence.errors import CheckpointError, UnknownNameError, UnsupportedModelError
from mergence.families._common import randomised
from mergence.families._transformers_tiny import tiny_configuration
from mergence.families.transformers import FAMILY
from mergence.models import LoadedModel, load_model
from mergence.outputs import answer

PICTURE = Image.effect_mandelbrot((120, 90), (-2, -1.5, 1, 1.5), 50).convert("RGB")


def saved(model: Any, folder: Path, processor: str = "ViTImageProcessor") -> Path:
    model.save_pretrained(folder)
    size = {"height": 96, "width": 96}
    getattr(transformers, processor)(size=size, image_mean=[0.4] * 3).save_pretrained(folder)
    return folder


@torch.no_grad()
def run(loaded: LoadedModel) -> Tensor:
    """What a loaded model says to the picture; its transform travels to a loader's processes."""
    transform = pickle.loads(pickle.dumps(loaded.transform))
    pixels = transform(PICTURE)
    assert pixels.shape == loaded.input_size
    return answer(loaded.model(pixels.unsqueeze(0)))


def test_a_folder_of_transformers(tmp_path: Path) -> None:
    model: Any = FAMILY.tiny()["dinov2"]()
    model.config.id2label = {i: f"animal {i}" for i in range(5)}
    folder = saved(model, tmp_path)
    loaded = load_model(f"hf:{folder}")
    assert (loaded.mode, loaded.input_size) == ("RGB", (3, 96, 96))
    assert loaded.label_names == tuple(f"animal {i}" for i in range(5))
    assert (loaded.label(3), loaded.mean) == ("animal 3", (0.4,) * 3)
    processor = transformers.AutoImageProcessor.from_pretrained(folder)
    with torch.no_grad():
        expected = model(processor(PICTURE, return_tensors="pt").pixel_values).logits
    # Not exact: weights read from a file lie elsewhere in memory, which may choose another kernel.
    torch.testing.assert_close(run(loaded), expected)
    mergence.apply(loaded.model, keep_rate=0.6)
    assert not torch.allclose(run(loaded), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("cls", "tower"),
    [
        ("CLIPModel", "CLIPVisionModelWithProjection"),
        ("SiglipModel", "SiglipVisionModel"),
        ("MetaClip2Model", "MetaClip2VisionModelWithProjection"),
        ("ChineseCLIPModel", "ChineseCLIPVisionModel"),
    ],
)
def test_a_checkpoint_of_image_and_text_gives_its_image_tower(
    cls: str, tower: str, tmp_path: Path
) -> None:
    config = tiny_configuration(cls.replace("Model", "Config"))
    model = randomised(getattr(transformers, cls)(config)).eval()
    loaded = load_model(f"hf:{saved(model, tmp_path)}")
    assert type(loaded.model).__name__ == tower
    pixels = loaded.transform(PICTURE).unsqueeze(0)
    with torch.no_grad():
        expected = answer(model.get_image_features(pixels))
    found = run(loaded)
    if tower == "ChineseCLIPVisionModel":
        found = model.visual_projection(found)
    torch.testing.assert_close(found, expected)


def test_a_tower_projects_to_as_many_as_the_whole_says(tmp_path: Path) -> None:
    config: Any = tiny_configuration("CLIPConfig")
    config.projection_dim = 40
    folder = saved(randomised(transformers.CLIPModel(config)).eval(), tmp_path)
    assert run(load_model(f"hf:{folder}")).shape == (1, 40)


def test_weights_of_transformers_from_another_file(tmp_path: Path) -> None:
    folder = saved(FAMILY.tiny()["vit"](), tmp_path / "one")
    other: Any = FAMILY.tiny()["vit"]()
    nn.init.normal_(other.classifier.weight)
    other.save_pretrained(tmp_path / "two")
    loaded = load_model(f"hf:{folder}", checkpoint=tmp_path / "two" / "model.safetensors")
    assert torch.equal(loaded.model.classifier.weight, other.classifier.weight)
    assert loaded.label_names is None  # LABEL_0, LABEL_1, ... say nothing
    torch.save({"something": torch.ones(1)}, tmp_path / "wrong.pth")
    with pytest.raises(CheckpointError, match=r"wrong\.pth' holds no weights for \d+ parameters"):
        load_model(f"hf:{folder}", checkpoint=tmp_path / "wrong.pth")


def test_what_transformers_cannot_give_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The variable of the same name is read once, when the hub is imported.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"'hf:nobody/nothing' cannot be had.*save_pretr"):
        load_model("hf:nobody/nothing")
    folder = saved(FAMILY.tiny()["vit"](), tmp_path)
    (folder / "preprocessor_config.json").unlink()  # as in a folder of mergence.save
    with pytest.raises(CheckpointError, match=r"no image processor.*\.save_pretrained\("):
        load_model(f"hf:{folder}")
    saved(FAMILY.tiny()["vit"](), tmp_path)
    (folder / "model.safetensors").write_bytes(b"garbage")
    with pytest.raises(CheckpointError, match="cannot be had"):
        load_model(f"hf:{folder}")
    FAMILY.tiny()["vit_pooler"]().save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"architectures": ["ViTForImageClassification"]})
    )
    with pytest.raises(CheckpointError, match=r"no weights for 2 parameters of ViTForImage.*stay"):
        load_model(f"hf:{folder}")
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertModel"]}))
    with pytest.raises(UnsupportedModelError, match=r"saved from the class BertModel\. Known"):
        load_model(f"hf:{folder}")
    FAMILY.tiny()["videomae"]().save_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match=r"VideoMAEFor.*takes video;.*mergence\.apply"):
        load_model(f"hf:{folder}")
    config["architectures"] = ["Siglip2ForImageClassification"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedModelError, match=r"more than images of one.*mergence\.apply"):
        load_model(f"hf:{folder}")
    for cls in ("OwlViTForObjectDetection", "Blip2ForImageTextRetrieval"):
        config = tiny_configuration(f"{cls.partition('For')[0]}Config")
        saved(getattr(transformers, cls)(config), folder)
        with pytest.raises(UnsupportedModelError, match=rf"{cls}, which takes image and text;"):
            load_model(f"hf:{folder}")
    transformers.VitPoseImageProcessor().save_pretrained(folder)
    config = {"backbone_config": FAMILY.tiny()["vitpose_backbone"]().config}
    pose = transformers.VitPoseForPoseEstimation(transformers.VitPoseConfig(**config))
    pose.save_pretrained(folder)
    with pytest.raises(UnsupportedModelError, match=r"VitPoseImageProcessor.*boxes.*mergence\.ap"):
        load_model(f"hf:{folder}")


@pytest.fixture
def tiny_vit_b_16(monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """vit_b_16 with three narrow blocks."""
    from torchvision.models import VisionTransformer, vision_transformer

    def build(**options: Any) -> nn.Module:
        sizes = {"num_layers": 3, "num_heads": 3, "hidden_dim": 48, "mlp_dim": 96}
        return VisionTransformer(options["image_size"], 16, **sizes)

    monkeypatch.setattr(
        vision_transformer,
        "_vision_transformer",
        lambda weights, progress, **options: (
            build(image_size=options.get("image_size", 224))
            if weights is None
            else (_ for _ in ()).throw(ConnectionError("no network\nsecond line"))
        ),
    )
    return randomised(build(image_size=384))


def test_torchvision_by_name(tiny_vit_b_16: nn.Module, tmp_path: Path) -> None:
    torch.save(tiny_vit_b_16.state_dict(), tmp_path / "weights.pth")
    spec = "torchvision:vit_b_16.IMAGENET1K_SWAG_E2E_V1"
    loaded = load_model(spec, checkpoint=tmp_path / "weights.pth")
    assert (loaded.mode, loaded.input_size) == ("RGB", (3, 384, 384))
    assert loaded.label_names is not None
    assert (len(loaded.label_names), loaded.label(0)) == (1000, "tench")
    assert loaded.mean == (0.485, 0.456, 0.406)
    with torch.no_grad():
        expected = tiny_vit_b_16.eval()(loaded.transform(PICTURE).unsqueeze(0))
    assert torch.equal(run(loaded), expected)
    with pytest.raises(CheckpointError, match=r"torchvision:vit_b_16.*no network.*--checkpoint F"):
        load_model("torchvision:vit_b_16")


@pytest.fixture
def tiny_open_clip(tmp_path: Path) -> str:
    """The name of a tiny open_clip architecture."""
    import open_clip

    vision = {"image_size": 96, "patch_size": 16, "width": 48, "layers": 3, "head_width": 16}
    text = {"width": 24, "heads": 3, "layers": 1, "vocab_size": 64, "context_length": 8}
    file = tmp_path / "mergence-test-tiny.json"
    file.write_text(json.dumps({"embed_dim": 24, "vision_cfg": vision, "text_cfg": text}))
    open_clip.add_model_config(file)
    return file.stem


def test_open_clip_by_name(
    tiny_open_clip: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import open_clip

    model = randomised(open_clip.create_model(tiny_open_clip)).eval()
    torch.save({"state_dict": model.state_dict(), "epoch": 1}, tmp_path / "weights.pt")
    caplog.clear()
    loaded = load_model(f"open_clip:{tiny_open_clip}", checkpoint=tmp_path / "weights.pt")
    assert "initialized randomly" not in caplog.text
    assert (loaded.mode, loaded.input_size) == ("RGB", (3, 96, 96))
    pixels = loaded.transform(PICTURE).unsqueeze(0)
    assert loaded.pixels(pixels).min() >= 0
    with torch.no_grad():
        expected = model.encode_image(pixels, normalize=True)
    assert torch.equal(run(loaded), expected)
    with pytest.raises(UnknownNameError, match=r"weights, or none.*it has none; or pass a file"):
        load_model(f"open_clip:{tiny_open_clip}")


def test_a_file_beside_the_name_of_open_clips_weights_stands_for_them(
    tiny_open_clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import open_clip
    from open_clip import pretrained

    trained = {"quick_gelu": True, "mean": (0.5,) * 3, "std": (0.25,) * 3, "resize_mode": "squash"}
    monkeypatch.setitem(pretrained._PRETRAINED, tiny_open_clip, {"openai": trained})
    model = randomised(open_clip.create_model(tiny_open_clip, force_quick_gelu=True)).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    name = f"open_clip:{tiny_open_clip}/openai"
    loaded = load_model(name, checkpoint=tmp_path / "weights.pt")
    assert (loaded.mean, loaded.std) == ((0.5,) * 3, (0.25,) * 3)
    assert loaded.transform(PICTURE).shape == (3, 96, 96)
    assert open_clip.get_model_preprocess_cfg(loaded.model)["resize_mode"] == "squash"
    with torch.no_grad():
        expected = model.encode_image(loaded.transform(PICTURE).unsqueeze(0), normalize=True)
    assert torch.equal(run(loaded), expected)
    with pytest.raises(UnknownNameError, match=r"no weights 'opnai'.*/openai"):
        load_model(f"open_clip:{tiny_open_clip}/opnai", checkpoint=tmp_path / "weights.pt")


def test_open_clip_weights_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import open_clip

    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network\nsecond line")

    monkeypatch.setattr(open_clip, "create_model_and_transforms", offline)
    with pytest.raises(CheckpointError, match=r"ViT-B-32/openai' cannot.*no network --?|no netw"):
        load_model("open_clip:ViT-B-32/openai")


@pytest.mark.parametrize("kind", ["vit", "siglip", "dinov2_backbone"])
def test_the_commands_take_models_of_transformers(kind: str, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from mergence.cli import app

    def mergence_(*arguments: object) -> Any:
        return CliRunner().invoke(app, list(map(str, arguments)))

    spec = f"hf:{saved(FAMILY.tiny()[kind](), tmp_path / 'model')}"
    for i in range(5):
        folder = tmp_path / "val" / f"class {i}"
        folder.mkdir(parents=True)
        PICTURE.rotate(60 * i).save(folder / "picture.png")
    how, out = ("--keep-rate", 0.6), tmp_path / "out"
    evaluated = mergence_("eval", spec, "--data", tmp_path / "val", *how, "--json", out)
    assert evaluated.exit_code == 0, evaluated.output
    dense, reduced = json.loads(out.read_text())["results"]
    if kind == "vit":
        assert dense["agreement"] == 100
        assert reduced["kl"] > 0
    else:
        assert "1 − cos" in evaluated.output
        assert abs(dense["cosine"]) < 1e-6 < reduced["cosine"]
    benched = mergence_("bench", spec, *how, "--seconds", "0", "--batch-size", "2", "--json", out)
    assert benched.exit_code == 0, benched.output
    assert [row["name"] for row in json.loads(out.read_text())["rows"]] == ["dense", "mergence"]
    picture = tmp_path / "picture.png"
    drawn = mergence_("visualize", spec, folder / "picture.png", *how, "--out", picture)
    assert drawn.exit_code == 0, drawn.output
    assert picture.stat().st_size > 10_000
    calibrated = mergence_(
        *("calibrate", spec, "--data", tmp_path / "val", "--macs", 0.8, "--points", 2),
        *("--images", 4, "--out", tmp_path / "recipe.json", "--no-tune", "--trials", 2),
    )
    assert calibrated.exit_code == 0, calibrated.output
    assert mergence.Recipe.load(tmp_path / "recipe.json").notes
