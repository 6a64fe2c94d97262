"""MACs: against published numbers, and against a counter that watches the model run."""

from __future__ import annotations

import itertools
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

import mergence
from mergence import family, surgery
from mergence.errors import OptionError
from mergence.families import linear_macs
from mergence.macs import count
from mergence.method import names
from mergence.methods import Mstm
from mergence.multiscale import MultiScaleFusion


@pytest.fixture(scope="module")
def deit_small() -> nn.Module:
    """One for all tests of this file: applying replaces."""
    with torch.device("meta"):
        return timm.create_model("deit_small_patch16_224")


def gmacs_of_the_model_alone(model: nn.Module) -> float:
    """As papers count: without what choosing and merging cost, with all tokens in the last MLP."""
    found = mergence.describe(model)
    cost = replace(family.find(model).inspect(model).cost, prefix_alone=False)
    return count(cost, found.patches, (found.start, *found.counts)).total / 1e9


@pytest.mark.parametrize(
    ("method", "how", "tokens", "gmacs", "digits"),
    [
        ("tome", {"r": 0}, 197, 4.6, 1),
        ("tome", {"r": 13}, 41, 2.70, 2),
        ("tome", {"r": 16}, 11, 2.29, 2),
        ("tome", {"r": 8}, 101, 3.42, 2),
        ("tome", {"r": 11}, 65, 2.99, 2),
        ("evit", {"keep_rate": 0.9}, 145, 4.0, 1),
        ("evit", {"keep_rate": 0.7}, 69, 3.0, 1),
        ("evit", {"keep_rate": 0.5}, 26, 2.3, 1),
    ],
)
def test_deit_small_costs_what_papers_print(
    deit_small: nn.Module, method: str, how: Any, tokens: int, gmacs: float, digits: int
) -> None:
    mergence.apply(deit_small, method, **how)
    assert mergence.describe(deit_small).counts[-1] + 1 == tokens
    assert round(gmacs_of_the_model_alone(deit_small), digits) == gmacs


def test_dense_deit_small_costs_4_6_gmacs(deit_small: nn.Module) -> None:
    found = mergence.describe(mergence.apply(deit_small, macs=1.0))
    assert found.dense.total / 1e9 == pytest.approx(4.60, abs=0.01)
    assert found.dense == found.reduced


@pytest.mark.parametrize("align", [1, 8])
@pytest.mark.parametrize("method", names())
def test_a_budget_is_kept_and_missed_by_less_than_one_token_a_block(
    deit_small: nn.Module, method: str, align: int
) -> None:
    for macs in (0.5, 0.67, 0.9):
        found = mergence.describe(mergence.apply(deit_small, method, macs=macs, align=align))
        assert found.macs_ratio <= macs
        # One token more (or one step of the alignment) at every place where it reduces.
        assert found.macs_ratio > macs - align * 0.005
        assert all((n + 1) % align == 0 for n in found.counts if n < 196)


def test_every_part_of_reducing_is_counted(deit_small: nn.Module) -> None:
    found = mergence.describe(mergence.apply(deit_small, "mstm", keep_rate=0.7, fusion=True))
    cost, parts = family.find(deit_small).inspect(deit_small).cost, found.reduced
    before, after = (196, 138, 97), (138, 97, 68)
    assert found.counts[2::3] == (196, 138, 97, 68)
    assert parts.importance == sum(n + 1 for n in before) * 384
    assert parts.planning == sum((n - k) * k for n, k in zip(before, after, strict=True)) * 384
    assert parts.merging == sum(before) * 384
    assert parts.learned > 0
    alone = count(cost, 196, (found.start, *found.counts)).total
    assert parts.total == (
        alone + parts.importance + parts.planning + parts.merging + parts.learned
    )


def watched_macs(model: nn.Module) -> int:
    """Multiply-adds of one image as torch's counter sees them."""
    shape = family.find(model).input_shape(model)
    if type(model).__name__ == "Blip2VisionModelWithProjection":
        model = model.vision_model  # what reads its tokens is not counted
    model.requires_grad_(False)  # the counter trips over parameters that are a module's input
    # The counter knows no formula for the CPU's fused kernel, nor for that of MultiheadAttention.
    plain = sdpa_kernel(SDPBackend.MATH)
    with plain, FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.randn(1, *shape))
    flops: int = counter.get_total_flops()
    return flops // 2


def test_the_dense_count_is_what_a_counter_sees(tiny_model: nn.Module) -> None:
    seen = watched_macs(tiny_model)
    assert mergence.describe(mergence.apply(tiny_model, macs=1.0)).dense.total == seen


@pytest.mark.parametrize("coarse", [0.0, 0.5])
def test_the_reduced_count_is_what_a_counter_sees(tiny_model: nn.Module, coarse: float) -> None:
    if coarse and not family.find(tiny_model).inspect(tiny_model).coarse:
        pytest.skip("its patches cannot be read coarsely")
    # random plans without multiplying, so that what is left is the model.
    model = mergence.apply(tiny_model, "random", keep_rate=0.7, coarse=coarse)
    seen, found = watched_macs(model), mergence.describe(model)
    counts = (found.patches, found.start, *found.counts)
    merged = [n for n, k in itertools.pairwise(counts) if k < n]
    assert len(merged) == 3 + bool(coarse)
    # The merge is one multiply-add per token and channel, and so is importance, which is looked at
    # for the places of merged tokens. Counters watch products of matrices: on a CPU importance is
    # one, and the merge looks tokens up and sums them.
    cost, parts = family.find(model).inspect(model).cost, found.reduced
    assert parts.merging == sum(merged) * cost.dim
    looked_at = [cost.prefix + n for n in merged] if cost.placed else []
    assert parts.importance == sum(looked_at) * cost.dim
    assert parts.total - parts.merging == seen


