"""apply and describe, as a user writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

import mergence
from mergence import family
from mergence.errors import MergenceError, ScheduleError
from mergence.method import build
from mergence.program import program_of
from mergence.schedule import Constant


@pytest.fixture
def vit() -> nn.Module:
    return family.registry()["timm"].tiny()["vit"]()


def test_the_ways_to_apply_in_the_documentation_work(vit: nn.Module, tmp_path: Path) -> None:
    mergence.apply(vit, macs=0.67)
    assert mergence.describe(vit).method.name == "mergence"
    mergence.apply(vit, "tome", r=3)
    assert mergence.describe(vit).counts == (33, 30, 27, 24, 21, 18)
    method = build("mergence", {"alpha": 0.125})
    mergence.apply(vit, method, schedule=[36] * 3 + [20] * 3)
    assert mergence.describe(vit).method is method
    assert mergence.describe(vit).counts == (36, 36, 36, 20, 20, 20)
    mergence.recipe_of(vit).save(tmp_path / "recipe.json")
    mergence.apply(vit, str(tmp_path / "recipe.json"))
    assert mergence.describe(vit).method == method
    mergence.apply(vit, mergence.Recipe(method, Constant(r=1), align=2))
    assert mergence.describe(vit).counts == (35, 35, 33, 31, 31, 31)


@torch.no_grad()
def test_an_image_too_small_for_the_budget_has_the_strongest_schedule() -> None:
    size = {"embed_dim": 48, "num_heads": 3, "img_size": 96, "dynamic_img_size": True}
    model = timm.create_model("vit_tiny_patch16_224", **size).eval()
    program = program_of(mergence.apply(model, macs=0.5, align=1))
    for side in (16, 32, 48, 96):
        assert model(torch.randn(1, 3, side, side)).shape == (1, 1000)
    strongest = program.macs(4).total / program.macs(4, dense=True).total
    assert program.counts(4)[1] == 1  # from the first step on
    assert 0.5 < strongest < 0.6
    with pytest.raises(ScheduleError, match="out of reach"):
        mergence.apply(model, macs=0.01)


def test_options_of_a_method_given_by_name_reach_it(vit: nn.Module) -> None:
    mergence.apply(vit, "mergence", macs=0.8, alpha=0.5, size_attention=False)
    assert mergence.recipe_of(vit).method == build(
        "mergence", {"alpha": 0.5, "size_attention": False}
    )


@torch.no_grad()
def test_blocks_before_the_first_reduction_compute_what_they_did(vit: nn.Module) -> None:
    seen: list[torch.Tensor] = []
    vit.blocks[1].register_forward_hook(lambda module, x, y: seen.append(y))
    image = torch.randn(2, 3, 96, 96)
    vit(image)
    mergence.apply(vit, "topk", schedule=[36, 36, 30, 30, 20, 20])
    vit(image)
    assert torch.equal(*seen)


def test_size_attention_changes_what_follows_a_merge_and_nothing_before(vit: nn.Module) -> None:
    leaving: list[torch.Tensor] = []
    for block in vit.blocks:
        block.register_forward_hook(lambda module, x, y: leaving.append(y))
    x, n = torch.randn(1, 3, 96, 96), len(vit.blocks)
    for size_attention in (False, True):
        mergence.apply(
            vit, "mergence", schedule=[36, 20, 20, 20, 20, 20], size_attention=size_attention
        )
        vit(x)
    equal = [torch.equal(leaving[i], leaving[n + i]) for i in range(n)]
    assert equal == [True, True, False, False, False, False]


def test_size_attention_is_a_factor_and_true_is_one(vit: nn.Module) -> None:
    x, schedule = torch.randn(1, 3, 96, 96), [36, 20, 20, 20, 20, 20]
    outputs = []
    for size_attention in (0.0, 0.5, 1.0, True):
        mergence.apply(vit, schedule=schedule, size_attention=size_attention)
        outputs.append(vit(x))
    assert torch.equal(outputs[2], outputs[3])
    distance = [float((y - outputs[2]).norm().detach()) for y in outputs]
    assert distance[0] > distance[1] > 0
    assert mergence.recipe_of(vit).method == build("mergence", {})


def test_a_description_prints_and_is_json(vit: nn.Module) -> None:
    description = mergence.describe(mergence.apply(vit, "evit", keep_rate=0.7))
    text, data = str(description), json.loads(json.dumps(description.to_dict()))
    assert "36 → 36 26 26 19 14 14  (+ 1 prefix, alone in the last MLP)" in text
    assert f"{description.macs_ratio:.1%}" in text
    assert data["counts"] == [36, 26, 26, 19, 14, 14]
    assert data["macs_ratio"] == pytest.approx(data["gmacs"] / data["gmacs_dense"])
    assert (data["model"], data["family"], data["prefix"]) == ("VisionTransformer", "timm", 1)


def test_a_model_that_was_changed_since_is_to_be_reduced_anew(vit: Any) -> None:
    mergence.apply(vit, macs=0.7)
    vit.set_input_size(img_size=192)
    with pytest.raises(MergenceError, match=r"144 patches and had 36.*Apply again"):
        mergence.describe(vit)
    assert mergence.describe(mergence.apply(vit, mergence.recipe_of(vit))).patches == 144
    vit.reset_classifier(5000)
    with pytest.raises(MergenceError, match=r"such as its head, has another size.*Apply again"):
        mergence.describe(vit)
    mergence.apply(vit, mergence.recipe_of(vit))
    vit.reset_classifier(5, global_pool="avg")
    with pytest.raises(MergenceError, match=r"has patch tokens for its head to read and had the"):
        mergence.describe(vit)
    mergence.apply(vit, mergence.recipe_of(vit))
    vit.prune_intermediate_layers([2])
    with pytest.raises(MergenceError, match=r"3 blocks and had 6"):
        mergence.describe(vit)


def test_a_learned_module_follows_the_models_dtype_and_mode(vit: nn.Module) -> None:
    mergence.apply(vit.to(torch.bfloat16).train(), "mstm", keep_rate=0.7, fusion=True)
    learned = next(m for name, m in vit.named_modules() if name.endswith(".mergence"))
    assert {p.dtype for p in learned.parameters()} == {torch.bfloat16}
    assert learned.training
