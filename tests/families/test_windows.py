"""Attention within windows against attention to all tokens under a mask."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mergence.families._windows import Windows

PLACES = 4


@st.composite
def layouts(draw: st.DrawFn) -> tuple[list[int], list[list[int]]]:
    """Where windows end, and the places of as many tokens in each of two images, in any order."""
    sizes = draw(st.lists(st.integers(1, PLACES), min_size=2, max_size=5))
    ends = [sum(sizes[: index + 1]) for index in range(len(sizes))]
    tokens = draw(st.integers(1, ends[-1]))
    return ends, [draw(st.permutations(range(ends[-1])))[:tokens] for _ in range(2)]


def of(layout: tuple[list[int], list[list[int]]]) -> tuple[Windows, Tensor]:
    """The windows, and which tokens are in one: `[B, n, n]`."""
    ends, positions = layout
    home = torch.tensor([[sum(end <= p for end in ends) for p in each] for each in positions])
    windows = Windows.of(torch.tensor(positions), torch.tensor(ends, dtype=torch.int32), PLACES)
    return windows, home.unsqueeze(1) == home.unsqueeze(2)


@given(layout=layouts())
def test_tokens_are_in_the_window_of_their_place_and_come_back(
    layout: tuple[list[int], list[list[int]]],
) -> None:
    windows, _ = of(layout)
    ends, positions = layout
    x = torch.randn(2, len(positions[0]), 3)
    inside = windows.spread(x)
    assert inside.shape == (2 * len(ends), PLACES, 3)
    for row, each in zip(inside.unflatten(0, (2, -1)), zip(x, positions, strict=True), strict=True):
        for number, found in enumerate(row.tolist()):
            first = ends[number - 1] if number else 0
            tokens = [t for t, p in zip(*each, strict=True) if first <= p < ends[number]]
            expected = [t.tolist() for t in tokens] + [[0.0] * 3] * (PLACES - len(tokens))
            assert found == expected
    assert torch.equal(windows.collect(inside), x)


@given(layout=layouts(), sized=st.booleans())
def test_attention_within_windows_is_attention_under_a_mask(
    layout: tuple[list[int], list[list[int]]], sized: bool
) -> None:
    windows, together = of(layout)
    tokens = together.shape[1]
    q, k, v = (torch.randn(2, tokens, 8, requires_grad=True) for _ in "qkv")
    sizes = torch.rand(2, 1, 1, tokens) if sized else None
    bias = torch.where(together, 0.0, -torch.inf).unsqueeze(1)
    expected = scaled_dot_product_attention(
        *(x.unsqueeze(1) for x in (q, k, v)), attn_mask=bias if sizes is None else bias + sizes
    ).squeeze(1)
    inside = [windows.spread(x).unsqueeze(1) for x in (q, k, v)]
    found = scaled_dot_product_attention(*inside, attn_mask=windows.bias(sizes, q))
    found = windows.collect(found.squeeze(1))
    torch.testing.assert_close(found, expected)
    weight = torch.randn(found.shape)
    for one, other in zip(
        torch.autograd.grad(found, (q, k, v), weight),
        torch.autograd.grad(expected, (q, k, v), weight),
        strict=True,
    ):
        torch.testing.assert_close(one, other)  # windows without tokens give none
