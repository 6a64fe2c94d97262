"""The state of a forward: one a thread, reset at both ends, never copied."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from mergence.state import Carry, Run, Runs, attach, attached


def test_a_run_is_reset_on_entry_and_on_exit() -> None:
    run = Run()
    run.carry = Carry(patches=4)
    with run.forward((2, 2)):
        assert run.active
        assert run.carry is None
        assert run.grid == (2, 2)
        run.carry = Carry(patches=4)
    assert (run.active, run.carry, run.grid) == (False, None, None)


def test_a_run_is_reset_when_the_forward_raises() -> None:
    run = Run()

    def fail() -> None:
        with run.forward((2, 2)):
            run.carry = Carry(patches=4)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert (run.active, run.carry, run.grid) == (False, None, None)


def test_inner_calls_join_the_outer_run_and_begin_anew_with_their_image() -> None:
    run = Run()
    with run.forward((2, 2), every_patch=True):
        run.carry = Carry(patches=4)
        with run.forward((9, 9), prefix_alone=True):
            assert run.known() == Carry(patches=81, grid=(9, 9), every_patch=True)
            run.carry = carry = Carry(patches=81)
        assert run.active
        assert run.carry is carry  # for the head
    assert (run.active, run.carry, run.grid) == (False, None, None)


def test_each_thread_has_its_own_run() -> None:
    runs = Runs()
    with runs.here.forward((2, 2)), ThreadPoolExecutor(1) as pool:
        runs.here.disabled = True
        there = pool.submit(lambda: runs.here).result()
    assert (there.active, there.grid, there.disabled) == (False, None, False)


def test_copies_and_pickles_of_runs_are_empty() -> None:
    runs = Runs()
    with runs.here.forward((2, 2)):
        runs.here.disabled = True
        for twin in (copy.copy(runs), copy.deepcopy(runs), pickle.loads(pickle.dumps(runs))):
            assert twin is not runs
            assert (twin.here.active, twin.here.grid, twin.here.disabled) == (False, None, False)


def test_a_tensor_remembers_its_carry_and_others_do_not() -> None:
    x, carry = torch.zeros(1), Carry(patches=4)
    attach(x, carry)
    assert attached(x) is carry
    assert attached(x.clone()) is None
    attach(other := torch.zeros(1), None)
    assert attached(other) is None
