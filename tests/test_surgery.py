"""Class swap and its undo, on modules of no library in particular."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from mergence import surgery
from mergence.errors import MergenceError, UnsupportedModelError


class Louder:
    """A mixin; at module level so that it can be pickled by name."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        dense: Any = super()
        y: torch.Tensor = dense.forward(x)
        return y * self._mergence


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))


X = torch.ones(1, 2)


def test_a_swapped_module_is_the_same_object_of_a_class_of_the_same_name() -> None:
    linear = model()[0]
    surgery.swap(linear, Louder, 3)
    assert isinstance(linear, nn.Linear)
    assert type(linear) is not nn.Linear
    assert type(linear).__qualname__ == "Linear"
    assert surgery.original_class(linear) is nn.Linear
    assert surgery.is_swapped(linear)
    assert surgery.attachment(linear) == 3
    assert torch.equal(linear(X), 3 * nn.functional.linear(X, linear.weight, linear.bias))


def test_equal_swaps_share_one_class() -> None:
    one, other = model()
    surgery.swap(one, Louder, 1)
    surgery.swap(other, Louder, 2)
    assert type(one) is type(other)


def test_restore_undoes_the_module_and_what_it_contains() -> None:
    both = model()
    before = [dict(m.__dict__) for m in both.modules()]
    expected = both(X)
    surgery.swap(both[1], Louder, 3, nn.Linear(1, 1))
    surgery.swap(both, Louder, 5)
    assert "1.mergence.weight" in both.state_dict()
    surgery.restore(both)
    assert [dict(m.__dict__) for m in both.modules()] == before
    assert [type(m) for m in both.modules()] == [nn.Sequential, nn.Linear, nn.Linear]
    assert torch.equal(both(X), expected)


def test_a_bookmark_brings_back_what_was_swapped_with_the_same_learned_module() -> None:
    both, learned = model(), nn.Linear(1, 1)
    surgery.swap(both[1], Louder, 3, learned)
    expected, back = both(X), surgery.bookmark(both)
    surgery.restore(both)
    surgery.swap(both[0], Louder, 7)
    back()
    assert torch.equal(both(X), expected)
    assert surgery.learned_module(both[1]) is learned
    assert not surgery.is_swapped(both[0])


def test_swapped_modules_copy_and_pickle() -> None:
    both = model()
    surgery.swap(both[0], Louder, 3)
    for twin in (copy.deepcopy(both), pickle.loads(pickle.dumps(both)), copy.copy(both)):
        assert type(twin[0]) is type(both[0])
        assert torch.equal(twin(X), both(X))
    twin = copy.deepcopy(both)
    surgery.restore(twin)
    assert surgery.is_swapped(both[0])


def test_a_copy_of_a_compiled_module_does_not_run_the_original() -> None:
    both = model()
    surgery.swap(both[0], Louder, 3)
    both[0].compile(backend="eager")
    assert both(X).any()
    for twin in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert not twin(X).any()


def test_a_new_module_of_the_class_is_one_of_the_library() -> None:
    # peft makes layers of the class that it finds; they were never reduced.
    linear = model()[0]
    surgery.swap(linear, Louder, 3)
    new = type(linear)(2, out_features=5, bias=False)
    assert type(new) is nn.Linear
    assert new.weight.shape == (5, 2)
    # DataParallel makes its replicas so, and fills them from the module that it copies.
    replica = linear._replicate_for_data_parallel()
    assert type(replica) is type(linear)
    replica.weight, replica.bias = linear.weight, linear.bias
    assert torch.equal(replica(X), linear(X))


def test_a_module_whose_class_changed_since_is_not_set_back() -> None:
    both = model()
    surgery.swap(both[1], Louder, 3)
    surgery.swap(both, Louder, 5)
    nn.utils.parametrizations.weight_norm(both[1])
    classes, expected = [type(m) for m in both.modules()], both(X)
    for change in (surgery.restore, surgery.bookmark):
        with pytest.raises(MergenceError, match="'1' is a ParametrizedLinear now"):
            change(both)
    assert [type(m) for m in both.modules()] == classes
    assert torch.equal(both(X), expected)
    nn.utils.parametrize.remove_parametrizations(both[1], "weight")
    surgery.restore(both)
    assert [type(m) for m in both.modules()] == [nn.Sequential, nn.Linear, nn.Linear]


def test_a_bound_forward_on_the_module_does_not_hide_what_is_mixed_in() -> None:
    # transformers 4 leaves one behind when it has recorded hidden states.
    linear = model()[0]
    expected = linear(X)
    linear.forward = linear.forward
    surgery.swap(linear, Louder, 3)
    assert torch.equal(linear(X), 3 * expected)
    linear.forward = linear.forward
    surgery.restore(linear)
    assert torch.equal(linear(X), expected)
    assert "forward" not in vars(linear)


def test_a_forward_that_something_else_has_covered_is_refused_before_anything_changes() -> None:
    both = model()
    add_hook_to_module(both[0], ModelHook())
    with pytest.raises(
        UnsupportedModelError, match=r"forward of a Linear.*accelerate.*Apply befor"
    ):
        surgery.swap(both[0], Louder, 3)
    assert not surgery.is_swapped(both[0])
    remove_hook_from_module(both[0])
    surgery.swap(both[0], Louder, 3)
    surgery.swap(both[1], Louder, 3)
    expected = both(X)
    add_hook_to_module(both[1], ModelHook())
    with pytest.raises(MergenceError, match=r"forward of '1', a Linear.*Undo that before"):
        surgery.restore(both)
    assert torch.equal(both(X), expected)
    remove_hook_from_module(both[1])
    surgery.restore(both)
    assert not any(map(surgery.is_swapped, both))
