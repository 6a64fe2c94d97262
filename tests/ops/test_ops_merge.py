"""Both merge operators against a double loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergence.ops import cpu, dense, merge
from mergence.plan import DROPPED, MergePlan

Merge = Callable[..., tuple[Tensor, Tensor]]
IMPLEMENTATIONS = {"dense": dense.merge, "cpu": cpu.merge}


both = pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


def naive(x: Tensor, size: Tensor, plan: MergePlan) -> tuple[Tensor, Tensor]:
    """The definition, token by token, in float64."""
    batch, tokens, channels = x.shape
    total = torch.zeros(batch, plan.slots, dtype=torch.float64)
    merged = torch.zeros(batch, plan.slots, channels, dtype=torch.float64)
    merged_size = torch.zeros(batch, plan.slots)
    longest = torch.zeros(batch, plan.slots, dtype=torch.float64)
    for b in range(batch):
        for n in range(tokens):
            slot = int(plan.slot[b, n])
            if slot != DROPPED:
                total[b, slot] += plan.weight[b, n].double()
                merged[b, slot] += plan.weight[b, n].double() * x[b, n].double()
                merged_size[b, slot] += size[b, n]
                if plan.weight[b, n] > 0:
                    longest[b, slot] = max(longest[b, slot], x[b, n].double().norm())
        for slot in range(plan.slots):
            if total[b, slot] > 0:
                merged[b, slot] /= total[b, slot]
            if plan.keep_norm and merged[b, slot].any():
                merged[b, slot] *= longest[b, slot] / merged[b, slot].norm()
    return merged, merged_size


@st.composite
def cases(draw: st.DrawFn) -> tuple[Tensor, Tensor, MergePlan]:
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    slots, channels = draw(st.integers(1, tokens)), draw(st.integers(1, 4))

    def table(elements: st.SearchStrategy[Any]) -> Tensor:
        rows = st.lists(elements, min_size=tokens, max_size=tokens)
        return torch.tensor(draw(st.lists(rows, min_size=batch, max_size=batch)))

    weight = table(st.sampled_from([0.0, 1.0, 2.0, 3.5, 1e-12, 1e-3, 196.0]))
    size = table(st.integers(1, 50)).float()
    slot = table(st.integers(DROPPED, slots - 1))
    seed = draw(st.integers(0, 2**16))
    x = torch.randn(batch, tokens, channels, generator=torch.Generator().manual_seed(seed))
    return x, size, MergePlan(slot, weight, slots, keep_norm=draw(st.booleans()))


@both
@given(case=cases())
def test_the_merge_agrees_with_a_double_loop(
    implementation: Merge, case: tuple[Tensor, Tensor, MergePlan]
) -> None:
    x, size, plan = case
    merged, merged_size = implementation(x, size, plan)
    expected, expected_size = naive(x, size, plan)
    assert merged.shape == expected.shape
    assert merged.dtype == x.dtype
    # The mean of up to nine float32 numbers of size one. Where they nearly cancel, scaling the mean
    # to the longest of them scales its rounding, too.
    rtol, atol = (1e-4, 1e-4) if plan.keep_norm else (1e-5, 2e-6)
    torch.testing.assert_close(merged.double(), expected, rtol=rtol, atol=atol)
    assert torch.equal(merged_size, expected_size)


@pytest.mark.parametrize("keep_norm", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_a_token_alone_in_its_slot_passes_unchanged(dtype: torch.dtype, keep_norm: bool) -> None:
    x = torch.randn(2, 6, 8).to(dtype)
    slot = torch.tensor([[0, 1, 2, 3, 3, -1], [0, 0, 0, 1, 2, 3]])
    weight = torch.tensor([0.3, 7.0, 1e-12, 1.0, 3.0, 1.0]).expand(2, 6)
    merged, _ = merge(x, torch.ones(2, 6), MergePlan(slot, weight, 4, keep_norm))
    assert merged.dtype == dtype
    assert torch.equal(merged[0, :3], x[0, :3])
    assert torch.equal(merged[1, 1:], x[1, 3:])


@both
def test_equal_tokens_merge_to_themselves_up_to_rounding(implementation: Merge) -> None:
    x = torch.randn(1, 1, 8).expand(1, 7, 8)
    merged, size = implementation(
        x, torch.ones(1, 7), MergePlan(torch.zeros(1, 7, dtype=torch.long), torch.rand(1, 7), 1)
    )
    torch.testing.assert_close(merged, x[:, :1], rtol=1e-6, atol=0)
    assert size.tolist() == [[7.0]]


@both
def test_a_slot_without_tokens_or_without_weight_yields_zeros(implementation: Merge) -> None:
    slot = torch.tensor([[-1, -1, 2, 2]])
    weight = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    merged, size = implementation(
        torch.randn(1, 4, 3), torch.ones(1, 4), MergePlan(slot, weight, 3)
    )
    assert not merged.any()
    assert size.tolist() == [[0.0, 0.0, 2.0]]


@both
def test_all_tokens_in_one_slot_make_the_weighted_mean(implementation: Merge) -> None:
    x = torch.tensor([[[1.0, 10.0], [3.0, 20.0], [5.0, 60.0]]])
    plan = MergePlan(torch.zeros(1, 3, dtype=torch.long), torch.tensor([[1.0, 1.0, 2.0]]), 1)
    merged, size = implementation(x, torch.tensor([[1.0, 4.0, 2.0]]), plan)
    assert merged.tolist() == [[[3.5, 37.5]]]
    assert size.tolist() == [[7.0]]


@both
def test_keeping_the_norm_scales_the_mean_to_the_longest_token(implementation: Merge) -> None:
    # Means (0, 3), (3, 4) / 2 and 0: length 3 -> 5, 2.5 -> 4, and nothing to scale.
    x = torch.tensor([[[4.0, 3.0], [-4.0, 3.0], [3.0, 0.0], [0.0, 4.0], [1.0, 1.0], [-1.0, -1.0]]])
    plan = MergePlan(torch.tensor([[0, 0, 1, 1, 2, 2]]), torch.ones(1, 6), 3, keep_norm=True)
    merged, size = implementation(x, torch.ones(1, 6), plan)
    expected = torch.tensor([[[0.0, 5.0], [2.4, 3.2], [0.0, 0.0]]])
    torch.testing.assert_close(merged, expected)
    assert size.tolist() == [[2.0, 2.0, 2.0]]


@both
def test_only_tokens_with_weight_set_the_norm(implementation: Merge) -> None:
    x, slot = torch.tensor([[[3.0], [100.0], [1.0]]]), torch.zeros(1, 3, dtype=torch.long)
    plan = MergePlan(slot, torch.tensor([[1.0, 0.0, 1.0]]), 1, keep_norm=True)
    assert implementation(x, torch.ones(1, 3), plan)[0].item() == 3.0


@both
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_prefix_tokens_pass_unchanged_in_front(implementation: Merge, dtype: torch.dtype) -> None:
    x, size = torch.randn(2, 9, 5).to(dtype), torch.rand(2, 6)
    slot = torch.tensor([[-1, 0, 1, 1, 2, 2], [2, 2, 2, 1, 0, -1]])
    for keep_norm in (False, True):
        plan = MergePlan(slot, torch.rand(2, 6), 3, keep_norm)
        merged, merged_size = implementation(x, size, plan, 3)
        expected, expected_size = implementation(x[:, 3:], size, plan)
        assert torch.equal(merged[:, :3], x[:, :3])
        torch.testing.assert_close(merged[:, 3:], expected)
        torch.testing.assert_close(merged_size, expected_size)


PLAN = MergePlan(torch.tensor([[0, 2, 0, 1, -1], [1, 1, 2, 0, 0]]), torch.rand(2, 5) + 0.5, 3)


def test_gradients_reach_the_tokens() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: merge(x, torch.ones(2, 5), PLAN)[0], x)


def test_gradients_that_keep_the_norm_are_exact_and_have_gradients() -> None:
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    plan = MergePlan(PLAN.slot, PLAN.weight, 3, keep_norm=True)
    assert torch.autograd.gradcheck(lambda x: merge(x, torch.ones(2, 5), plan)[0], x)
    assert torch.autograd.gradgradcheck(lambda x: merge(x, torch.ones(2, 5), plan)[0], x)


def test_gradients_are_finite_where_there_is_no_norm_to_keep() -> None:
    x = torch.tensor([[[1.0], [-1.0], [0.0], [0.0]]], requires_grad=True)
    plan = MergePlan(torch.tensor([[0, 0, 1, 1]]), torch.ones(1, 4), 2, keep_norm=True)
    merge(x, torch.ones(1, 4), plan)[0].sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


def test_gradients_reach_the_weights() -> None:
    # By the formula, since weights are float32 by design and gradcheck needs float64.
    x, weight = torch.randn(2, 5, 3), PLAN.weight.clone().requires_grad_()
    merged, _ = merge(x, torch.ones(2, 5), MergePlan(PLAN.slot, weight, 3))
    merged.sum().backward()
    for b in range(2):
        for n, slot in enumerate(PLAN.slot[b].tolist()):
            total = weight[b][PLAN.slot[b] == slot].sum().item()
            expected = 0.0 if slot < 0 else ((x[b, n] - merged[b, slot]).sum() / total).item()
            assert weight.grad is not None
            assert weight.grad[b, n].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@both
@pytest.mark.parametrize("keep_norm", [False, True])
def test_in_half_precision_the_merge_is_as_exact_as_the_tokens(
    implementation: Merge, keep_norm: bool
) -> None:
    x = torch.randn(4, 60, 64, generator=torch.Generator().manual_seed(0))
    slot = torch.arange(60).expand(4, 60) % 25 - 1
    plan = MergePlan(slot, torch.rand(4, 60) + 0.1, 24, keep_norm)
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        expected, _ = naive(half, torch.ones(4, 60), plan)
        merged, _ = implementation(half, torch.ones(4, 60), plan)
        error = (merged.double() - expected).norm(dim=2) / expected.norm(dim=2)
        assert error.max() < 1e-2


def test_the_merge_for_training_and_the_one_for_inference_agree() -> None:
    x = torch.randn(2, 5, 3)
    for keep_norm in (False, True):
        plan = MergePlan(PLAN.slot, PLAN.weight, 3, keep_norm)
        trained = cpu.merge(x.clone().requires_grad_(), torch.ones(2, 5), plan)
        for one, other in zip(trained, cpu.merge(x, torch.ones(2, 5), plan), strict=True):
            torch.testing.assert_close(one, other)
