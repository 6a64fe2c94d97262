"""Scores from attention against the whole attention map."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mergence.importance import attention_from, attention_received

Q, K = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
SIZES = torch.tensor([[1, 1, 2, 5, 1, 1, 3], [1, 9, 1, 1, 1, 2, 1]])


def attention_map(bias: Tensor | None) -> Tensor:
    """`[B, N, N]`, mean over heads."""
    logits = 0.5 * Q @ K.transpose(2, 3)
    return (logits if bias is None else logits + bias).softmax(dim=3).mean(dim=1)


@pytest.mark.parametrize("bias", [None, SIZES.log()[:, None, None, :]], ids=["plain", "sizes"])
def test_scores_are_rows_and_column_means_of_the_attention_map(bias: Tensor | None) -> None:
    expected = attention_map(bias)
    torch.testing.assert_close(attention_from(Q[:, :, :1], K, 0.5, bias), expected[:, 0])
    torch.testing.assert_close(attention_received(Q, K, 0.5, bias), expected.mean(dim=1))


def test_each_image_gives_away_all_its_attention() -> None:
    torch.testing.assert_close(attention_received(Q, K, 0.5).sum(dim=1), torch.ones(2))


def test_scores_of_half_precision_are_float32() -> None:
    assert attention_received(Q.bfloat16(), K.bfloat16(), 0.5).dtype == torch.float32
