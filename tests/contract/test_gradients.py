"""Training a reduced model: every parameter learns, with and without checkpointing."""

from __future__ import annotations

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


def test_checkpointing_gives_the_same_gradients(
    reduced: nn.Module, image: Tensor, inputs: Any
) -> None:
    switch: Any = getattr(reduced, "set_grad_checkpointing", None)
    if hasattr(reduced, "gradient_checkpointing_enable"):  # the default of transformers 5
        switch = partial(reduced.gradient_checkpointing_enable, {"use_reentrant": False})
    if switch is None:
        pytest.skip("the library of this model has no gradient checkpointing")
    expected = gradients(reduced, image)
    switch()
    reduced.train()  # without dropout the same numbers; some libraries checkpoint only in training
    y = answer(reduced(image))
    with torch.no_grad():
        reduced(inputs(1))  # another forward before blocks are run again
    reduced.zero_grad()
    loss(y).backward()
    for name, parameter in reduced.named_parameters():
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
