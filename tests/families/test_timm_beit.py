"""timm's BEiT: restated blocks, the biases of merged tokens, and what importance sees of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergence
from mergence.errors import ReducedOutputError
from mergence.families.timm_beit import first_half, second_half
from mergence.method import build
from mergence.state import Carry

NAME = "beit_base_patch16_224"
BIASES: dict[str, dict[str, Any]] = {
    "own": {},
    "shared": {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True},
    "both": {"use_shared_rel_pos_bias": True, "init_values": None},
    "none": {"use_rel_pos_bias": False, "use_abs_pos_emb": True},
    "v1 large": {"qkv_bias_separate": True, "swiglu_mlp": True, "scale_mlp": True},
}


@pytest.fixture(params=[True, False], ids=["fused", "unfused"])
def fused(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=BIASES)
def model(request: pytest.FixtureRequest, small: Any, fused: bool) -> Any:
    options = BIASES[request.param].copy()
    separate = options.pop("qkv_bias_separate", False)
    model = small(NAME, **options)
    for block in model.blocks:
        block.attn.fused_attn = fused
        block.attn.qkv_bias_separate = separate
    return model


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 64, 64, dtype=torch.float64)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_restated_block_and_its_gradients_are_bit_identical(
    model: Any, dtype: torch.dtype, training: bool
) -> None:
    model.to(dtype)
    block, found = model.blocks[1].train(training), []
    for module in block.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    shared = None if model.rel_pos_bias is None else model.rel_pos_bias().detach()
    x = torch.randn(4, 17, 24, dtype=dtype)
    for run in (
        lambda: block(x, shared),
        lambda: second_half(block, first_half(block, x, shared, Carry(patches=16))[0]),
    ):
        torch.manual_seed(5)
        block.zero_grad()
        y = run()
        y.square().sum().backward()
        found.append([y, *(p.grad.clone() for p in block.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("method", ["topk", "mergence"])
def test_a_token_has_the_biases_of_its_most_important_patch(
    small: Any, method: str, image: Tensor, fused: bool
) -> None:
    # With a shared bias alone the library's own block can be asked: it takes that from outside.
    model = small(NAME, **BIASES["shared"])
    for block in model.blocks:
        block.attn.fused_attn = fused
    mergence.apply(model, method, schedule=[9, 9, 5, 5], size_attention=False)
    calls: list[tuple[Tensor, Tensor]] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, x, y: calls.append((x[0], y)))
    points = mergence.trace(model, image).points
    assert [point.block for point in points] == [1, 3]
    table = model.rel_pos_bias()
    for index, point in ((1, points[0]), (3, points[1])):
        x, y = calls[index]
        biases = []
        for anchor in point.anchor.tolist():
            places = [0, *(1 + patch for patch in anchor)]
            biases.append(torch.stack([table[:, row][:, places] for row in places], dim=1))
        with mergence.disabled(model):
            own = model.blocks[index](x, shared_rel_pos_bias=torch.stack(biases))
            other = model.blocks[index](x, shared_rel_pos_bias=torch.stack(biases).flip(2, 3))
        torch.testing.assert_close(y, own, rtol=1e-12, atol=1e-12)
        assert not torch.allclose(y, other)


@torch.no_grad()
@pytest.mark.parametrize("needs", ["importance", "received"])
def test_methods_see_the_attention_with_its_biases(
    small: Any, image: Tensor, needs: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, maps = small(NAME, **BIASES["both"]), []
    block = model.blocks[1]
    block.attn.fused_attn = False
    block.attn.attn_drop.register_forward_hook(lambda module, x, y: maps.append(y))
    model(image)
    dense = maps.pop().mean(dim=1)
    expected = (dense[:, 0] if needs == "importance" else dense.mean(dim=1))[:, 1:]
    method, seen = build("topk" if needs == "importance" else "mctf", {}), []
    plan = type(method).plan

    def look(self: Any, tokens: Any, slots: int) -> Any:
        seen.append(getattr(tokens, needs))
        return plan(self, tokens, slots)

    monkeypatch.setattr(type(method), "plan", look)
    mergence.apply(model, method, schedule=[16, 12, 12, 12])
    model(image)
    torch.testing.assert_close(seen[0].double(), expected, rtol=1e-5, atol=1e-7)


@torch.no_grad()
@pytest.mark.parametrize("pool", ["avg", "token"])
@pytest.mark.parametrize("method", ["mergence", "tome"])
def test_merging_equal_patches_changes_nothing(
    small: Any, method: str, pool: str, fused: bool
) -> None:
    model = small(NAME, use_shared_rel_pos_bias=True, global_pool=pool)
    for block in model.blocks:
        block.attn.fused_attn = fused
    for module in (model.rel_pos_bias, *(block.attn for block in model.blocks)):
        # What differs from patch to patch; what the class token has is the same for all.
        module.relative_position_bias_table[:-3] = 0
    image = torch.randn(2, 3, 16, 16, dtype=torch.float64).repeat(1, 1, 4, 4)
    expected = model(image)
    mergence.apply(model, method, keep_rate=0.6, size_attention=True)
    # Sizes and weights are float32.
    torch.testing.assert_close(model(image), expected, rtol=1e-5, atol=1e-5)
    mergence.apply(model, method, keep_rate=0.6, size_attention=False)
    if pool == "token":  # where the average is over equal tokens, there is nothing to see
        assert not torch.allclose(model(image), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_heads_average_by_size_and_features_remember_theirs(small: Any, image: Tensor) -> None:
    model = mergence.apply(small(NAME), "mergence", schedule=[16, 6, 6, 6])
    features, size = model.forward_features(image), mergence.trace(model, image).points[-1].size
    assert (size > 1).any()
    mean = (features[:, 1:] * size.double().unsqueeze(2)).sum(dim=1) / 16
    found = model.forward_head(features)
    # The shares are float32.
    torch.testing.assert_close(found, model.head(model.fc_norm(mean)), rtol=1e-6, atol=1e-6)
    assert torch.equal(found, model(image))
    pooled = model.forward_head(features, pre_logits=True)
    assert torch.equal(model.head(pooled), found)
    with pytest.raises(ReducedOutputError, match="sizes are not known"):
        model.forward_head(features.clone())


@torch.no_grad()
def test_intermediates_are_full_grids_also_at_another_size(small: Any) -> None:
    model = small(NAME)
    model.set_input_size((96, 48))
    image = torch.randn(2, 3, 96, 48, dtype=torch.float64)
    expected, dense = model(image), model.forward_intermediates(image, indices=2)
    mergence.apply(model, macs=1.0)
    assert torch.equal(model(image), expected)
    mergence.apply(model, keep_rate=0.5)
    found = model.forward_intermediates(image, indices=2, intermediates_only=True)
    assert [y.shape for y in found] == [y.shape for y in dense[1]] == [(2, 24, 6, 3)] * 2
    mergence.remove(model)
    assert torch.equal(model(image), expected)


def test_the_tables_of_biases_are_no_linear_layers(small: Any) -> None:
    found = mergence.describe(mergence.apply(small(NAME), "random", keep_rate=0.6))
    assert found.dense.attention == 4 * (17 * 4 * 24 * 24 + 2 * 17 * 17 * 24)
    assert found.reduced.importance > 0  # it chooses the places, whatever the method