def test_a_head_that_scores_every_token_is_counted_for_each(fresh: Any) -> None:
    model = fresh("timm-vit")
    model.global_pool = ""
    found = mergence.describe(mergence.apply(model, "random", keep_rate=0.7))
    assert found.dense.head == 37 * model.head.weight.numel()
    assert found.reduced.head == (1 + found.counts[-1]) * model.head.weight.numel()
    assert found.reduced.total - found.reduced.merging == watched_macs(model)


def test_adapters_cost_nothing_so_that_merging_them_changes_no_schedule(fresh: Any) -> None:
    class Adapted(nn.Module):  # as peft's
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.base_layer, self.in_features = layer, layer.in_features
            self.out_features = layer.out_features
            self.down = nn.Linear(layer.in_features, 4, bias=False)
            self.up = nn.Linear(4, layer.out_features, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.base_layer(x) + self.up(self.down(x))
            return y

    # Neither do modules that only note how wide they are count as linear layers.
    head: Any = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    head.in_features = 4
    assert linear_macs(head) == 4 * 8 + 8 * 2
    model = fresh("timm-vit")
    plain = mergence.describe(mergence.apply(model, macs=0.6))
    for block in mergence.remove(model).blocks:
        block.attn.qkv = Adapted(block.attn.qkv)
    adapted = mergence.describe(mergence.apply(model, macs=0.6))
    assert (adapted.counts, adapted.dense) == (plain.counts, plain.dense)


def test_a_part_trained_beside_the_original_costs_what_that_does() -> None:
    class Both(nn.Module):  # as peft's modules_to_save
        def __init__(self, layer: nn.Linear) -> None:
            super().__init__()
            self.original_module = layer
            self.modules_to_save = nn.ModuleDict({"default": deepcopy(layer)})

    assert linear_macs(Both(nn.Linear(4, 8))) == linear_macs(Both(Both(nn.Linear(4, 8)))) == 4 * 8


@pytest.mark.filterwarnings("ignore")  # torch means to take the older ones away
@pytest.mark.parametrize(
    "normed",
    [parametrizations.weight_norm, parametrizations.spectral_norm, nn.utils.weight_norm],
    ids=["weight_norm", "spectral_norm", "old weight_norm"],
)
def test_what_a_weight_is_made_of_costs_nothing(normed: Any) -> None:
    assert linear_macs(normed(nn.Linear(4, 8))) == 4 * 8
    attn = nn.MultiheadAttention(8, 2)
    normed(attn.out_proj)
    assert linear_macs(attn) == 4 * 8 * 8


@pytest.mark.parametrize("name", ["timm-vit", "timm_eva-eva02", "timm_beit-beit"])
def test_a_projection_that_does_not_note_its_size_costs_what_is_in_it(
    name: str, fresh: Any
) -> None:
    model = fresh(name)
    dense = mergence.describe(mergence.apply(model, macs=0.6)).dense
    for block in mergence.remove(model).blocks:
        block.attn.proj = nn.Sequential(block.attn.proj)  # as adapters by hand
    assert mergence.describe(mergence.apply(model, macs=0.6)).dense == dense


@pytest.mark.parametrize("macs", [None, -1, float("nan")])
def test_what_a_method_cannot_mean_by_its_macs_is_refused_before_anything_changes(
    macs: Any, fresh: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd(MultiScaleFusion):
        def macs(self, tokens: int) -> int:
            return macs  # type: ignore[no-any-return]

    model = fresh("timm-vit")
    monkeypatch.setattr(Mstm, "learned", lambda self, dim: Odd(dim))
    with pytest.raises(OptionError, match=rf"Mstm\.learned\(dim\)\.macs\(36\) gives {macs}; give"):
        mergence.apply(model, "mstm", macs=0.67)
    monkeypatch.setattr(Mstm, "plan_macs", lambda self, *given: macs)
    with pytest.raises(OptionError, match=rf"Mstm\.plan_macs\(36, .*\) gives {macs}; give"):
        mergence.apply(model, "mstm", macs=0.67)
    assert not any(map(surgery.is_swapped, model.modules()))


@pytest.mark.filterwarnings("ignore")  # torch means to move it elsewhere
def test_quantized_linear_layers_cost_what_they_did() -> None:
    # Their packed weights are no parameters any more, and were taken for nothing.
    model = timm.create_model("vit_tiny_patch16_224", img_size=64).eval()
    dense = mergence.describe(mergence.apply(model, macs=1.0)).dense
    quantized = torch.ao.quantization.quantize_dynamic(mergence.remove(model), {nn.Linear})
    mergence.apply(quantized, macs=0.5)
    assert mergence.describe(quantized).dense == dense
    assert quantized(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
