"""Nothing reduced means nothing changed, to the last bit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergence
from mergence.step import BlockStep


@pytest.mark.full_product
def test_keep_all_is_bit_identical(
    dense: nn.Module, method: str, image: Tensor, output: Any, spec: Any
) -> None:
    expected, found = output(dense, image), spec(dense)
    all_patches = [found.patches] * len(found.blocks)
    for how in ({"keep_rate": 1.0}, {"r": 0}, {"macs": 1.0}, {"schedule": all_patches}):
        mergence.apply(dense, method, **how)
        assert mergence.describe(dense).macs_ratio == 1
        assert torch.equal(output(dense, image), expected), how


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_the_restated_block_is_bit_identical_when_it_reduces_nothing(
    dense: nn.Module,
    kernel: str,
    image: Tensor,
    output: Any,
    spec: Any,
    attend: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attend(dense, kernel)
    # Without gradients nn.MultiheadAttention takes a fused kernel that sums in another order.
    monkeypatch.setattr(torch.backends.mha, "get_fastpath_enabled", lambda: False)
    expected = output(dense, image)
    mergence.apply(dense, "topk", r=1)
    restated = []

    def reduce(step: BlockStep, x: Tensor, q: Any, k: Any, *rest: Any) -> Any:
        carry = rest[1]
        restated.append(step.index)
        return x, replace(carry, size=torch.ones(x.shape[0], carry.patches))

    monkeypatch.setattr(BlockStep, "slots", lambda step, carry: carry.patches)
    monkeypatch.setattr(BlockStep, "reduce", reduce)
    # Sizes of one are given on: heads that pool by size sum in another order than the library's.
    torch.testing.assert_close(output(dense, image), expected, rtol=1e-5, atol=1e-6)
    monkeypatch.setattr(BlockStep, "reduce", lambda step, x, q, k, scale, carry, *rest: (x, carry))
    assert torch.equal(output(dense, image), expected)
    assert restated == list(range(len(spec(dense).blocks)))
