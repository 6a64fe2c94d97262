"""What tests of every folder share."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import settings
from torch import Tensor

from mergence.plan import TokenView

# Derandomised: a red run can be repeated, and a green one stays green on another machine.
settings.register_profile("mergence", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("mergence")

if not torch.cuda.is_available():
    # Triton reads this when it is first imported. Nothing else of the suite uses Triton on a CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; a thread pool in each of them would only wait for the others.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def view() -> Callable[..., TokenView]:
    """Builds what a method sees, `[N, C]` lists or `[B, N, C]` tensors alike."""

    def build(
        x: Any,
        *,
        importance: Any = None,
        keys: Any = None,
        received: Any = None,
        size: Any = None,
        block: int = 1,
    ) -> TokenView:
        def batched(value: Any, ndim: int) -> Tensor:
            tensor = torch.as_tensor(value, dtype=torch.float32)
            return tensor if tensor.ndim == ndim else tensor.unsqueeze(0)

        x = batched(x, 3)
        return TokenView(
            x=x,
            size=torch.ones(x.shape[:2]) if size is None else batched(size, 2),
            block=block,
            depth=12,
            _importance=None if importance is None else batched(importance, 2),
            _keys=None if keys is None else batched(keys, 3),
            _received=None if received is None else batched(received, 2),
        )

    return build
