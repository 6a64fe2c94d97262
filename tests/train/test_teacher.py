"""A teacher from elsewhere: it is asked about the same images and classes, or refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from mergence.errors import MergenceError, OptionError
from mergence.models import DEMO_MODEL, load_model
from mergence.train import Config, fit
from mergence.train.levels import Choice
from mergence.train.run import Run
from mergence.train.validation import Examiner

Build = Callable[..., Config]


@pytest.fixture
def resnet(tmp_path: Path) -> Callable[..., str]:
    """Writes a random network of another kind for the embedded images, normalised otherwise."""

    def write(label_names: list[str] | None = None, **pretrained_cfg: Any) -> str:
        import timm

        config = json.loads((DEMO_MODEL / "config.json").read_text())
        config |= {"architecture": "resnet10t", "model_args": {"in_chans": 1}, "global_pool": "avg"}
        if label_names:
            config |= {"label_names": label_names, "num_classes": len(label_names)}
        config["pretrained_cfg"] |= {"first_conv": "conv1.0", "classifier": "fc"}
        config["pretrained_cfg"]["fixed_input_size"] = False
        config["pretrained_cfg"] |= {"mean": [0.5], "std": [0.25]} | pretrained_cfg
        folder = tmp_path / "teacher"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        model = timm.create_model(f"local-dir:{folder}")
        save_file(model.state_dict(), folder / "model.safetensors")
        return f"local-dir:{folder}"

    return write


def test_it_sees_the_images_as_it_was_trained_to_see_them(
    config: Build, resnet: Callable[..., str]
) -> None:
    teacher = resnet()
    run = Run(config(teacher=teacher, distill=1.0, label_loss=0.0))
    model, objective = run.model.eval(), run.objective
    pixels = torch.rand(3, 1, 28, 28)
    student = load_model(config().model)
    x = (pixels - student.mean[0]) / student.std[0]
    soft = F.one_hot(torch.arange(3), 10).float()
    found = objective(model, x, soft, Choice("mergence 0.67", 1.0))
    wanted = load_model(teacher).model((pixels - 0.5) / 0.25).log_softmax(1)
    given = model(x).log_softmax(1)
    kl = F.kl_div(given, wanted, log_target=True, reduction="none").sum(1)
    assert torch.allclose(found, kl, atol=1e-5)
    found.sum().backward()
    assert not any(p.requires_grad for p in objective.teacher.parameters())


def test_it_is_asked_about_each_validation_image_once(config: Build) -> None:
    run = Run(config(distill=1.0, val="demo", val_limit=100))
    asked: list[int] = []
    run.objective.teacher.register_forward_pre_hook(lambda _, x: asked.append(len(x[0])))
    before = run.validate()
    assert sum(asked) == 100
    with torch.no_grad():  # the model moves, and is compared with what its teacher said
        for parameter in run.model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    after = run.validate()
    assert sum(asked) == 100
    assert before["dense"].kl < 1e-6 < after["dense"].kl
    asked.clear()
    run.examiner = Examiner(run.objective.teacher)
    assert run.validate() == after
    assert sum(asked) == 100


def test_an_examiner_asks_again_where_other_images_come() -> None:
    teacher, asked = nn.Linear(2, 3), list[int]()
    teacher.register_forward_pre_hook(lambda _, x: asked.append(len(x[0])))
    examiner, x = Examiner(teacher), torch.randn(2, 2)
    first = examiner.known(0, ["a", "b"], x)
    assert torch.equal(examiner.known(0, ["a", "b"], x), first)
    assert asked == [2]
    # One of them could not be read this time.
    assert examiner.known(0, ["a"], x[:1]).shape == (1, 3)
    assert examiner.known(1, ["c", "d"], x).shape == (2, 3)
    assert asked == [2, 1, 2]
    # Room for three numbers, and the second image has none.
    small = Examiner(teacher, room=3)
    for _ in range(2):
        for number in range(2):
            small.known(number, ["a"], x[:1])
    assert asked == [2, 1, 2, 1, 1, 1]


def test_a_run_from_other_weights_learns_from_the_model_that_it_names(
    config: Build, resnet: Callable[..., str], tmp_path: Path
) -> None:
    settings = {"teacher": resnet(), "distill": 1.0, "epochs": 1, "val": "demo", "val_limit": 10}
    before, after = fit(config(**settings, scratch=True)).history
    # The dense path is compared with it too, which the model as it was before does not allow.
    assert 0 < after["dense kl"] < before["dense kl"]


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "size": ({"input_size": [1, 32, 32]}, {}, "images of 1x32x32 and the model of 1x28x28"),
    "classes": ({"label_names": ["a", "b"]}, {}, "knows 2 classes, and the model 10"),
    "order": ({"label_names": list("abcdefghij")}, {}, "A class is 'a' to the teacher"),
    "width": ({}, {"consistency": 1.0}, "has 512 numbers and the model's 32"),
    "two teachers": ({}, {"dense_loss": 1.0}, "Leave out one of them"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_one_that_does_not_fit_is_refused(
    config: Build, resnet: Callable[..., str], tmp_path: Path, case: str
) -> None:
    made, fields, says = REFUSED[case]
    with pytest.raises(OptionError, match=says):
        fit(config(teacher=resnet(**made), distill=1.0, **fields))
    assert not (tmp_path / "run").exists()


def test_a_word_that_is_none_of_them_is_refused(config: Build) -> None:
    with pytest.raises(MergenceError, match="slef"):
        fit(config(teacher="slef", distill=1.0))
