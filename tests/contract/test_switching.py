"""disabled() and applied(): what holds inside the block, and after it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergence
from mergence.errors import MergenceError


def test_disabled_is_the_dense_model_to_the_last_bit(
    dense: nn.Module, method: str, image: Tensor, output: Any
) -> None:
    expected = output(dense, image)
    mergence.apply(dense, method, keep_rate=0.7)
    reduced = output(dense, image)
    with mergence.disabled(dense) as same:
        assert same is dense
        assert torch.equal(output(dense, image), expected)
        with mergence.disabled(dense):
            assert torch.equal(output(dense, image), expected)
        assert torch.equal(output(dense, image), expected)
    assert torch.equal(output(dense, image), reduced)


def test_disabled_ends_when_its_body_raises(vit: nn.Module, image: Tensor, output: Any) -> None:
    mergence.apply(vit, "topk", keep_rate=0.7)
    expected = output(vit, image)
    with pytest.raises(KeyError), mergence.disabled(vit):
        raise KeyError
    assert torch.equal(output(vit, image), expected)


def test_disabled_blocks_may_close_in_any_order(vit: nn.Module, image: Tensor, output: Any) -> None:
    # As blocks of two coroutines do, or one in a generator that somebody holds.
    expected = output(vit, image)
    mergence.apply(vit, "topk", keep_rate=0.7)
    reduced = output(vit, image)
    first, second = mergence.disabled(vit), mergence.disabled(vit)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.equal(output(vit, image), expected)
    second.__exit__(None, None, None)
    assert torch.equal(output(vit, image), reduced)


def test_disabled_runs_a_dense_model_as_it_is(vit: nn.Module, image: Tensor, output: Any) -> None:
    expected = output(vit, image)
    with mergence.disabled(vit):
        assert torch.equal(output(vit, image), expected)


@pytest.mark.parametrize(
    "wrap",
    [
        lambda model: nn.Sequential(model, nn.Identity()),
        lambda model: torch.compile(model, backend="eager"),
    ],
    ids=["around", "compiled"],
)
def test_disabled_reaches_a_reduced_model_inside_of_another(
    wrap: Any, vit: nn.Module, image: Tensor, output: Any
) -> None:
    expected = output(vit, image)
    outer = wrap(mergence.apply(vit, "topk", keep_rate=0.7))
    reduced = output(outer, image)
    assert not torch.equal(reduced, expected)
    with mergence.disabled(outer) as same:
        assert same is outer
        assert torch.equal(output(outer, image), expected)
    assert torch.equal(output(outer, image), reduced)
    with mergence.disabled(vit.blocks[2]):  # type: ignore[index]
        assert torch.equal(output(vit, image), expected)


def test_what_asks_for_a_reduction_says_where_it_is(vit: nn.Module) -> None:
    with pytest.raises(MergenceError, match=r"This Sequential is not reduced\. Apply first"):
        mergence.describe(nn.Sequential(vit))
    outer = nn.Sequential(mergence.apply(vit, "topk", keep_rate=0.7))
    with pytest.raises(MergenceError, match=r"Sequential is not reduced\. Its part '\.0' is"):
        mergence.describe(outer)


def test_applied_gives_a_dense_model_back_dense(
    dense: nn.Module, method: str, image: Tensor, output: Any, snapshot: Any
) -> None:
    before, expected = snapshot(dense), output(dense, image)
    with mergence.applied(dense, method, keep_rate=0.7) as same:
        assert same is dense
        assert not torch.equal(output(dense, image), expected)
    assert snapshot(dense) == before
    with pytest.raises(KeyError), mergence.applied(dense, method, keep_rate=0.7):
        raise KeyError
    assert snapshot(dense) == before


def test_applied_goes_back_to_what_was_applied_before(
    reduced: nn.Module, image: Tensor, output: Any
) -> None:
    recipe, expected = mergence.recipe_of(reduced), output(reduced, image)
    with mergence.applied(reduced, "random", r=3, seed=5):
        assert not torch.equal(output(reduced, image), expected)
    assert mergence.recipe_of(reduced) == recipe
    assert torch.equal(output(reduced, image), expected)
    with pytest.raises(KeyError), mergence.applied(reduced, "random", r=3, seed=5):
        raise KeyError
    assert mergence.recipe_of(reduced) == recipe
    assert torch.equal(output(reduced, image), expected)


def test_applied_that_cannot_be_carried_out_leaves_the_model_alone(
    vit: nn.Module, snapshot: Any
) -> None:
    mergence.apply(vit, "topk", keep_rate=0.7)
    before = snapshot(vit)
    with (
        pytest.raises(mergence.MergenceError, match="no method 'tomme'"),
        mergence.applied(vit, "tomme", macs=0.5),
    ):
        pytest.fail("the body must not run")
    assert snapshot(vit) == before


def test_applied_keeps_the_weights_that_the_method_before_it_had_learned(vit: nn.Module) -> None:
    mergence.apply(vit, "mstm", keep_rate=0.7, fusion=True)
    gates = next(p for name, p in vit.named_parameters() if name.endswith("mergence.gates"))
    nn.init.normal_(gates)
    before = copy.deepcopy(vit.state_dict())
    with mergence.applied(vit, "tome", r=2):
        pass
    after = vit.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
