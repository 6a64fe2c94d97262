"""The merge kernel against the CPU operator; see conftest for where it runs."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from torch import Tensor

from mergence.ops import cpu, dense, fused
from mergence.plan import DROPPED, MergePlan

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def relative(value: Tensor, expected: Tensor) -> float:
    """The largest error of a token, relative to its norm."""
    error = (value.double() - expected.double()).norm(dim=2)
    return float((error / expected.double().norm(dim=2).clamp(min=1e-12)).max())


def tokens(shape: tuple[int, int, int], dtype: torch.dtype, place: torch.device) -> Tensor:
    return torch.randn(shape).to(dtype).to(place)


def random_plan(
    batch: int, count: int, slots: int, place: torch.device, *, keep_norm: bool
) -> MergePlan:
    """Most slots hold a few tokens, some none, and some tokens are dropped."""
    slot = torch.randint(DROPPED, slots, (batch, count))
    weight = torch.rand(batch, count) + 0.1
    return MergePlan(slot.to(place), weight.to(place), slots, keep_norm)


# batch, prefix, tokens, channels, slots
SHAPES = [(1, 0, 2, 128, 1), (2, 5, 15, 200, 9), (1, 1, 20, 1664, 3)]
LARGE = [(1, 1, 1369, 384, 20), (1, 0, 1500, 1024, 1)]
KINDS = pytest.mark.parametrize(
    ("dtype", "keep_norm"),
    [(torch.float32, False), (torch.float32, True), (torch.bfloat16, True), (torch.float16, False)],
    ids=str,
)


def check(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, place: torch.device, keep_norm: bool
) -> None:
    batch, prefix, count, channels, slots = shape
    x = tokens((batch, prefix + count, channels), dtype, place)
    size = torch.randint(1, 9, (batch, count)).float().to(place)
    plan = random_plan(batch, count, slots, place, keep_norm=keep_norm)
    merged, merged_size = fused.merge(x, size, plan, prefix)
    expected, expected_size = cpu.merge(x, size, plan, prefix)
    assert merged.dtype == dtype
    assert merged.shape == expected.shape
    assert torch.equal(merged[:, :prefix], x[:, :prefix])
    assert torch.equal(merged_size, expected_size)
    assert relative(merged, expected) < TOLERANCE[dtype]


@KINDS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_agrees_with_the_eager_operator(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, place: torch.device, keep_norm: bool
) -> None:
    check(shape, dtype, place, keep_norm)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "dtype"), list(zip(LARGE, (torch.bfloat16, torch.float32), strict=True)), ids=str
)
def test_it_agrees_with_the_eager_operator_on_large_inputs(
    shape: tuple[int, int, int, int, int], dtype: torch.dtype, place: torch.device
) -> None:
    check(shape, dtype, place, keep_norm=True)


@KINDS
def test_a_token_alone_in_its_slot_passes_unchanged(
    dtype: torch.dtype, place: torch.device, keep_norm: bool
) -> None:
    x = tokens((1, 7, 130), dtype, place)
    weight = torch.tensor([[0.3, 7.0, 1e-12, 3.0, 1.0, 5.0]], device=place)
    slot = torch.tensor([[0, 1, 2, 3, 3, DROPPED]], device=place)
    merged, _ = fused.merge(x, torch.ones_like(weight), MergePlan(slot, weight, 4, keep_norm), 1)
    assert torch.equal(merged[:, :4], x[:, :4])


def test_slots_without_tokens_or_weight_yield_zeros(place: torch.device) -> None:
    slot = torch.tensor([[-1, -1, 2, 2, 3]], device=place)
    weight = torch.tensor([[1.0, 1.0, 0.0, 0.0, 1.0]], device=place)
    for keep_norm in (False, True):
        plan = MergePlan(slot, weight, 4, keep_norm)
        merged, size = fused.merge(
            tokens((1, 5, 16), torch.float32, place), torch.ones_like(weight), plan
        )
        assert not merged[:, :3].any()
        assert size.tolist() == [[0.0, 0.0, 2.0, 1.0]]


def test_equal_and_opposite_tokens_keep_the_norm_or_stay_zero(place: torch.device) -> None:
    x = torch.tensor([1.0, 1.0, 1.0, 2.0, -2.0], device=place)[None, :, None].expand(1, 5, 32)
    slot = torch.tensor([[0, 0, 0, 1, 1]], device=place)
    plan = MergePlan(slot, torch.ones(1, 5, device=place), 2, keep_norm=True)
    merged, _ = fused.merge(x, torch.ones(1, 5, device=place), plan)
    torch.testing.assert_close(merged[0, 0], x[0, 0], rtol=1e-6, atol=0)
    assert not merged[0, 1].any()


def test_it_takes_tokens_in_any_layout(place: torch.device) -> None:
    plan = random_plan(2, 10, 4, place, keep_norm=True)
    size = torch.ones(2, 10, device=place)
    x = tokens((2, 12, 24), torch.float32, place)
    for view in (x[:, 1:], x.mT.contiguous().mT[:, 1:]):
        merged, _ = fused.merge(view, size, plan, 1)
        assert relative(merged, cpu.merge(view, size, plan, 1)[0]) < 1e-5


@pytest.mark.parametrize("keep_norm", [False, True])
@pytest.mark.parametrize("other", [fused, cpu], ids=["fused", "cpu"])
def test_gradients_are_those_of_the_dense_operator(
    place: torch.device, other: ModuleType, keep_norm: bool
) -> None:
    plan = random_plan(2, 12, 5, place, keep_norm=keep_norm)
    x, towards = tokens((2, 13, 24), torch.float32, place), torch.randn(2, 6, 24, device=place)
    found = []
    for implementation in (other, dense):
        leaves = [t.clone().requires_grad_() for t in (x, torch.ones_like(plan.weight))]
        weight = plan.weight.clone().requires_grad_()
        merged, size = implementation.merge(
            *leaves, MergePlan(plan.slot, weight, plan.slots, keep_norm), 1
        )
        ((merged * towards).sum() + size.square().sum()).backward()
        found.append([leaf.grad for leaf in (*leaves, weight)])
    for value, expected in zip(*found, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("keep_norm", [False, True])
@pytest.mark.parametrize("other", [fused, cpu], ids=["fused", "cpu"])
def test_second_derivatives_are_those_of_the_dense_operator(
    place: torch.device, other: ModuleType, keep_norm: bool
) -> None:
    slot = torch.tensor([[DROPPED, 0, 1, 2, 3, 4, 4, 3, 3, 1, 0, 4]], device=place).expand(2, 12)
    towards, weight = torch.randn(2, 6, 24, device=place), torch.rand(2, 12, device=place) + 0.1
    leaves = tokens((2, 13, 24), torch.float32, place), torch.ones_like(weight), weight
    found = []
    for implementation in (other, dense):
        x, ones, weight = (t.clone().requires_grad_() for t in leaves)
        plan = MergePlan(slot, weight, 5, keep_norm)
        merged, size = implementation.merge(x, ones, plan, 1)
        energy = (merged.square() * towards).sum() + size.square().sum()
        first = torch.autograd.grad(energy, (x, ones, weight), create_graph=True)
        torch.stack([grad.square().sum() for grad in first]).sum().backward()
        found.append([x.grad, ones.grad, weight.grad])
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)


def test_a_hook_on_the_tokens_sees_their_gradient_once(place: torch.device) -> None:
    plan = random_plan(1, 6, 3, place, keep_norm=False)
    x = tokens((1, 6, 8), torch.float32, place).requires_grad_()
    seen: list[Tensor] = []
    x.register_hook(seen.append)
    merged, _ = fused.merge(x, torch.ones_like(plan.weight), plan)
    merged.sum().backward()
    assert len(seen) == 1
