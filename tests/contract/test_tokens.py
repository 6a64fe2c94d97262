"""Where tokens go: counts, sizes, prefix tokens and the source map."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergence
from mergence.outputs import answer
from mergence.step import BlockStep


@pytest.mark.full_product
def test_each_block_leaves_as_many_tokens_as_the_schedule_says(
    dense: nn.Module, method: str, image: Tensor, output: Any, spec: Any, token_counts: Any
) -> None:
    found = spec(dense)
    schedule = [36, 31, 31, 17, 16, 9]
    mergence.apply(dense, method, schedule=schedule)
    assert mergence.describe(dense).counts == tuple(schedule)
    with token_counts(found.blocks, found.cost.prefix) as seen:
        output(dense, image)
    assert seen == schedule


@pytest.mark.full_product
def test_sizes_are_the_numbers_of_patches_in_each_slot(
    reduced: nn.Module, image: Tensor, output: Any
) -> None:
    trace = mergence.trace(reduced, image)
    # Not exact: patches that nobody reads are there in the last MLP only while they are traced.
    torch.testing.assert_close(answer(trace.output), output(reduced, image))
    assert len(trace.points) == 3
    patches = mergence.describe(reduced).patches
    for point in trace.points:
        slots = point.size.shape[1]
        for source, size in zip(point.source, point.size, strict=True):
            counted = torch.bincount(source[source >= 0], minlength=slots)
            assert size.tolist() == counted.tolist()
            assert counted.min() > 0
            assert counted.sum() == patches - (source < 0).sum()


def test_dropped_patches_stay_dropped_and_merged_ones_stay_together(
    reduced: nn.Module, image: Tensor
) -> None:
    points = mergence.trace(reduced, image).points
    for earlier, later in pairwise(points):
        assert (later.source[earlier.source < 0] == -1).all()
        for before, after in zip(earlier.source, later.source, strict=True):
            slot_of = dict(zip(before.tolist(), after.tolist(), strict=True))
            slot_of.pop(-1, None)
            assert [slot_of.get(slot, -1) for slot in before.tolist()] == after.tolist()


@pytest.mark.full_product
def test_prefix_tokens_pass_every_reduction_in_place(
    reduced: nn.Module, image: Tensor, output: Any, spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    cost, reduce, compared = spec(reduced).cost, BlockStep.reduce, []

    def watched(step: BlockStep, x: Tensor, *rest: Any, **named: Any) -> Any:
        y, carry = reduce(step, x, *rest, **named)
        same = torch.equal(y[:, : cost.prefix], x[:, : cost.prefix])
        compared.append(same and y.shape[1] < x.shape[1])
        return y, carry

    monkeypatch.setattr(BlockStep, "reduce", watched)
    output(reduced, image)
    assert compared == [True] * (3 + cost.prefix_alone)


def test_prefix_tokens_leave_the_first_reducing_block_as_they_leave_the_dense_one(
    reduced: nn.Module, image: Tensor, output: Any, spec: Any
) -> None:
    found, leaving = spec(reduced), []
    first = next(i for i, n in enumerate(mergence.describe(reduced).counts) if n < found.patches)
    found.blocks[first].register_forward_hook(lambda module, x, y: leaving.append(y))
    reduced, image = reduced.double(), image.double()
    output(reduced, image)
    with mergence.disabled(reduced):
        output(reduced, image)
    after, before = (y if isinstance(y, Tensor) else y[0] for y in leaving)
    prefix = found.cost.prefix
    assert after.shape[1] < before.shape[1]
    # Not exact: the MLP multiplies fewer rows at once and may sum in another order.
    torch.testing.assert_close(after[:, :prefix], before[:, :prefix], rtol=1e-12, atol=1e-12)
