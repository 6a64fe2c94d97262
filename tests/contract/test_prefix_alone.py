"""Where a head reads prefix tokens alone, the last block computes no more than them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import mergence
from mergence import family
from mergence.outputs import answer
from mergence.step import BlockStep

SCHEDULE = [36, 30, 30, 17, 17, 9]


@pytest.fixture
def left(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many patch tokens each reduction leaves."""
    seen: list[int] = []
    reduce = BlockStep.reduce

    def watched(step: BlockStep, x: Tensor, *rest: Any, **named: Any) -> Any:
        y, carry = reduce(step, x, *rest, **named)
        seen.append(y.shape[1] - step.program.prefix)
        return y, carry

    monkeypatch.setattr(BlockStep, "reduce", watched)
    return seen


def test_the_answer_is_that_of_all_tokens(
    dense: nn.Module, image: Tensor, output: Any, spec: Any, left: list[int]
) -> None:
    found, tokens = spec(dense), []
    dense, image = dense.double(), image.double()
    mergence.apply(dense, schedule=SCHEDULE)
    alone = output(dense, image)
    assert left == [30, 17, 0 if found.cost.prefix_alone else 9]
    found.blocks[-1].register_forward_hook(lambda module, x, y: tokens.append(y))
    watched = output(dense, image)
    (last,) = (y if isinstance(y, Tensor) else y[0] for y in tokens)
    assert last.shape[1] == found.cost.prefix + 9
    torch.testing.assert_close(alone, watched, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_a_hook_in_the_last_block_gets_its_patches(
    dense: nn.Module, image: Tensor, output: Any, spec: Any, backward: bool
) -> None:
    found = spec(dense)
    mergence.apply(dense, schedule=SCHEDULE)
    seen: list[Tensor] = []
    if backward:
        found.blocks[-1].register_full_backward_hook(lambda module, x, y: seen.append(y[0]))
        answer(dense(image)).sum().backward()
    else:
        *_, last = (m for m in found.blocks[-1].modules() if isinstance(m, nn.Linear))
        last.register_forward_hook(lambda module, x, y: seen.append(y))
        output(dense, image)
    assert seen or not found.cost.prefix_alone  # some answer without their last block
    assert {y.shape[1] for y in seen} <= {found.cost.prefix + 9}


def test_weights_that_are_set_before_a_layer_are_no_reader(vit: Any, left: list[int]) -> None:
    for part in vit.blocks[-1].modules():
        if isinstance(part, nn.Linear):
            prune.l1_unstructured(part, "weight", 0.3)
    mergence.apply(vit, schedule=SCHEDULE)
    vit(torch.randn(1, 3, 96, 96))
    assert left[-1] == 0


def test_a_tower_is_described_without_its_head() -> None:
    model = family.registry()["transformers"].tiny()["vit"]()
    whole = mergence.describe(mergence.apply(model, schedule=SCHEDULE))
    assert mergence.describe(model.get_submodule("vit")).counts == whole.counts


def test_a_trace_shows_the_reduction_of_the_last_block(dense: nn.Module, image: Tensor) -> None:
    mergence.apply(dense, schedule=SCHEDULE)
    assert [point.block for point in mergence.trace(dense, image).points] == [2, 4, 6]


def test_the_last_mlp_is_counted_for_prefix_tokens_alone(dense: nn.Module, spec: Any) -> None:
    cost = spec(dense).cost
    found = mergence.describe(mergence.apply(dense, schedule=SCHEDULE))
    assert found.prefix_alone == cost.prefix_alone
    last = 0 if cost.prefix_alone else SCHEDULE[-1]
    tokens = [n + cost.prefix for n in (*SCHEDULE[:-1], last)]
    assert found.reduced.mlp == sum(
        n * block.mlp for n, block in zip(tokens, cost.blocks, strict=True)
    )
    # Nor is a merge that is not carried out.
    merged = (36, 30) if cost.prefix_alone else (36, 30, 17)
    assert found.reduced.merging == sum(merged) * cost.dim


def test_features_that_are_asked_for_have_their_patches(vit: nn.Module) -> None:
    mergence.apply(vit, schedule=SCHEDULE)
    image = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        features = vit.forward_features(image)
        torch.testing.assert_close(vit.forward_head(features), vit(image))
    assert features.shape[1] == 1 + 9


def test_a_pooling_that_was_reset_gets_its_patches(vit: nn.Module) -> None:
    mergence.apply(vit, schedule=SCHEDULE)
    vit.reset_classifier(5, global_pool="avg")
    image = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        pooled = vit.forward_head(vit.forward_features(image))
        torch.testing.assert_close(vit(image), pooled)
    assert torch.isfinite(pooled).all()


@pytest.mark.parametrize("late", [False, True], ids=["before", "after"])
def test_a_head_of_the_model_itself_gets_its_patches(vit: Any, late: bool) -> None:
    if late:
        mergence.apply(vit, schedule=SCHEDULE)
    vit.forward_head = lambda x, pre_logits=False: x[:, 1:].mean(dim=1)
    if not late:
        mergence.apply(vit, schedule=SCHEDULE)
    assert late or not mergence.describe(vit).prefix_alone
    with torch.no_grad():
        assert torch.isfinite(vit(torch.randn(1, 3, 96, 96))).all()


def test_a_subclass_gets_its_patches(vit: nn.Module) -> None:
    class Own(type(vit)):  # type: ignore[misc]
        def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
            return x[:, 1:].mean(dim=1)

    vit.__class__ = Own
    mergence.apply(vit, schedule=SCHEDULE)
    assert not mergence.describe(vit).prefix_alone
    with torch.no_grad():
        assert torch.isfinite(answer(vit(torch.randn(1, 3, 96, 96)))).all()
