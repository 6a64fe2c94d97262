"""timm models of four patches a side, and what is checked of models of several libraries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from mergence.ops import products
from mergence.schedule import Counts, Schedule
from mergence.setting import Setting

SMALL = {"embed_dim": 24, "depth": 4, "num_heads": 2, "img_size": 64, "patch_size": 16}


@pytest.fixture
def torchs_attention(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own attention also with sizes in bfloat16; products round otherwise."""
    monkeypatch.setattr(products, "VECTORS", False)


@pytest.fixture(scope="session")
def small(replica: Any) -> Callable[..., Any]:
    """Builds a small timm model in float64, where only real differences show."""

    def build(name: str, options: dict[str, Any]) -> nn.Module:
        torch.manual_seed(0)
        model = timm.create_model(name, **(SMALL | {"num_classes": 5} | options)).eval().double()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.15)
        return model

    def copy(name: str = "vit_tiny_patch16_224", **options: Any) -> nn.Module:
        model: nn.Module = replica((name, repr(options)), lambda: build(name, options))
        torch.manual_seed(1)  # what is drawn next is the same for the first and for a later copy
        return model

    return copy


@pytest.fixture
def checkpointed() -> Callable[[Any, Callable[[], Tensor]], None]:
    """Checks that gradients flow in a model of transformers, and checkpointing changes none."""

    def check(model: Any, loss: Callable[[], Tensor]) -> None:
        def gradients() -> list[Tensor]:
            model.zero_grad()
            loss().backward()
            return [p.grad.clone() for p in model.parameters()]

        expected = gradients()
        assert all(grad.abs().max() > 0 for grad in expected)
        model.gradient_checkpointing_enable({"use_reentrant": False})
        for one, other in zip(gradients(), expected, strict=True):
            torch.testing.assert_close(one, other)

    return check


class _AsTheyAre(Counts):
    def raw(self, setting: Setting) -> tuple[int, ...]:
        return self.after


@pytest.fixture
def unscaled() -> Callable[[list[int]], Schedule]:
    """Counts that cannot be followed with images of fewer patches."""
    return lambda counts: _AsTheyAre(after=tuple(counts))
