"""Whom a run learns from: the model as it was before training, itself, or another model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mergence.api import remove
from mergence.errors import OptionError
from mergence.models import LoadedModel, load_model
from mergence.outputs import answer
from mergence.train.config import Config
from mergence.train.targets import classes_of


def teacher_of(
    config: Config, student: LoadedModel, class_names: Sequence[str]
) -> nn.Module | None:
    """The fixed model that a run learns from, where its student is.

    The dense model as it was before training, as DynamicViT (arXiv 2106.02034) distils, or another
    model, as in DeiT (arXiv 2012.12877). It gets the student's images, normalised as its own are.

    Args:
        config: What the run is told.
        student: The model with the weights that training starts from, reduced or not.
        class_names: What the classes are called.

    Returns:
        The teacher, or None where the labels or the model's own dense path teach.

    Raises:
        OptionError: The teacher would not be asked, would know nothing, or nothing about these
            images or classes.
        MergenceError: It cannot be loaded.
    """
    if config.temperature != 1 and not config.distill:
        raise OptionError(
            f"temperature is {config.temperature:g}, and distill 0, whose answers it would soften. "
            "Give distill 1, or temperature 1."
        )
    asked = config.distill or config.consistency or config.dense_loss
    if not asked and config.teacher != Config.teacher:
        raise OptionError(
            f"The teacher is '{config.teacher}', and nothing asks it: distill, consistency and "
            "dense_loss are 0. Give distill 1 to learn from its answers, or teacher initial."
        )
    if not asked or config.teacher == "self":
        return None
    if config.teacher == "initial":
        if config.dense_loss:
            return None
        if config.scratch or config.new_head:
            raise OptionError(
                "The model has nothing to teach before it is trained (scratch, new_head). "
                "Learn from its own dense path: teacher self, best with dense_loss 1. "
                "Or from another model: teacher local-dir:PATH."
            )
        return _fixed(remove(copy.deepcopy(student.model)))
    if config.dense_loss:
        raise OptionError(
            f"The teacher is '{config.teacher}', and dense_loss asks for the model's own dense "
            "path to be it. Leave out one of them."
        )
    teacher = load_model(config.teacher)
    _check(teacher, student, class_names)
    if (teacher.mean, teacher.std) != (student.mean, student.std):
        teacher.model.register_forward_pre_hook(partial(_normalise, student, teacher))
    return _fixed(teacher.model).to(next(student.model.parameters()).device)


def _fixed(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


def _check(teacher: LoadedModel, student: LoadedModel, class_names: Sequence[str]) -> None:
    if teacher.input_size != student.input_size:
        sizes = ("x".join(map(str, one.input_size)) for one in (teacher, student))
        raise OptionError(
            f"The teacher '{teacher.name}' takes images of {' and the model of '.join(sizes)}. "
            "Both get the same ones: give a teacher for this size."
        )
    with torch.inference_mode():  # it may be of no known family
        known = answer(teacher.model(torch.zeros(1, *teacher.input_size))).shape[1]
    wanted = classes_of(student.model)
    if known != wanted:
        raise OptionError(
            f"The teacher '{teacher.name}' knows {known} classes, and the model {wanted}. Give a "
            "teacher that was trained for the same classes."
        )
    for own, other in zip(teacher.label_names or (), class_names, strict=False):
        if own != other:
            raise OptionError(
                f"A class is '{own}' to the teacher '{teacher.name}' and '{other}' in its place "
                "to the model. Give a teacher whose classes have the same order."
            )


def _normalise(
    student: LoadedModel, teacher: LoadedModel, model: nn.Module, inputs: tuple[Any, ...]
) -> tuple[Any, ...]:
    """Before a teacher's forward: images normalised for the student become its own."""
    images: Tensor = inputs[0]
    mean, std, own_mean, own_std = (
        images.new_tensor(values).reshape(-1, 1, 1)
        for one in (student, teacher)
        for values in (one.mean, one.std)
    )
    return ((images * std + mean - own_mean) / own_std, *inputs[1:])
