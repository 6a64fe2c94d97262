"""`mergence.restore`: each patch looks its slot up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import mergence
from mergence import family
from mergence.errors import ReducedOutputError
from mergence.method import names


@given(
    st.lists(st.lists(st.integers(-1, 3), min_size=5, max_size=5), min_size=1, max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    st.sampled_from([torch.int64, torch.int32]),
)
def test_each_patch_gets_the_value_of_its_slot_and_dropped_ones_zeros(
    source: list[list[int]], dtype: torch.dtype, index: torch.dtype
) -> None:
    tokens = torch.arange(1, len(source) * 4 * 2 + 1).reshape(len(source), 4, 2).to(dtype)
    restored = mergence.restore(tokens, torch.tensor(source, dtype=index))
    zeros = torch.zeros(2, dtype=dtype)
    for image, slots in enumerate(source):
        expected = [tokens[image, slot] if slot >= 0 else zeros for slot in slots]
        assert torch.equal(restored[image], torch.stack(expected))


def test_what_is_not_a_number_in_a_token_stays_out_of_dropped_patches() -> None:
    tokens = torch.tensor([[[float("nan")], [2.0]]])
    restored = mergence.restore(tokens, torch.tensor([[-1, 1, -1]]))
    assert restored.flatten().tolist() == [0.0, 2.0, 0.0]


def test_gradients_of_a_slot_are_summed_over_its_patches() -> None:
    tokens = torch.zeros(1, 2, 1, requires_grad=True)
    mergence.restore(tokens, torch.tensor([[0, 0, 1, -1, 0]])).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.flatten().tolist() == [3.0, 1.0]


@pytest.mark.parametrize("method", names())
@torch.no_grad()
def test_a_traced_map_restores_what_forward_features_restores(method: str) -> None:
    model: Any = family.registry()["timm"].tiny()["deit_distilled"]()
    mergence.apply(model, method, keep_rate=0.6)
    image = torch.randn(2, 3, 96, 96)
    features = model.forward_features(image)
    source = mergence.trace(model, image).points[-1].source
    full = mergence.restore(features)
    assert torch.equal(full[:, :2], features[:, :2])
    assert torch.equal(full[:, 2:], mergence.restore(features[:, 2:], source))
    with mergence.disabled(model):
        dense = model.forward_features(image)
        assert full.shape == dense.shape
        assert torch.equal(mergence.restore(dense), dense)


@pytest.mark.parametrize(
    ("tokens", "source", "message"),
    [
        ((2, 3, 4), torch.zeros(1, 5).long(), "do not belong together"),
        ((3, 4), torch.zeros(3, 5).long(), "do not belong together"),
        ((1, 3, 4), torch.zeros(5).long(), "do not belong together"),
        ((1, 3, 4), torch.zeros(1, 5), r"torch\.float32.*integers"),
        ((1, 3, 4), torch.zeros(1, 5).bool(), r"torch\.bool.*integers"),
        ((1, 3, 4), torch.tensor([[0, 3, -1]]), "names slot 3, and there are 3 tokens"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(
    tokens: tuple[int, ...], source: torch.Tensor, message: str
) -> None:
    with pytest.raises(ReducedOutputError, match=message):
        mergence.restore(torch.zeros(tokens), source)


@torch.no_grad()
def test_tokens_that_remember_nothing_are_refused() -> None:
    model: Any = family.registry()["timm"].tiny()["vit"]()
    assert isinstance(model, nn.Module)
    mergence.apply(model, keep_rate=0.6)
    features = model.forward_features(torch.randn(1, 3, 96, 96))
    with pytest.raises(ReducedOutputError, match=r"the very tensor.*or a source map"):
        mergence.restore(features.clone())
