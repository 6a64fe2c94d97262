"""Measurements that start late equal those that start at the first block."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import nn

import mergence
from mergence import demo
from mergence.calibration.probe import Probe
from mergence.distances import cosine_distance, kl_divergence
from mergence.method import build

SCHEDULES = (
    [120] * 12,
    [196] * 5 + [90] * 7,
    [196] * 11 + [1],
    [196] * 3 + [100] * 4 + [50] * 5,
    [196] * 12,
)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return demo.load().model


@pytest.fixture(scope="module")
def images() -> list[torch.Tensor]:
    loaded = demo.load()
    data = demo.images(loaded, limit=3)
    pixels = torch.stack([data[i].image for i in range(3)])  # type: ignore[union-attr]
    return list(pixels.split(2))


@pytest.fixture(scope="module", params=["remembered", "no memory", "half the memory"])
def probe(request: pytest.FixtureRequest, model: nn.Module, images: list[torch.Tensor]) -> Probe:
    batch = 12 * 2 * 197 * 128 * 4
    memory = {"remembered": 1 << 40, "no memory": 0, "half the memory": batch + 1}[request.param]
    return Probe(model, images, memory=memory)


@pytest.fixture(scope="module")
def whole(model: nn.Module, images: list[torch.Tensor]) -> Callable[[tuple[int, ...]], float]:
    """The distance as the whole model has it, measured once for each schedule."""
    pixels = torch.cat(images)
    with torch.inference_mode():
        dense = model(pixels)

    @cache
    @torch.inference_mode()
    def distance(counts: tuple[int, ...]) -> float:
        with mergence.applied(model, "mergence", schedule=counts):
            return float(kl_divergence(dense, model(pixels)).mean())

    return distance


@pytest.mark.parametrize("counts", SCHEDULES)
def test_a_measurement_is_that_of_the_whole_model(
    counts: list[int], probe: Probe, whole: Callable[[tuple[int, ...]], float]
) -> None:
    found = probe.mean(kl_divergence, build("mergence", {}), counts)
    assert found == pytest.approx(whole(tuple(counts)), abs=1e-6)


def test_fewer_images_are_the_first_whole_batches(
    model: nn.Module, images: list[torch.Tensor]
) -> None:
    method, counts = build("mergence", {}), [196] * 4 + [60] * 8
    first = Probe(model, images[:1]).mean(kl_divergence, method, counts)
    assert Probe(model, images).mean(kl_divergence, method, counts, images=1) == first


def test_the_model_is_left_alone(probe: Probe, model: nn.Module) -> None:
    probe.mean(kl_divergence, build("mergence", {}), [196] * 5 + [90] * 7)
    for module in model.modules():
        assert "forward" not in vars(module)
        assert not module._forward_pre_hooks


def test_a_bound_forward_on_a_block_hides_no_reduction(
    model: nn.Module, images: list[torch.Tensor]
) -> None:
    probe, counts = Probe(model, images), [196] * 5 + [90] * 7
    expected = probe.mean(kl_divergence, build("mergence", {}), counts)
    block = model.blocks[5]  # type: ignore[index]
    vars(block)["forward"] = block.forward
    try:
        assert probe.mean(kl_divergence, build("mergence", {}), counts) == expected
    finally:
        vars(block).pop("forward", None)


def test_distances() -> None:
    a, b = torch.tensor([[0.0, 1.0], [2.0, 2.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    p, q = torch.tensor([0.5, 0.5]), torch.softmax(b[1], dim=0)
    expected = float((p * (p / q).log()).sum())
    assert kl_divergence(a, b).tolist() == pytest.approx([0.0, expected])
    assert cosine_distance(a, b).tolist() == pytest.approx([0.0, 1 - 0.5**0.5])
