"""The nearest tokens, by every implementation as by a readable one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mergence.ops import cpu, dense, fused
from mergence.planning import Partition, keep_highest

FAST = pytest.mark.parametrize("implementation", [dense, cpu, fused], ids=["dense", "cpu", "fused"])
SHAPES = [(3, 2, 128), (2, 33, 200), (1, 20, 1664), (1, 130, 128), (2, 300, 64)]
CLOSE = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""A unit in the last place of a cosine: sums in another order may round differently."""


class Readable:
    """The definition."""

    def __init__(self, x: Tensor) -> None:
        metric = torch.nn.functional.normalize(x, dim=2).float()
        self.matrix = (metric @ metric.transpose(1, 2)).to(x.dtype).float()

    def to_nearest_above(self, score: Tensor) -> Tensor:
        score = torch.where(score.isnan(), -torch.inf, score)
        own, other = score.unsqueeze(2), score.unsqueeze(1)
        position = torch.arange(score.shape[1], device=score.device)
        above = (other > own) | ((other == own) & (position < position.unsqueeze(1)))
        return torch.where(above, self.matrix, -1.0).amax(dim=2).clamp(-1, 1)

    def nearest(self, of: Tensor, among: Tensor) -> Tensor:
        images = zip(self.matrix, of, among, strict=True)
        return torch.stack([m[i][:, j].argmax(dim=1) for m, i, j in images])


def exact(shape: tuple[int, int, int], kinds: int, place: torch.device) -> Tensor:
    """Tokens of a few kinds, whose cosines are computed without rounding in any order of sums.

    Each has sixteen elements of 1 or -1 and zeros elsewhere, so its norm is 4.
    """
    batch, tokens, channels = shape
    table = torch.zeros(batch, kinds, channels)
    table[:, :, :16] = torch.randint(0, 2, (batch, kinds, 16)) * 2.0 - 1
    kind = torch.randint(0, kinds, (batch, tokens, 1))
    return table.gather(1, kind.expand(-1, -1, channels)).to(place)


def agree(
    implementation: object, x: Tensor, score: Tensor, *, close: float, same: bool = True
) -> None:
    cosines, expected = implementation.Cosines(x), Readable(x)  # type: ignore[attr-defined]
    nearest, wanted = cosines.to_nearest_above(score), expected.to_nearest_above(score)
    assert nearest.dtype == torch.float32
    torch.testing.assert_close(nearest, wanted, rtol=0, atol=close)
    split = keep_highest(score, math.ceil(0.6 * x.shape[1]))
    # Of the matrix that there is by now, and of one that was never asked for.
    for asked in (cosines, implementation.Cosines(x)):  # type: ignore[attr-defined]
        found, position = (c.nearest(split.removed, split.kept) for c in (asked, expected))
        assert found.shape == split.removed.shape
        assert found.dtype == torch.int64
        if same:
            assert torch.equal(found, position)
        # Another choice is as near, up to rounding.
        cosine = _between(expected.matrix, split)
        chosen = cosine.gather(2, found.unsqueeze(2)) - cosine.gather(2, position.unsqueeze(2))
        assert (chosen.abs() <= close).all()


def _between(matrix: Tensor, split: Partition) -> Tensor:
    """`[B, R, K]` of the tokens that leave with those that stay."""
    images = zip(matrix, split.removed, split.kept, strict=True)
    return torch.stack([m[i][:, j] for m, i, j in images])


@FAST
@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_they_agree_with_the_readable_one(
    implementation: object, shape: tuple[int, int, int], dtype: torch.dtype, place: torch.device
) -> None:
    x, score = torch.randn(shape).to(dtype).to(place), torch.rand(shape[:2]).to(place)
    agree(implementation, x, score, close=CLOSE[dtype], same=dtype == torch.float32)


@pytest.mark.slow
def test_the_kernel_agrees_with_the_readable_one_on_many_tokens(place: torch.device) -> None:
    x, score = torch.randn(1, 1500, 128).bfloat16().to(place), torch.rand(1, 1500).to(place)
    agree(fused, x, score, close=CLOSE[torch.bfloat16], same=False)


@pytest.mark.parametrize("tokens", [cpu.WHOLE - 1, cpu.WHOLE + 1])
def test_so_do_processors(tokens: int) -> None:
    x, score = torch.randn(2, tokens, 32).bfloat16(), torch.rand(2, tokens)
    agree(cpu, x, score, close=CLOSE[torch.bfloat16], same=False)


@FAST
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kinds", [1, 3])
@pytest.mark.parametrize("levels", [1, 4])
@pytest.mark.parametrize("tokens", [71, 260])  # a little over one block of the kernels, and of ours
def test_ties_are_broken_alike_everywhere(
    implementation: object,
    dtype: torch.dtype,
    kinds: int,
    levels: int,
    tokens: int,
    place: torch.device,
) -> None:
    x = exact((1, tokens, 66), kinds, place).to(dtype)
    score = torch.randint(0, levels, (1, tokens)).float().to(place)
    agree(implementation, x, score, close=0.0)


@FAST
def test_equal_tokens_have_the_first_one_above_them(
    implementation: object, place: torch.device
) -> None:
    x, score = exact((1, 40, 64), 1, place), torch.full((1, 40), 0.5, device=place)
    cosines = implementation.Cosines(x)  # type: ignore[attr-defined]
    assert cosines.to_nearest_above(score)[0].tolist() == [-1.0] + [1.0] * 39
    position = torch.arange(40, device=place).unsqueeze(0)
    assert cosines.nearest(position[:, :38], position[:, 38:])[0].tolist() == [0] * 38


@FAST
def test_nan_and_infinite_scores_have_their_places(
    implementation: object, place: torch.device
) -> None:
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [-1.0, 0.0]]], device=place)
    x = torch.nn.functional.pad(x, (0, 30))
    score = torch.tensor([[math.nan, math.inf, -math.inf, 0.0]], device=place)
    nearest = implementation.Cosines(x).to_nearest_above(score)  # type: ignore[attr-defined]
    # Above token 0 (NaN): 1 and 3; above 1: none; above 2 (as low as NaN, but later): all.
    expected = torch.tensor([[0.0, -1.0, math.sqrt(0.5), 0.0]], device=place)
    torch.testing.assert_close(nearest, expected)


@FAST
def test_zero_tokens_resemble_nothing(implementation: object, place: torch.device) -> None:
    x = torch.zeros(1, 3, 16, device=place)
    cosines = implementation.Cosines(x)  # type: ignore[attr-defined]
    score = torch.tensor([[3.0, 2.0, 1.0]], device=place)
    assert cosines.to_nearest_above(score).tolist() == [[-1.0, 0.0, 0.0]]
    assert cosines.nearest(*torch.tensor([[[2]], [[0]]], device=place)).tolist() == [[0]]


@FAST
def test_no_gradient_flows_and_none_is_recorded(
    implementation: object, place: torch.device
) -> None:
    x = torch.randn(1, 9, 16, device=place, requires_grad=True)
    score = torch.rand(1, 9, device=place)
    assert not implementation.Cosines(x).to_nearest_above(score).requires_grad  # type: ignore[attr-defined]
