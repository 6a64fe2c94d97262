"""How kernels are launched: on which device, with which grid, and over how much memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

KERNELS = {
    "attention": ("_attend", "_attention_of_row"),
    "cosines": ("_scales", "_nearest_above", "_nearest"),
    "merging": ("_merge",),
    "splitting": ("_split",),
}


@pytest.fixture
def launches(
    monkeypatch: pytest.MonkeyPatch, place: torch.device
) -> list[tuple[tuple[int, ...], bool]]:
    """All kernels are launched: their grids, and whether on the device of what they read."""
    current: list[Tensor] = []
    found: list[tuple[tuple[int, ...], bool]] = []

    @contextmanager
    def device_of(x: Tensor) -> Iterator[None]:
        current.append(x)
        yield
        current.pop()

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            def launch(x: Tensor, *arguments: Any, **options: Any) -> None:
                found.append((grid, bool(current) and current[-1] is x))

            return launch

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module, names in KERNELS.items():
        for name in names:
            monkeypatch.setattr(import_module(f"mergence.ops.kernels.{module}"), name, Kernel())
    kernels = import_module("mergence.ops.kernels")
    x, size = torch.rand(3, 100, 16, device=place), torch.rand(3, 99, device=place)
    q = torch.rand(3, 2, 100, 16, device=place)
    bias, slot = q[:, :1, :1, :1].expand(3, 1, 1, 100), size.long()
    kernels.attend(q, q, q, bias)
    kernels.attention_of_row(q[:, :, :1], q, bias, 0.25)
    kernels.nearest_above(x, kernels.scales(x), x[:, :, 0])
    kernels.nearest(x, x[:, :, 0], slot[:, :70], slot)
    kernels.merge(x, size, slot, size, 30, 1, True)
    kernels.split(size, 30)
    return found


def test_kernels_run_on_the_device_of_what_they_read(launches: Any) -> None:
    # Triton launches on the current device, whatever tensors it is given.
    assert [on_its_device for _, on_its_device in launches] == [True] * 7


def test_grids_have_one_axis(launches: Any) -> None:
    # CUDA takes no more than 65535 programs along another.
    blocks_of_100, heads, batch = 2, 2, 3
    assert [grid for grid, _ in launches] == [
        (blocks_of_100 * batch * heads,),
        (heads * batch,),
        (13 * batch,),
        (blocks_of_100 * batch,),
        (2 * batch,),
        (31 * batch,),
        (batch,),
    ]
