"""Pixtral's tower, which packs images of several sizes, alone and inside Mistral 3 and others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import mergence
from mergence.errors import ReducedOutputError, ScheduleError, UnsupportedModelError
from mergence.families._common import randomised
from mergence.families.transformers_pixtral import FAMILY
from mergence.method import names
from mergence.program import program_of

TOWER = {
    "hidden_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 96,
    "patch_size": 16,
}
TEXT = {
    "hidden_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 96,
    "vocab_size": 64,
    "pad_token_id": 1,
}
LARGE = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "kv_lora_rank": 24,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
    "moe_intermediate_size": 32,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 64,
}
"""Of Mistral Large 4 besides."""
# Two of 6 x 6 patches that follow each other, one of 4 x 3 and one of 6 x 4, padded to the largest.
SIZES = torch.tensor([[96, 96], [96, 96], [64, 48], [96, 64]])
PATCHES = [36, 36, 12, 24]
AROUND = FAMILY.models[1:]


@pytest.fixture
def tower() -> Any:
    config = transformers.PixtralVisionConfig(**TOWER)
    return randomised(transformers.PixtralVisionModel(config)).eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 96, 96, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_reduced_tower_gives_out_what_a_dense_one_does_in_shape(
    tower: Any, images: Tensor
) -> None:
    expected = tower(images, SIZES, output_hidden_states=True)
    of_one_size = tower(images)
    mergence.apply(tower, macs=1.0)
    assert torch.equal(tower(images)[0], of_one_size[0])
    # The library attends to images of all sizes in one product.
    torch.testing.assert_close(tower(images, SIZES)[0], expected[0])
    mergence.apply(tower, macs=0.6)
    found = tower(images, SIZES.tolist(), output_hidden_states=True)
    assert not torch.allclose(found[0], expected[0])
    shapes = [x.shape for x in expected.hidden_states]
    assert [x.shape for x in found.hidden_states] == shapes
    assert found.last_hidden_state.shape == shapes[0]
    with mergence.disabled(tower):
        assert torch.equal(tower(images, SIZES)[0], expected[0])
    assert torch.equal(mergence.remove(tower)(images, SIZES)[0], expected[0])


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_the_restated_blocks_compute_what_the_library_does(
    tower: Any, images: Tensor, kernel: str
) -> None:
    tower.set_attn_implementation(kernel)
    expected = tower(images, SIZES)[0]
    mergence.apply(tower, macs=1.0)
    laps = list[str]()
    program_of(tower).run.clock = laps.append  # with a clock every block is restated
    # In turn: the first two images are one batch.
    found = [tower(images[i], SIZES[i])[0] for i in (slice(1), slice(1, 2), slice(2, 4))]
    assert laps == ["rest", "attention", "mlp"] * 6 * 4
    torch.testing.assert_close(torch.cat(found, dim=1), expected)


@torch.no_grad()
@pytest.mark.parametrize("method", names())
def test_every_image_is_reduced_by_itself(tower: Any, images: Tensor, method: str) -> None:
    mergence.apply(tower, method, macs=0.7)
    together = tower(images, SIZES)[0]
    alone = [tower(images[i : i + 1], SIZES[i : i + 1])[0] for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone, dim=1))


@torch.no_grad()
def test_every_patch_has_its_value_and_slots_are_as_many_as_planned(
    tower: Any, images: Tensor, merges: Any, by_hand: Any
) -> None:
    mergence.apply(tower, macs=0.6)
    tokens: list[Tensor] = []
    for block in tower.transformer.layers:
        block.register_forward_hook(lambda *a: tokens.append(a[2]))
    for image, size, patches in zip(images, SIZES, PATCHES, strict=True):
        merges.clear()
        tokens.clear()
        states = tower(image[None], size[None], output_hidden_states=True).hidden_states[1:]
        planned = program_of(tower).counts(patches)
        for after, count, state in zip(tokens, planned, states, strict=True):
            assert after.shape[1] == count
            torch.testing.assert_close(state, by_hand(after, merges), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_a_merged_token_is_turned_to_the_place_of_its_most_important_patch(
    tower: Any, images: Tensor
) -> None:
    tower.double()
    mergence.apply(tower, "topk", schedule=[36, 20, 20, 20, 20, 20], size_attention=False)
    calls: list[Any] = []
    block = tower.transformer.layers[3]
    block.register_forward_hook(
        lambda _, inputs, options, y: calls.append((inputs[0], options, y)), with_kwargs=True
    )
    point = mergence.trace(tower, images[:1].double()).points[0]
    x, options, y = calls[0]
    rope = [table[point.anchor[0]] for table in options["position_embeddings"]]
    with mergence.disabled(tower):
        torch.testing.assert_close(block(x, None, rope), y, rtol=1e-6, atol=1e-6)
        elsewhere = [table.flip(0) for table in rope]
        assert not torch.allclose(block(x, None, elsewhere), y, rtol=1e-2)


def test_macs_are_what_a_counter_finds(tower: Any, images: Tensor) -> None:
    tower.set_attn_implementation("eager")

    def counted() -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            tower(images[:1])
        macs: int = counter.get_total_flops() // 2
        return macs

    program = program_of(mergence.apply(tower, "random", schedule=[36, 24, 24, 12, 12, 12]))
    # On CPUs importance is a product that the counter sees, and a merge none.
    assert program.macs().total - program.macs().merging == counted()
    with mergence.disabled(tower):
        assert program.macs(dense=True).total == counted()


def test_gradients_flow_and_checkpointing_changes_nothing(
    tower: Any, images: Tensor, checkpointed: Any
) -> None:
    mergence.apply(tower.train(), macs=0.6)
    checkpointed(tower, lambda: tower(images, SIZES)[0].square().sum())


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_it_runs_in_bfloat16_by_either_attention(tower: Any, images: Tensor, kernel: str) -> None:
    tower.set_attn_implementation(kernel)
    expected = mergence.apply(tower, macs=0.6)(images, SIZES)[0]
    found = tower.bfloat16()(images.bfloat16(), SIZES)[0]
    assert found.dtype == torch.bfloat16
    assert torch.cosine_similarity(found.float(), expected, dim=-1).mean() > 0.8


def test_what_cannot_be_right_is_refused(tower: Any, images: Tensor, unscaled: Any) -> None:
    mergence.apply(tower, schedule=unscaled([36, 18, 18, 18, 18, 18]))
    with pytest.raises(ReducedOutputError, match="output_attentions"):
        tower(images, output_attentions=True)
    with pytest.raises(ReducedOutputError, match="called by itself"):
        tower.transformer.layers[0](torch.randn(1, 36, 48), None)
    with pytest.raises(ScheduleError, match="Counts"):
        tower(images, SIZES)
    tower.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ReducedOutputError, match="set_attn_implementation"):
        tower(images)


def around(name: str) -> Any:
    """A model of image and language with this tower."""
    module, _, cls = name.rpartition(".")
    kind = getattr(pytest.importorskip(module), cls)
    options = {
        "vision_config": TOWER | {"model_type": "pixtral"},
        "text_config": TEXT | (LARGE if "Large4" in cls else {}),
        "image_token_id": 5,
        "image_token_index": 5,
    }
    if cls.startswith("Mistral3"):
        options["text_config"]["model_type"] = "mistral"
    return randomised(kind(kind.config_class(**options))).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", AROUND, ids=lambda name: name.rpartition(".")[2])
def test_models_of_image_and_language_are_reduced_whole(name: str, images: Tensor) -> None:
    model = around(name)
    # 2 x 2 patches are one token of the prompt.
    prompt = torch.tensor([[7, *[5] * 18, 8, *[5] * 2, 8, *[5] * 6, 9, 10]])
    inputs = {"input_ids": prompt, "pixel_values": images, "image_sizes": SIZES}
    expected, keys = model(**inputs)[0], list(model.state_dict())
    mergence.apply(model, macs=1.0)
    torch.testing.assert_close(model(**inputs)[0], expected, rtol=1e-4, atol=1e-5)
    mergence.apply(model, macs=0.6)
    assert list(model.state_dict()) == keys
    found = model(**inputs)[0]
    assert found.shape == expected.shape
    assert (found - expected).abs().max() > 1e-2
    with mergence.disabled(model):
        assert torch.equal(model(**inputs)[0], expected)
    assert torch.equal(mergence.remove(model)(**inputs)[0], expected)


def test_a_model_around_another_tower_is_refused() -> None:
    model = around(AROUND[0])
    model.vision_tower = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="Mistral3Model has none of the towers"):
        mergence.apply(model, macs=0.6)


@torch.no_grad()
def test_inside_llava_the_tower_is_reduced_by_itself(images: Tensor) -> None:
    text, tower = TEXT | {"model_type": "llama"}, TOWER | {"model_type": "pixtral"}
    options = {"image_token_index": 5, "vision_feature_select_strategy": "full"}
    config = transformers.LlavaConfig(
        vision_config=tower, text_config=text, vision_feature_layer=-1, **options
    )
    model = randomised(transformers.LlavaForConditionalGeneration(config)).eval()
    with pytest.raises(UnsupportedModelError, match=r"apply\(model\.model\.vision_tower,"):
        mergence.apply(model, macs=0.6)
    prompt = torch.tensor([[7, *[5] * sum(PATCHES), 9, 10]])
    inputs = {"input_ids": prompt, "pixel_values": images, "image_sizes": SIZES}
    expected = model(**inputs).logits
    mergence.apply(model.model.vision_tower, macs=0.6)
    found = model(**inputs).logits
    assert found.shape == expected.shape
    assert (found - expected).abs().max() > 1e-2
    with mergence.disabled(model):
        assert torch.equal(model(**inputs).logits, expected)


def test_patches_are_counted_by_image_where_the_library_packs_a_batch(
    tower: Any, images: Tensor
) -> None:
    found = mergence.calibrate(tower, [images], budgets=[0.6], trials=0, tune=False).found[0]
    assert found.recipe.schedule.to_dict()["of"] == 36
