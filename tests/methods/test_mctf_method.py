"""MCTF: three criteria, two directions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import mergence
from mergence import family
from mergence import method as methods
from mergence.errors import OptionError

EQUAL = torch.full((6,), 1 / 6)


def test_half_go_to_the_other_set_and_half_come_back(at: Any, plan_of: Any) -> None:
    # Of the odd, 3 -> 2 (3 degrees) is best. Of the even to 1 and 5, 0 -> 1 (5 degrees) is.
    x = at(0, 5, 90, 93, 180, 170)
    assert plan_of("mctf", 4, x, received=EQUAL).slot.tolist() == [[0, 0, 1, 1, 2, 3]]
    # The odd one of three goes back: 4 -> 5 (10 degrees).
    assert plan_of("mctf", 3, x, received=EQUAL).slot.tolist() == [[0, 0, 1, 1, 2, 2]]


def test_a_token_that_took_one_in_may_go_on_with_it(at: Any, plan_of: Any) -> None:
    # 3 -> 2 (3 degrees), then 2 -> 1 (4 degrees) for both of them.
    x = at(0, 86, 90, 93, 180, 210)
    assert plan_of("mctf", 4, x, received=EQUAL).slot.tolist() == [[0, 1, 1, 1, 2, 3]]


def test_of_equally_similar_pairs_the_less_attended_fuses(at: Any, plan_of: Any) -> None:
    x = at(0, 0, 90, 90)
    plan = plan_of("mctf", 3, x, received=[0.4, 0.3, 0.2, 0.1])
    assert plan.slot.tolist() == [[0, 1, 2, 2]]
    plan = plan_of("mctf", 3, x, received=[0.1, 0.2, 0.3, 0.4])
    assert plan.slot.tolist() == [[0, 0, 1, 2]]


def test_of_equally_similar_pairs_the_smaller_fuses(at: Any, plan_of: Any) -> None:
    x = at(0, 0, 90, 90)
    plan = plan_of("mctf", 3, x, received=EQUAL[:4], size=[3, 3, 1, 2])
    assert plan.slot.tolist() == [[0, 1, 2, 2]]
    plan = plan_of("mctf", 3, x, received=EQUAL[:4], size=[1, 1, 3, 2])
    assert plan.slot.tolist() == [[0, 0, 1, 2]]


def test_a_low_temperature_lets_a_criterion_outweigh_similarity(at: Any, plan_of: Any) -> None:
    # 0 -> 1 at 20 degrees with little attention, 2 -> 3 at none with much.
    x, received = at(0, 20, 90, 90), [0.1, 0.1, 0.4, 0.4]
    assert plan_of("mctf", 3, x, received=received).slot.tolist() == [[0, 0, 1, 2]]
    plan = plan_of("mctf", 3, x, received=received, options={"tau_i": 1000.0})
    assert plan.slot.tolist() == [[0, 1, 2, 2]]


def test_tokens_weigh_by_attention_received_times_size(plan_of: Any) -> None:
    plan = plan_of("mctf", 1, torch.eye(3), received=[0.5, 0.25, 0.25], size=[1, 2, 3])
    assert plan.weight.tolist() == [[0.5, 0.5, 0.75]]
    assert plan.slot.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("tau", ["tau_s", "tau_i", "tau_z"])
def test_temperatures_are_positive(tau: str) -> None:
    with pytest.raises(OptionError, match=tau):
        methods.build("mctf", {tau: 0})


@pytest.fixture
def vit() -> nn.Module:
    return family.registry()["timm"].tiny()["vit"]()


def test_what_is_received_is_the_column_mean_of_the_blocks_attention(
    vit: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    mergence.apply(vit, "mctf", schedule=[36, 24, 24, 12, 12, 12])
    rule, seen, maps = methods.registry()["mctf"], [], []
    plan = rule.plan
    monkeypatch.setattr(
        rule, "plan", lambda self, view, slots: (seen.append(view), plan(self, view, slots))[1]
    )
    for block in (vit.blocks[1], vit.blocks[3]):  # the second one with sizes in its attention
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, x, y: maps.append(y))
    with torch.no_grad():
        vit(torch.randn(2, 3, 96, 96))
    assert len(seen) == len(maps) == 2
    for view, attention in zip(seen, maps, strict=True):
        expected = attention.mean(dim=(1, 2))[:, 1:]
        torch.testing.assert_close(view.received, expected, rtol=1e-4, atol=1e-7)


def test_the_attention_map_is_counted(vit: nn.Module) -> None:
    mergence.apply(vit, "mctf", schedule=[36, 24, 24, 12, 12, 12])
    found = mergence.describe(vit).reduced
    assert found.importance == (37**2 + 25**2) * 48
    assert found.planning == (18 * 18 + 12 * 12) * 48
