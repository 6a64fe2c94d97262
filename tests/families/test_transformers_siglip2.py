"""SigLIP 2 NaFlex: patches of images of any size, padded to one length; alone and in LFM2-VL."""

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
from mergence.method import names
from mergence.program import program_of

SMALL = {"hidden_size": 48, "num_attention_heads": 3, "intermediate_size": 96}
VISION = SMALL | {"num_hidden_layers": 6, "patch_size": 4, "num_patches": 36}
GRIDS = torch.tensor([[6, 6], [6, 2], [6, 6], [2, 10]])
PATCHES = [36, 12, 36, 20]


@pytest.fixture
def tower() -> Any:
    config = transformers.Siglip2VisionConfig(**VISION)
    return randomised(transformers.Siglip2VisionModel(config)).eval()


@pytest.fixture
def inputs() -> dict[str, Tensor]:
    """Four images, two of them of one grid, all padded to 40 patches."""
    mask = torch.arange(40) < torch.tensor(PATCHES)[:, None]
    pixels = torch.randn(4, 40, 48, generator=torch.Generator().manual_seed(1))
    return {
        "pixel_values": pixels * mask[..., None],
        "pixel_attention_mask": mask.int(),
        "spatial_shapes": GRIDS,
    }


def of_one(inputs: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """One of them, without padding."""
    patches = PATCHES[index]
    return {
        name: x[index : index + 1] if name == "spatial_shapes" else x[index : index + 1, :patches]
        for name, x in inputs.items()
    }


def hidden(x: Tensor) -> Tensor:
    """The tokens of the images, one image after the other, without padding."""
    return torch.cat([image[:patches] for image, patches in zip(x, PATCHES, strict=True)])


@torch.no_grad()
def test_a_reduced_tower_gives_out_what_a_dense_one_does_in_shape(
    tower: Any, inputs: dict[str, Tensor]
) -> None:
    expected = tower(**inputs, output_hidden_states=True)
    first, alone = of_one(inputs, 0), tower(**of_one(inputs, 0))
    mergence.apply(tower, macs=1.0)
    found = tower(**first)
    assert torch.equal(found.last_hidden_state, alone.last_hidden_state)
    assert torch.equal(found.pooler_output, alone.pooler_output)
    # The library attends to padded images with a mask.
    found = tower(**inputs)
    torch.testing.assert_close(hidden(found[0]), hidden(expected[0]))
    torch.testing.assert_close(found.pooler_output, expected.pooler_output)
    mergence.apply(tower, macs=0.6)
    found = tower(**inputs, output_hidden_states=True)
    assert not torch.allclose(hidden(found[0]), hidden(expected[0]))
    assert [x.shape for x in found.hidden_states] == [x.shape for x in expected.hidden_states]
    assert found.last_hidden_state.shape == (4, 40, 48)
    assert not found.last_hidden_state[1, 12:].any()
    assert found.pooler_output.shape == (4, 48)
    as_tuple = tower(**inputs, return_dict=False)
    assert torch.equal(as_tuple[0], found.last_hidden_state)
    assert torch.equal(as_tuple[1], found.pooler_output)
    with mergence.disabled(tower):
        for one, other in zip(tower(**inputs)[:2], expected[:2], strict=True):
            assert torch.equal(one, other)
    assert torch.equal(mergence.remove(tower)(**inputs)[0], expected[0])


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_the_restated_blocks_compute_what_the_library_does(
    tower: Any, inputs: dict[str, Tensor], kernel: str
) -> None:
    tower.set_attn_implementation(kernel)
    expected = tower(**inputs)[0]
    mergence.apply(tower, macs=1.0)
    laps = list[str]()
    program_of(tower).run.clock = laps.append  # with a clock every block is restated
    found = tower(**inputs)[0]
    assert laps == ["rest", "attention", "mlp"] * 6 * 3  # two images are one batch
    torch.testing.assert_close(hidden(found), hidden(expected))


@torch.no_grad()
@pytest.mark.parametrize("method", names())
def test_every_image_is_reduced_by_itself(
    tower: Any, inputs: dict[str, Tensor], method: str
) -> None:
    mergence.apply(tower, method, macs=0.7)
    together = tower(**inputs)
    alone = [tower(**of_one(inputs, index)) for index in range(4)]
    states = torch.cat([one.last_hidden_state[0] for one in alone])
    torch.testing.assert_close(hidden(together.last_hidden_state), states)
    pooled = torch.cat([one.pooler_output for one in alone])
    torch.testing.assert_close(together.pooler_output, pooled)


@torch.no_grad()
def test_every_patch_has_its_value_and_slots_are_as_many_as_planned(
    tower: Any, inputs: dict[str, Tensor], merges: Any, by_hand: Any
) -> None:
    mergence.apply(tower, macs=0.6)
    tokens: list[Tensor] = []
    for block in tower.encoder.layers:
        block.register_forward_hook(lambda *a: tokens.append(a[2]))
    for index, patches in enumerate(PATCHES):
        merges.clear()
        tokens.clear()
        states = tower(**of_one(inputs, index), output_hidden_states=True).hidden_states[1:]
        planned = program_of(tower).counts(patches)
        for after, count, state in zip(tokens, planned, states, strict=True):
            assert after.shape[1] == count
            torch.testing.assert_close(state, by_hand(after, merges), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_head_reads_a_merged_token_as_often_as_its_patches(
    tower: Any, inputs: dict[str, Tensor]
) -> None:
    tower.double()
    one = of_one(inputs, 0)
    one["pixel_values"] = one["pixel_values"].double()
    mergence.apply(tower, keep_rate=0.5)
    given: list[Any] = []
    run = program_of(tower).run
    handle = tower.head.register_forward_pre_hook(
        lambda _, inputs: given.extend([inputs[0][0], run.carry.size[0].int()])
    )
    pooled = tower(**one).pooler_output
    handle.remove()
    tokens, times = given
    assert times.sum() == 36
    mergence.remove(tower)
    expected = tower.head(tokens.repeat_interleave(times, dim=0)[None])
    # Sizes are float32.
    torch.testing.assert_close(pooled, expected, rtol=1e-6, atol=1e-6)


def test_macs_are_what_a_counter_finds(tower: Any, inputs: dict[str, Tensor]) -> None:
    tower.set_attn_implementation("eager")
    one = of_one(inputs, 0)

    def counted() -> int:
        # The positions, by a product of their own, are no work of the model's.
        positions = tower.embeddings.resize_positional_embeddings
        tower.embeddings.resize_positional_embeddings = lambda *a, **b: 0
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            tower(**one)
        tower.embeddings.resize_positional_embeddings = positions
        macs: int = counter.get_total_flops() // 2
        return macs

    program = program_of(mergence.apply(tower, "random", schedule=[36, 24, 24, 12, 12, 12]))
    # A merge is no product on CPUs, and those of the head's query with 12 tokens are in an operator
    # that the counter does not know.
    assert program.macs().total - program.macs().merging == counted() + 2 * 12 * 48
    with mergence.disabled(tower):
        assert program.macs(dense=True).total == counted()


def test_gradients_flow_and_checkpointing_changes_nothing(
    tower: Any, inputs: dict[str, Tensor], checkpointed: Any
) -> None:
    mergence.apply(tower.train(), macs=0.6)

    def loss() -> Tensor:
        outputs = tower(**inputs)
        return outputs.last_hidden_state.square().sum() + outputs.pooler_output.square().sum()

    checkpointed(tower, loss)


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_it_runs_in_bfloat16_by_either_attention(
    tower: Any, inputs: dict[str, Tensor], kernel: str
) -> None:
    tower.set_attn_implementation(kernel)
    expected = mergence.apply(tower, macs=0.6)(**inputs).pooler_output
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    found = tower.bfloat16()(**inputs).pooler_output
    assert found.dtype == torch.bfloat16
    assert torch.cosine_similarity(found.float(), expected, dim=-1).mean() > 0.8


@torch.no_grad()
def test_one_shape_is_that_of_all_images(tower: Any, inputs: dict[str, Tensor]) -> None:
    inputs = of_one(inputs, 0)
    inputs["pixel_values"] = torch.randn(3, 36, 48)
    inputs["pixel_attention_mask"] = torch.ones(3, 36, dtype=torch.int)
    expected = tower(**inputs)
    found = mergence.apply(tower, macs=1.0)(**inputs)
    assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
    assert torch.equal(found.pooler_output, expected.pooler_output)
    assert mergence.apply(tower, macs=0.6)(**inputs).pooler_output.shape == (3, 48)


def test_what_cannot_be_right_is_refused(
    tower: Any, inputs: dict[str, Tensor], unscaled: Any
) -> None:
    mergence.apply(tower, schedule=unscaled([36, 18, 18, 18, 18, 18]))
    with pytest.raises(ReducedOutputError, match="output_attentions"):
        tower(**of_one(inputs, 0), output_attentions=True)
    with pytest.raises(ScheduleError, match="Counts"):
        tower(**inputs)
    mergence.apply(tower, macs=0.6)
    for hole in (0, 12):
        other = {**inputs, "pixel_attention_mask": inputs["pixel_attention_mask"].clone()}
        other["pixel_attention_mask"][1, hole] = 1 - other["pixel_attention_mask"][1, hole]
        with pytest.raises(ReducedOutputError, match=r"12 patches, and padding.*disabled"):
            tower(**other)
    with pytest.raises(ReducedOutputError, match=r"no pixel_attention_mask.* 36 patches.*to 40"):
        tower(inputs["pixel_values"], None, GRIDS)
    one = of_one(inputs, 0)
    assert tower(one["pixel_values"], None, GRIDS[:1]).pooler_output.shape == (1, 48)
    for shapes in (GRIDS[:3], GRIDS.repeat(2, 1)):
        with pytest.raises(ReducedOutputError, match=rf"4 images, and {len(shapes)} spatial_sh"):
            tower(**{**inputs, "spatial_shapes": shapes})
    tower.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ReducedOutputError, match="set_attn_implementation"):
        tower(**inputs)


def around(kind: str) -> Any:
    """A model with this tower, and what else it is asked with."""
    if kind == "lfm2-vl":
        text = SMALL | {"num_hidden_layers": 2, "num_key_value_heads": 3, "vocab_size": 64}
        text |= {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]}
        vision = VISION | {"model_type": "siglip2_vision_model", "vision_use_head": False}
        config = transformers.Lfm2VlConfig(
            vision_config=vision,
            text_config=text | {"pad_token_id": 1},
            image_token_id=5,
            projector_hidden_size=48,
        )
        # 2 x 2 patches are one token of the prompt.
        prompt = torch.tensor([[7, *[5] * 9, 8, *[5] * 3, 8, *[5] * 9, 8, *[5] * 5, 9, 10]])
        return transformers.Lfm2VlForConditionalGeneration(config), {"input_ids": prompt}
    text = SMALL | {"num_hidden_layers": 1, "vocab_size": 64, "projection_size": 48}
    config = transformers.Siglip2Config(vision_config=VISION, text_config=text, num_labels=5)
    if kind == "classifier":
        return transformers.Siglip2ForImageClassification(config), {}
    return transformers.Siglip2Model(config), {"input_ids": torch.tensor([[1, 5, 9, 2]])}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["classifier", "with text", "lfm2-vl"])
def test_models_around_it_are_reduced_whole(kind: str, inputs: dict[str, Tensor]) -> None:
    model, more = around(kind)
    randomised(model).eval()

    def call() -> Tensor:
        outputs = model(**inputs, **more)
        found: Tensor = outputs.logits if "logits" in outputs else outputs.logits_per_image
        return found

    expected, keys = call(), list(model.state_dict())
    mergence.apply(model, macs=1.0)
    torch.testing.assert_close(call(), expected, rtol=1e-4, atol=1e-5)
    mergence.apply(model, macs=0.6)
    assert list(model.state_dict()) == keys
    assert mergence.describe(model).counts[-1] < 36
    found = call()
    assert found.shape == expected.shape
    assert (found - expected).abs().max() > 1e-3
    with mergence.disabled(model):
        assert torch.equal(call(), expected)
    mergence.remove(model)
    assert torch.equal(call(), expected)


def test_a_model_around_another_tower_is_refused() -> None:
    model, _ = around("lfm2-vl")
    model.model.vision_tower = nn.Identity()
    with pytest.raises(UnsupportedModelError, match=r"Lfm2Vl.* has none of the towers"):
        mergence.apply(model, macs=0.6)
