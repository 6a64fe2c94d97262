"""What accelerate does to a model that trains, as transformers' Trainer does it, and undoes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import mergence


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    # There is one state for a process, which another test may have left behind.
    AcceleratorState._reset_state(reset_partial_state=True)
    yield Accelerator(cpu=True, mixed_precision="bf16")
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_model_that_was_unwrapped_answers_as_before_and_can_be_removed(
    accelerator: Accelerator, dense: nn.Module, image: Tensor, output: Any
) -> None:
    before = output(dense, image)
    mergence.apply(dense, "tome", schedule=[30, 30, 20, 20, 10, 10])
    reduced = output(dense, image)
    prepared = accelerator.prepare(dense)
    plain = accelerator.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(output(plain, image), reduced)
    mergence.remove(plain)
    assert torch.equal(output(plain, image), before)
