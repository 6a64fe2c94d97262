"""Traces against plans followed by hand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import mergence
from mergence import family, ops
from mergence.errors import DataError, PlanError
from mergence.method import names
from mergence.methods import TopK
from mergence.plan import DROPPED, MergePlan

IMAGES = 2


@pytest.fixture
def vit() -> nn.Module:
    return family.registry()["timm"].tiny()["vit"]()


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[MergePlan]:
    """Every plan that is carried out."""
    seen: list[MergePlan] = []
    merge = ops.merge

    def watched(x: Any, size: Any, plan: MergePlan, prefix: int) -> Any:
        seen.append(plan)
        return merge(x, size, plan, prefix)

    monkeypatch.setattr(ops, "merge", watched)
    return seen


@pytest.mark.parametrize("name", names())
def test_sources_follow_the_plans_patch_by_patch(
    name: str, vit: nn.Module, plans: list[MergePlan]
) -> None:
    mergence.apply(vit, name, schedule=[36, 24, 24, 15, 8, 8])
    trace = mergence.trace(vit, torch.randn(IMAGES, 3, 96, 96))
    assert [point.block for point in trace.points] == [2, 4, 5]
    assert trace.method == name
    assert trace.grid == (6, 6)
    for image in range(IMAGES):
        where = list(range(36))
        for point, plan in zip(trace.points, plans, strict=True):
            slot = plan.slot[image].tolist()
            where = [slot[w] if w != DROPPED else DROPPED for w in where]
            assert point.source[image].tolist() == where


@pytest.mark.parametrize("name", names())
def test_an_anchor_is_a_patch_of_its_slot_and_the_most_important_token_of_it(
    name: str, vit: nn.Module
) -> None:
    mergence.apply(vit, name, schedule=[36, 24, 24, 15, 8, 8])
    for point in mergence.trace(vit, torch.randn(IMAGES, 3, 96, 96)).points:
        for source, anchor, importance in zip(
            point.source.tolist(), point.anchor.tolist(), point.importance.tolist(), strict=True
        ):
            assert [source[patch] for patch in anchor] == list(range(len(anchor)))
            for slot, patch in enumerate(anchor):
                members = [importance[p] for p, s in enumerate(source) if s == slot]
                assert importance[patch] == max(members)


def test_importance_is_a_share_of_attention_and_nan_where_a_patch_is_gone(vit: nn.Module) -> None:
    mergence.apply(vit, "topk", schedule=[36, 24, 24, 15, 8, 8])
    first, second, _ = mergence.trace(vit, torch.randn(IMAGES, 3, 96, 96)).points
    assert not first.importance.isnan().any()
    assert (first.importance > 0).all()
    assert (first.importance.sum(dim=1) < 1).all()  # the class token looks at itself, too
    assert torch.equal(second.importance.isnan(), first.source < 0)


def test_importance_is_the_class_row_of_the_attention_map(vit: Any) -> None:
    mergence.apply(vit, "topk", schedule=[36, 24, 24, 24, 24, 24])
    attention, maps = vit.blocks[1].attn, []
    attention.fused_attn = False
    attention.attn_drop.register_forward_hook(lambda module, x, y: maps.append(y))
    point = mergence.trace(vit, torch.randn(IMAGES, 3, 96, 96)).points[0]
    expected = maps[0].mean(dim=1)[:, 0, 1:]
    # The model scales the queries before the product, importance scales the product.
    torch.testing.assert_close(point.importance, expected, rtol=1e-4, atol=1e-7)


def test_a_model_that_reduces_nothing_has_no_points(vit: nn.Module) -> None:
    trace = mergence.trace(mergence.apply(vit, keep_rate=1.0), torch.randn(1, 3, 96, 96))
    assert trace.points == ()
    assert trace.grid == (6, 6)


def test_tracing_ends_with_the_call_also_when_it_fails(vit: nn.Module) -> None:
    mergence.apply(vit, "topk", keep_rate=0.7)
    with pytest.raises(AssertionError, match="doesn't match model"):
        mergence.trace(vit, torch.randn(1, 3, 97, 97))
    assert vit._mergence.run.observer is None
    assert vit(torch.randn(1, 3, 96, 96)).isfinite().all()


def test_images_that_are_no_tensor_are_named(vit: nn.Module) -> None:
    mergence.apply(vit, macs=0.6)
    inputs: Any = {"pixel_values": torch.randn(1, 3, 96, 96)}
    with pytest.raises(DataError, match=r"are a dict;.*inputs\['pixel_values'\]"):
        mergence.trace(vit, inputs)


WRONG: dict[str, tuple[Callable[[MergePlan], MergePlan], str]] = {
    "too high": (lambda p: replace(p, slot=p.slot + 1), r"has slot 24; give 0 to 23, or -1"),
    "too low": (lambda p: replace(p, slot=p.slot.masked_fill(p.slot < 0, -2)), "has slot -2"),
    "empty": (lambda p: replace(p, slot=p.slot.clamp(max=22)), "slot 23 of image 0 is empty"),
    "nothing": (lambda p: replace(p, weight=0 * p.weight), r"of image 0 has weight 0\.0; weights"),
    "NaN": (lambda p: replace(p, weight=p.weight * float("nan")), "has weight nan"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_trace_looks_at_the_values_of_a_plan(
    name: str, vit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = WRONG[name]
    rule = TopK.plan
    monkeypatch.setattr(TopK, "plan", lambda *given: change(rule(*given)))
    mergence.apply(vit, "topk", schedule=[36, 24, 24, 24, 24, 24])
    with pytest.raises(PlanError, match=f"'topk' made a wrong plan in block 2: .*{message}"):
        mergence.trace(vit, torch.randn(IMAGES, 3, 96, 96))
    assert vit._mergence.run.observer is None


@pytest.mark.slow
def test_a_model_that_is_one_graph_is_traced(vit: nn.Module) -> None:
    images = torch.randn(1, 3, 96, 96)
    expected = mergence.trace(mergence.apply(vit, schedule=[36, 24, 24, 24, 24, 24]), images)
    vit.compile(fullgraph=True, backend="eager")
    found = mergence.trace(vit, images)
    assert torch.equal(found.points[0].source, expected.points[0].source)
