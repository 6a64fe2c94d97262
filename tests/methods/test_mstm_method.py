"""The seed's method: top-k crucial tokens, the rest merged into what they resemble."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import mergence
from mergence import family
from mergence import method as methods
from mergence.errors import OptionError
from mergence.multiscale import MultiScaleFusion


def test_the_rest_joins_the_crucial_token_it_resembles(plan_of: Any) -> None:
    x = [(1.0, 0.1), (1.0, 0.0), (0.2, 1.0), (0.0, 3.0), (9.0, 1.0)]
    plan = plan_of("mstm", 2, x, importance=[0.1, 0.5, 0.2, 0.4, 0.3])
    assert plan.slot.tolist() == [[0, 0, 1, 1, 0]]


def test_redundancy_does_not_save_a_token(plan_of: Any) -> None:
    # Tokens 0 and 1 are copies and both crucial; token 2 is unlike any and leaves all the same.
    plan = plan_of("mstm", 2, [(1.0, 0.0), (1.0, 0.0), (-0.1, 1.0)], importance=[3, 2, 1])
    assert plan.slot[0, :2].tolist() == [0, 1]


def test_tokens_weigh_by_size_and_nothing_is_dropped(plan_of: Any) -> None:
    size = [[2.0, 7.0, 1.0]]
    plan = plan_of("mstm", 1, torch.randn(3, 2), importance=[1, 2, 3], size=size)
    assert plan.weight.tolist() == size
    assert plan.slot.tolist() == [[0, 0, 0]]


def test_nan_importance_is_never_crucial(plan_of: Any) -> None:
    plan = plan_of("mstm", 2, torch.eye(3), importance=[float("nan"), 0.1, 0.2])
    assert plan.slot[0, 1:].tolist() == [0, 1]


def test_fusion_takes_only_true_or_false() -> None:
    with pytest.raises(OptionError, match="fusion is 1; give True or False"):
        methods.build("mstm", {"fusion": 1})


@pytest.fixture
def vit() -> nn.Module:
    return family.registry()["timm"].tiny()["vit"]()


def test_fusion_is_exactly_the_identity_when_inserted(vit: nn.Module) -> None:
    x = torch.randn(2, 3, 96, 96)
    expected = mergence.apply(vit, "mstm", keep_rate=0.7)(x)
    assert torch.equal(mergence.apply(vit, "mstm", keep_rate=0.7, fusion=True)(x), expected)


def test_trained_fusion_changes_the_output_and_survives_applying_again(vit: nn.Module) -> None:
    x = torch.randn(2, 3, 96, 96)
    plain = mergence.apply(vit, "mstm", keep_rate=0.7, fusion=True)(x)
    module = next(m for m in vit.modules() if isinstance(m, MultiScaleFusion))
    nn.init.normal_(module.gates)
    trained = vit(x)
    assert not torch.equal(trained, plain)
    mergence.apply(vit, "mstm", keep_rate=0.7, fusion=True)
    assert torch.equal(vit(x), trained)


def test_fusion_adds_keys_below_one_reserved_name_in_one_block(vit: nn.Module) -> None:
    before = set(vit.state_dict())
    added = set(mergence.apply(vit, "mstm", keep_rate=0.7, fusion=True).state_dict()) - before
    parents = {key.partition(".mergence.")[0] for key in added}
    assert len(parents) == 1
    assert parents.pop().startswith("blocks.")
    assert set(mergence.remove(vit).state_dict()) == before


def test_fusion_is_counted_and_costs_under_three_percent_of_deit_small() -> None:
    import timm

    with torch.device("meta"):
        model = timm.create_model("deit_small_patch16_224")
    found = mergence.describe(mergence.apply(model, "mstm", keep_rate=0.7, fusion=True))
    assert found.reduced.learned == MultiScaleFusion(384).macs(196)
    assert 0 < found.reduced.learned < 0.03 * found.dense.total


def test_fusion_looks_at_neighbours_only() -> None:
    module = MultiScaleFusion(2)
    nn.init.ones_(module.gates)
    x = torch.randn(1, 12 * 10, 2)
    moved = x.clone()
    moved[0, 0] += 1  # the top left corner
    changed = (module(moved, (12, 10)) != module(x, (12, 10))).any(dim=2).reshape(12, 10)
    assert changed[:4, :4].any()
    assert not changed[4:].any()
    assert not changed[:, 4:].any()
