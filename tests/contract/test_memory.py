"""What a reduced forward holds in memory."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergence
from mergence.step import BlockStep


@torch.no_grad()
def test_no_queries_and_keys_are_held_while_the_mlp_runs(
    dense: nn.Module, image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = mergence.apply(dense, keep_rate=0.6)
    waiting: list[list[weakref.ref[Tensor]]] = []
    held: list[bool] = []
    original = BlockStep.reduce

    def watched(self: BlockStep, x: Tensor, q: Tensor, k: Tensor, *rest: Any) -> Any:
        after = original(self, x, q, k, *rest)
        waiting.append([weakref.ref(q), weakref.ref(k)])
        return after

    def look(module: nn.Module, inputs: Any) -> None:
        if waiting:
            held.append(any(reference() is not None for reference in waiting.pop()))

    monkeypatch.setattr(BlockStep, "reduce", watched)
    hook = nn.modules.module.register_module_forward_pre_hook(look)
    try:
        model(image)
    finally:
        hook.remove()
    assert held
    assert not any(held)
