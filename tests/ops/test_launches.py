"""How kernels are launched: on which device, with which grid, and over how much memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from mergence.ops import fused
from mergence.plan import MergePlan

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


def test_tokens_may_lie_far_apart(place: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    apart = 2**30 + 16  # numbers, as in a large batch with tokens first in memory
    try:
        memory = torch.empty(2 * apart + 48, dtype=torch.float16, device=place)
    except RuntimeError:
        pytest.skip("there are no 4 GiB to address; on a CPU next to nothing of them is touched")
    if place.type == "cpu":
        # The interpreter would copy all of it onto itself.
        executor = import_module("triton.runtime.interpreter").GridExecutor
        monkeypatch.setattr(executor, "_restore_args_dev", lambda *_: None)
    far = memory.as_strided((1, 3, 48), (48, apart, 1))
    near = far.copy_(torch.randn(1, 3, 48)).contiguous()
    q, k = (x.unflatten(2, (3, 16)).transpose(1, 2) for x in (far, near))
    assert q.stride(2) == apart
    ones, bias = torch.ones(1, 3, device=place), torch.zeros(1, 1, 1, 3, device=place)
    plan = MergePlan(torch.tensor([[0, 1, 1]], device=place), ones, 2)
    assert torch.equal(fused.merge(far, ones, plan)[0], fused.merge(near, ones, plan)[0])
    nothing = MergePlan(plan.slot[:, :0], ones[:, :0], 0)
    assert torch.equal(fused.merge(far, ones[:, :0], nothing, 3)[0], near)
    y = fused.attend(q, q, q, bias, 0.0)
    assert torch.equal(y, fused.attend(k, k, k, bias, 0.0))
    row = fused.attention_of_row(q[:, :, :1], q, 0.25, None)
    assert torch.equal(row, fused.attention_of_row(k[:, :, :1], k, 0.25, None))


def test_answers_are_float32_whatever_is_torchs_default(place: torch.device) -> None:
    x = torch.rand(1, 9, 16, device=place)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        cosine = fused.Cosines(x).to_nearest_above(x[:, :, 0])
        row = fused.attention_of_row(x[:, None, :1], x[:, None], 0.25, None)
    finally:
        torch.set_default_dtype(before)
    assert (cosine.dtype, row.dtype) == (torch.float32, torch.float32)
