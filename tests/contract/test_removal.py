"""remove, apply again, apply another: what is left on the model is what was asked for last."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergence


@pytest.mark.full_product
def test_remove_gives_the_original_back(
    dense: nn.Module, method: str, image: Tensor, output: Any, snapshot: Any
) -> None:
    expected, before = output(dense, image), snapshot(dense)
    mergence.apply(dense, method, keep_rate=0.7)
    assert not torch.equal(output(dense, image), expected)  # or removing would prove nothing
    assert snapshot(dense) != before
    assert mergence.remove(dense) is dense
    assert snapshot(dense) == before
    assert torch.equal(output(dense, image), expected)


def test_apply_returns_the_same_object_with_the_same_type_names_and_state_dict(
    dense: nn.Module, method: str
) -> None:
    cls, state = type(dense), dense.state_dict()
    assert mergence.apply(dense, method, keep_rate=0.7) is dense
    assert isinstance(dense, cls)
    assert (type(dense).__name__, type(dense).__module__) == (cls.__name__, cls.__module__)
    after = dense.state_dict()
    assert list(after) == list(state)
    assert all(after[key].data_ptr() == state[key].data_ptr() for key in state)


def test_applying_twice_is_applying_once(
    reduced: nn.Module, method: str, image: Tensor, output: Any
) -> None:
    once = output(reduced, image)
    types = [type(module) for module in reduced.modules()]
    mergence.apply(reduced, method, keep_rate=0.7)
    assert torch.equal(output(reduced, image), once)
    assert [type(module) for module in reduced.modules()] == types


@pytest.mark.full_product
def test_applying_another_method_replaces_the_first(
    dense: nn.Module, method: str, image: Tensor, output: Any, snapshot: Any
) -> None:
    before = snapshot(dense)
    mergence.apply(dense, method, keep_rate=0.7)
    expected = output(dense, image)
    mergence.remove(dense)
    mergence.apply(dense, "random", r=3, seed=7)  # reduces in blocks where keep_rate does not
    mergence.apply(dense, method, keep_rate=0.7)
    assert torch.equal(output(dense, image), expected)
    mergence.remove(dense)
    assert snapshot(dense) == before


def test_hooks_fire_while_reduced_and_stay_after_removal(
    dense: nn.Module, method: str, image: Tensor, output: Any, spec: Any
) -> None:
    fired: list[str] = []
    dense.register_forward_pre_hook(lambda *_: fired.append("model in"))
    dense.register_forward_hook(lambda *_: fired.append("model out"))
    for block in spec(dense).blocks:
        block.register_forward_hook(lambda *_: fired.append("block"))
    output(dense, image)
    dense_run = fired.copy()
    mergence.apply(dense, method, keep_rate=0.7)
    output(dense, image)
    mergence.remove(dense)
    output(dense, image)
    assert fired == 3 * dense_run


def test_removing_from_a_dense_model_changes_nothing(dense: nn.Module, snapshot: Any) -> None:
    before = snapshot(dense)
    mergence.remove(dense)
    assert snapshot(dense) == before
