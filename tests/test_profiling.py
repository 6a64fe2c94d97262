"""Where the time of a forward goes: parts, their sum, and what is left behind."""

from __future__ import annotations

from itertools import count

import pytest
import torch
from torch import nn

import mergence
from mergence import demo, profiling
from mergence.benchmark import bench
from mergence.profiling import PARTS, parts_of
from mergence.program import program_of
from mergence.recipe import make

DEPTH = 12
REDUCING = ("scoring", "planning", "merging")


@pytest.fixture
def vit() -> nn.Module:
    return demo.load().model


@pytest.fixture
def _ticking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock finds it a millisecond later."""
    ticks = count()
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: next(ticks) / 1000)


@pytest.mark.usefixtures("_ticking")
def test_every_moment_of_a_forward_is_in_one_part(vit: nn.Module) -> None:
    mergence.apply(vit, "mstm", keep_rate=0.7)
    parts = parts_of(vit, torch.zeros(1, 1, 28, 28))
    assert parts == pytest.approx(
        {
            "attention": DEPTH,
            "mlp": DEPTH,
            **dict.fromkeys(REDUCING, 3),  # the blocks that reduce
            "learned": 0,
            "rest": DEPTH + 1,  # what comes before each block, and what after the last
        }
    )


@pytest.mark.usefixtures("_ticking")
def test_a_learned_module_has_its_own_part(vit: nn.Module) -> None:
    mergence.apply(vit, "mstm", keep_rate=0.7, fusion=True)
    assert parts_of(vit, torch.zeros(1, 1, 28, 28))["learned"] == pytest.approx(1)


def test_a_failed_forward_leaves_no_clock_behind(vit: nn.Module) -> None:
    run = program_of(mergence.apply(vit, macs=0.67)).run
    with pytest.raises(AssertionError):
        parts_of(vit, torch.zeros(1, 1, 30, 28))  # timm refuses the size
    assert run.clock is None
    parts_of(vit, torch.zeros(1, 1, 28, 28))
    assert run.clock is None


def test_bench_profiles_dense_and_reduced_models(vit: nn.Module) -> None:
    result = bench(
        vit,
        {"half": make(macs=0.5)},
        input_size=(1, 28, 28),
        batches=(1, 2),
        seconds=0,
        rounds=2,
        profile=True,
    )
    assert [(p.name, p.batch, p.dtype) for p in result.profiles] == [
        ("dense", 1, "float32"),
        ("half", 1, "float32"),
        ("dense", 2, "float32"),
        ("half", 2, "float32"),
    ]
    for dense, half in (result.profiles[:2], result.profiles[2:]):
        assert sum(dense.share.values()) == pytest.approx(1)
        assert half.share["mlp"] == pytest.approx(half.ms["mlp"] / sum(dense.ms.values()))
        assert {part for part in PARTS if dense.ms[part]} == {"attention", "mlp", "rest"}
        assert {part for part in PARTS if half.ms[part]} == set(PARTS) - {"learned"}
