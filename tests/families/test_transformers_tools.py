"""What people do with models of transformers still works when they are reduced."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import mergence
from mergence.errors import MergenceError
from mergence.families.transformers import FAMILY
from mergence.outputs import answer


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 96, 96)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit", "dinov2_reg", "clip", "siglip_classifier"])
def test_a_saved_model_loads_as_the_dense_original(
    kind: str, image: Tensor, tmp_path: Path
) -> None:
    model: Any = FAMILY.tiny()[kind]()
    cls, expected = type(model), answer(model(image))
    mergence.apply(model, macs=0.67)
    reduced = answer(model(image))
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [cls.__name__]
    loaded, info = cls.from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is cls
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(answer(loaded(image)), expected)
    assert torch.equal(answer(mergence.apply(loaded, macs=0.67)(image)), reduced)


def test_a_model_of_image_and_text_is_refused_with_its_tower(image: Tensor, tmp_path: Path) -> None:
    size = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 3}
    config = transformers.CLIPConfig(
        vision_config=size | {"image_size": 96, "patch_size": 16, "intermediate_size": 96},
        text_config=size | {"vocab_size": 64, "intermediate_size": 96},
    )
    model = mergence.apply(transformers.CLIPModel(config).eval(), macs=0.67)
    with pytest.raises(MergenceError, match=r"CLIPModel takes input_ids .*Give model\.vision_mod"):
        mergence.trace(model, image)
    batches, recipes = [image], {"a": mergence.recipe_of(model)}
    for call in (
        lambda: mergence.evaluate(model, batches, recipes),
        lambda: mergence.calibrate(model, batches, budgets=[0.67]),
        lambda: mergence.bench(model, recipes, input_size=(3, 96, 96)),
        lambda: mergence.export(model, tmp_path / "m.pt2", image),
    ):
        with pytest.raises(MergenceError, match=r"CLIPModel takes input_ids before images.*Give"):
            call()
    assert len(mergence.trace(model.vision_model, image).points) > 1


def test_forward_keeps_its_signature() -> None:
    for kind, build in FAMILY.tiny().items():
        model = build()
        before = inspect.signature(model.forward), inspect.signature(type(model).forward)
        mergence.apply(model, macs=0.67)
        after = inspect.signature(model.forward), inspect.signature(type(model).forward)
        assert after == before, kind


@torch.no_grad()
def test_the_image_classification_pipeline_takes_a_reduced_model() -> None:
    from PIL import Image

    model: Any = FAMILY.tiny()["vit"]()
    processor = transformers.ViTImageProcessor(size={"height": 96, "width": 96})
    classify = transformers.pipeline(
        "image-classification",
        model=mergence.apply(model, keep_rate=0.6),
        image_processor=processor,
    )
    picture = Image.new("RGB", (120, 90), "teal")
    found = {row["label"]: row["score"] for row in classify(picture, top_k=5)}
    pixels = processor(picture, return_tensors="pt").pixel_values
    expected = model(pixels).logits.softmax(dim=1)[0]
    assert found == pytest.approx(
        {f"LABEL_{i}": p for i, p in enumerate(expected.tolist())}, rel=1e-5
    )
    with mergence.disabled(model):
        assert not torch.equal(model(pixels).logits.softmax(dim=1)[0], expected)


@pytest.mark.parametrize("kind", ["vit", "siglip_classifier"])
def test_trainer_trains_and_evaluates_a_reduced_model(kind: str, tmp_path: Path) -> None:
    model: Any = mergence.apply(FAMILY.tiny()[kind](), keep_rate=0.6)
    rows = [
        # Trainer drops what forward does not name; it must still see the names.
        {"pixel_values": torch.randn(3, 96, 96), "labels": i % 5, "caption": "dropped"}
        for i in range(8)
    ]
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        learning_rate=1e-3,
        save_strategy="steps",
        save_steps=2,
        disable_tqdm=True,
    )
    before = {name: p.clone() for name, p in model.named_parameters()}
    trainer = transformers.Trainer(
        model=model, args=arguments, train_dataset=rows, eval_dataset=rows
    )
    trainer.train()
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("classifier" in name for name in changed)
    assert any(".0." in name for name in changed)
    found = trainer.evaluate()
    assert found["eval_loss"] > 0
    mergence.remove(model)
    assert trainer.evaluate()["eval_loss"] != found["eval_loss"]
    loaded = type(model).from_pretrained(tmp_path / "checkpoint-2")
    weights = loaded.state_dict()
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())
