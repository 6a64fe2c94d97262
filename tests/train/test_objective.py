"""Learning from the dense model, whatever the teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mergence
from mergence.distances import kl_divergence
from mergence.errors import OptionError, UnsupportedModelError
from mergence.models import load_model
from mergence.train import Config, fit
from mergence.train.build import recipes_of
from mergence.train.levels import Choice, Reducer
from mergence.train.objective import Objective
from mergence.train.run import Run
from mergence.train.teacher import teacher_of

Build = Callable[..., Config]
FULL = Choice("mergence 0.67", 1.0)


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(6, 1, 28, 28), F.one_hot(torch.arange(6) % 10, 10).float()


def made(config: Config) -> tuple[nn.Module, Objective]:
    student = load_model(config.model)
    reducer = Reducer(student.model, recipes_of(config))
    teacher = teacher_of(config, student, student.label_names or ())
    return student.model, Objective(config, student.model, reducer, teacher)


def dense_and_token(model: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The dense model's answer and the input of its classifier, by timm's own means."""
    features = model.forward_features(x)  # type: ignore[operator]
    return model(x), model.forward_head(features, pre_logits=True)  # type: ignore[operator]


def test_the_labels_alone_are_the_cross_entropy(
    config: Build, batch: tuple[Tensor, Tensor]
) -> None:
    model, objective = made(config())
    losses = objective(model, *batch, FULL)
    expected = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    assert torch.allclose(losses, expected)


@pytest.mark.parametrize("teacher", ["initial", "self"])
def test_each_part_is_what_its_source_says(
    config: Build, batch: tuple[Tensor, Tensor], teacher: str
) -> None:
    x, soft = batch
    parts: dict[str, Any] = {"distill": 2.0, "temperature": 3.0, "consistency": 5.0}
    parts["label_loss"] = 0.5
    settings = config(teacher=teacher, **parts)
    model, objective = made(settings)
    before = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in model.parameters():  # one step away from where the teacher may be
            parameter.add_(0.01 * torch.randn_like(parameter))
        model.head.bias[2] += 9  # type: ignore[union-attr, index, operator]  # one sure image
    source = mergence.remove(before if teacher == "initial" else copy.deepcopy(model)).eval()
    wanted, wanted_token = dense_and_token(source, x)
    logits, token = dense_and_token(model, x)
    sure = (soft * logits.softmax(1)).sum(1) > 0.4
    assert sure.tolist() == [False, False, True, False, False, False]
    kl = F.kl_div(
        (logits / 3).log_softmax(1), (wanted / 3).log_softmax(1), log_target=True, reduction="none"
    ).sum(1)
    expected = 0.5 * F.cross_entropy(logits, soft, reduction="none") + 2 * 9 * kl
    expected = expected + 5 * sure * (token - wanted_token).square().mean(1)
    assert torch.allclose(objective(model, x, soft, FULL), expected, rtol=1e-4, atol=1e-5)


def test_the_dense_path_learns_too_where_asked(config: Build, batch: tuple[Tensor, Tensor]) -> None:
    x, soft = batch
    model, objective = made(config(dense_loss=0.5, distill=1.0))
    losses = objective(model, x, soft, FULL)
    with mergence.disabled(model):
        dense = model(x)
    reduced = model(x)
    expected = F.cross_entropy(reduced, soft, reduction="none")
    expected = expected + 0.5 * F.cross_entropy(dense, soft, reduction="none")
    expected = expected + kl_divergence(dense.detach(), reduced)
    assert torch.allclose(losses, expected, rtol=1e-4)
    # The teacher does not move towards the reduced path: its gradient is that of the labels.
    model.zero_grad()
    losses.sum().backward()
    found = model.head.weight.grad.clone()  # type: ignore[union-attr, operator]
    model.zero_grad()
    expected.sum().backward()
    assert torch.allclose(found, model.head.weight.grad, rtol=1e-3, atol=1e-5)  # type: ignore[union-attr, arg-type]


def test_a_dense_step_is_not_taught_by_itself(config: Build, batch: tuple[Tensor, Tensor]) -> None:
    model, objective = made(config(teacher="self", distill=1.0, dense_loss=1.0))
    calls: list[int] = []
    model.register_forward_hook(lambda *_: calls.append(1))
    losses = objective(model, *batch, Choice("mergence 0.67", 0.0))
    assert len(calls) == 1
    # Its answer is that of both paths, and counts for both.
    expected = F.cross_entropy(mergence.remove(model)(batch[0]), batch[1], reduction="none")
    assert torch.equal(losses, 2 * expected)


def test_a_dense_step_learns_what_the_dense_path_learns(
    config: Build, batch: tuple[Tensor, Tensor]
) -> None:
    model, objective = made(config(label_loss=0.0, dense_loss=0.5))
    losses = objective(model, *batch, Choice("mergence 0.67", 0.0))
    expected = F.cross_entropy(mergence.remove(model)(batch[0]), batch[1], reduction="none")
    assert torch.equal(losses, 0.5 * expected)


def test_dense_epochs_without_anything_to_learn_are_refused(config: Build) -> None:
    alone: dict[str, Any] = {"teacher": "self", "distill": 1.0, "label_loss": 0.0}
    for dense in ({"reduce_epochs": "1"}, {"reduce_epochs": "none"}):
        with pytest.raises(OptionError, match=r"learns nothing in epochs without reduction"):
            Run(config(**alone, **dense))
        Run(config(**alone | {"teacher": "initial"}, **dense))
        Run(config(**alone | {"label_loss": 0.1}, **dense))
    Run(config(**alone, reduction_warmup=1.0))
    Run(config(**alone, reduce_epochs="1-2"))


def test_a_classifier_without_a_token_is_refused(config: Build) -> None:
    settings = config(consistency=1.0)
    model = load_model(settings.model).model
    model.reset_classifier(0)  # type: ignore[operator]
    with pytest.raises(UnsupportedModelError, match="consistency of the class token"):
        Objective(settings, model, Reducer(model, recipes_of(settings)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        {"distill": 0.5, "consistency": 3.0, "reduction_warmup": 1.0},
        {"teacher": "self", "distill": 1.0, "dense_loss": 1.0, "reduce_epochs": "2"},
    ],
    ids=["initial", "self"],
)
def test_a_run_with_it_goes_on_bit_for_bit(config: Build, fields: dict[str, Any]) -> None:
    class Crash(Exception):
        pass

    def crash(status: Any) -> None:
        if status.update == 6:
            raise Crash

    whole = fit(config(**fields, log_every=1))
    settings = config(**fields, out=config().out + "2", save_every=1)
    with pytest.raises(Crash):
        fit(settings, report=crash)
    again = fit(settings, resume=True)
    assert again.history == whole.history
    weights = [(s.model / "model.safetensors").read_bytes() for s in (whole, again)]
    assert weights[0] == weights[1]
    rows = (whole.model.parent / "steps.csv").read_text().splitlines()[1:]
    strengths = [float(row.split(",")[5]) for row in rows]
    assert strengths[0] == 0
    assert strengths[4:] == [1.0] * 4
