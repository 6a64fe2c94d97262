"""Labels as the loss takes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mergence.train import Config
from mergence.train.seeding import seed_all
from mergence.train.targets import Targets


@pytest.mark.parametrize("count", [1, 2, 5, 8])
@pytest.mark.parametrize("kind", [{"mixup": 0.8}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0}])
def test_any_number_of_images_is_mixed(
    config: Callable[..., Config], kind: dict[str, Any], count: int
) -> None:
    targets = Targets.of(config(smoothing=0.1, **kind), 10)
    images, labels = torch.rand(count, 1, 28, 28), torch.arange(count) % 10
    before = images.clone()
    seed_all(0, "mix")
    mixed, soft = targets(images, labels)
    assert torch.equal(images, before)
    assert mixed.shape == images.shape
    assert torch.allclose(soft.sum(dim=1), torch.ones(count))
    assert (soft > 0).all()
    if count % 2:
        assert torch.equal(mixed[-1], images[-1])
        assert soft[-1, labels[-1]] == pytest.approx(0.91)
    if count > 1:
        assert not torch.equal(mixed[0], images[0])


def test_smoothing_alone_is_that_of_the_cross_entropy(config: Callable[..., Config]) -> None:
    images, labels = torch.rand(4, 1, 2, 2), torch.tensor([0, 3, 2, 2])
    same, soft = Targets.of(config(smoothing=0.2), 5)(images, labels)
    assert same is images
    logits = torch.randn(4, 5)
    expected = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.2)
    assert torch.allclose(-(soft * logits.log_softmax(1)).sum(1).mean(), expected)
