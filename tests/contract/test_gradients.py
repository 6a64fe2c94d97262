"""Training a reduced model: every parameter learns, with and without checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergence
from mergence.outputs import answer


def loss(y: Tensor) -> Tensor:
    """One whose gradient is not nothing where answers are of unit length."""
    return (y.square() * torch.linspace(0.5, 1.5, y.shape[-1], dtype=y.dtype)).sum()


def gradients(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """Gradients of all parameters that get one."""
    model.zero_grad()
    loss(answer(model(image))).backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.full_product
def test_gradients_reach_every_parameter_that_they_reach_in_the_dense_model(
    dense: nn.Module, method: str, image: Tensor
) -> None:
    expected = {name for name, grad in gradients(dense, image).items() if grad.any()}
    assert expected
    mergence.apply(dense, method, keep_rate=0.7)
    found = gradients(dense, image)
    assert expected == {name for name, grad in found.items() if grad.any()}
    assert all(grad.isfinite().all() for grad in found.values())


@pytest.fixture
def checkpointing() -> Callable[[nn.Module], None]:
    """Turns it on, or skips where the library has none."""

    def on(model: nn.Module) -> None:
        switch: Any = getattr(model, "set_grad_checkpointing", None)
        if hasattr(model, "gradient_checkpointing_enable"):  # the default of transformers 5
            switch = partial(model.gradient_checkpointing_enable, {"use_reentrant": False})
        if switch is None:
            pytest.skip("the library of this model has no gradient checkpointing")
        switch()
        model.train()  # without dropout the same numbers; some checkpoint only in training

    return on


def test_checkpointing_gives_the_same_gradients(
    reduced: nn.Module, image: Tensor, inputs: Any, checkpointing: Any
) -> None:
    expected = gradients(reduced, image)
    checkpointing(reduced)
    y = answer(reduced(image))
    with torch.no_grad():
        reduced(inputs(1))  # another forward before blocks are run again
    reduced.zero_grad()
    loss(y).backward()
    for name, parameter in reduced.named_parameters():
        if name in expected:
            assert torch.equal(parameter.grad, expected[name]), name


def test_checkpointing_gives_the_dense_gradients_of_a_forward_that_was_disabled(
    dense: nn.Module, image: Tensor, checkpointing: Any
) -> None:
    expected = gradients(dense, image)
    mergence.apply(dense, keep_rate=0.7)
    checkpointing(dense)
    with mergence.disabled(dense):
        y = answer(dense(image))
    dense.zero_grad()
    loss(y).backward()
    for name, parameter in dense.named_parameters():
        if name in expected:
            assert torch.equal(parameter.grad, expected[name]), name


def test_a_learned_module_is_trained_with_the_model(dense: nn.Module, image: Tensor) -> None:
    mergence.apply(dense, "mstm", keep_rate=0.7, fusion=True)
    found = {n: g for n, g in gradients(dense, image).items() if ".mergence." in n}
    learned: dict[str, Any] = {n: p for n, p in dense.named_parameters() if ".mergence." in n}
    assert found.keys() == learned.keys()
    assert found.keys()
    # Gates start at zero and so hide the convolutions behind them until they have moved.
    assert all(g.any() == name.endswith("gates") for name, g in found.items())
