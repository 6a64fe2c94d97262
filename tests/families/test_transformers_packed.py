"""Towers that take the packed patches of images of any size: Qwen2-VL, Qwen3-VL, GLM-4V and kin."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mergence
from mergence import schedule
from mergence.errors import OptionError, ReducedOutputError, ScheduleError, UnsupportedModelError
from mergence.families._common import randomised
from mergence.families._transformers_tiny import PACKED
from mergence.families.transformers_packed import TOWERS
from mergence.method import names
from mergence.program import program_of

# Images of 8 x 8, 6 x 4 and 10 x 6 patches, a video of two frames, and one as large as a frame.
GRIDS = torch.tensor([[1, 8, 8], [2, 6, 4], [1, 6, 4], [1, 10, 6]])
FRAMES = torch.tensor([[1, 8, 8], [1, 6, 4], [1, 6, 4], [1, 6, 4], [1, 10, 6]])
NUMBERS = GRIDS.prod(dim=1).tolist()


def named(cls: str) -> str:
    return next(name for name in TOWERS if name.endswith(f".{cls}"))


def tower(name: str) -> Any:
    module, _, cls = name.rpartition(".")
    kind = getattr(import_module(module), cls)
    config = kind.config_class(**PACKED)
    if cls.startswith("Qwen2Vision"):
        config.hidden_size = 32  # of the language model, there
    config._attn_implementation = "sdpa"
    return randomised(kind(config)).eval()


def pixels(model: Any) -> Tensor:
    embed = model.patch_embed.proj.weight
    return torch.randn(sum(NUMBERS), embed[0].numel())


def grids(model: Any) -> Tensor:
    """The grids of these images; the models around GLM-4V's tower give it frames one by one."""
    return FRAMES if type(model).__name__.startswith("Glm4v") else GRIDS


@pytest.fixture(params=TOWERS, ids=lambda name: name.rpartition(".")[2])
def model(request: pytest.FixtureRequest) -> Any:
    return tower(request.param)


@pytest.fixture(params=["Qwen3VLVisionModel", "Qwen2_5_VisionTransformerPretrainedModel"])
def qwen(request: pytest.FixtureRequest) -> Any:
    """Without windows, and with them."""
    return tower(named(request.param))


@pytest.fixture
def deep() -> Any:
    """With features from between the blocks."""
    return tower(named("Qwen3VLVisionModel"))


def parts(outputs: Any) -> dict[str, Tensor]:
    """All tensors that a tower gives out."""
    found = {}
    for name, value in outputs.items():
        each = value if isinstance(value, tuple | list) else [value]
        found |= {f"{name}{index}": one for index, one in enumerate(each) if one is not None}
    return found


def assert_same(found: Any, expected: Any, **tolerance: float) -> None:
    found, expected = parts(found), parts(expected)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **(tolerance or {"rtol": 0, "atol": 0}))


@torch.no_grad()
def test_a_reduced_tower_gives_out_what_a_dense_one_does_in_shape(model: Any) -> None:
    x, grid, keys, kind = pixels(model), grids(model), list(model.state_dict()), type(model)
    expected = model(x, grid, output_hidden_states=True)
    assert_same(mergence.apply(model, macs=1.0)(x, grid, output_hidden_states=True), expected)
    mergence.apply(model, macs=0.6)
    found = model(x, grid, output_hidden_states=True)
    assert list(model.state_dict()) == keys
    shapes = {name: value.shape for name, value in parts(expected).items()}
    assert {name: value.shape for name, value in parts(found).items()} == shapes
    last = next(name for name in shapes if name.startswith(("last", "pooler")))
    assert not torch.allclose(parts(found)[last], parts(expected)[last])
    with mergence.disabled(model):
        assert_same(model(x, grid, output_hidden_states=True), expected)
    assert_same(mergence.remove(model)(x, grid, output_hidden_states=True), expected)
    assert type(model) is kind


@torch.no_grad()
def test_the_restated_blocks_compute_what_the_library_does(model: Any) -> None:
    x, grid = pixels(model).double(), grids(model)
    model.double()
    expected = model(x, grid)
    mergence.apply(model, macs=1.0)
    run, laps = program_of(model).run, list[str]()
    run.clock = laps.append  # with a clock every block is restated
    found = model(x, grid)
    assert laps == ["rest", "attention", "mlp"] * 6 * 3  # the video and the image are one batch
    assert_same(found, expected, rtol=1e-5, atol=1e-6)  # the library rotates in float32


@torch.no_grad()
@pytest.mark.parametrize("method", names())
def test_every_image_and_every_frame_is_reduced_by_itself(qwen: Any, method: str) -> None:
    x = pixels(qwen)
    mergence.apply(qwen, method, macs=0.7)
    together = qwen(x, GRIDS).pooler_output
    frames = [(patches, grid) for patches, grid in zip(x.split(NUMBERS), GRIDS, strict=True)]
    video, grid = frames[1]
    single = grid * torch.tensor([0, 1, 1]) + torch.tensor([1, 0, 0])
    frames[1:2] = [(frame, single) for frame in video.chunk(2)]
    alone = [qwen(patches, grid[None]).pooler_output for patches, grid in frames]
    torch.testing.assert_close(together, torch.cat(alone))


@torch.no_grad()
def test_every_patch_has_its_value_and_slots_are_as_many_as_planned(
    qwen: Any, merges: Any, by_hand: Any
) -> None:
    mergence.apply(qwen, macs=0.6)
    tokens: list[Tensor] = []
    for block in qwen.blocks:
        block.register_forward_hook(lambda *a: tokens.append(a[2]))
    x = pixels(qwen).split(NUMBERS)
    for image, grid in zip(x, GRIDS, strict=True):
        merges.clear()
        tokens.clear()
        states = qwen(image, grid[None], output_hidden_states=True).hidden_states[1:]
        frames, planned = int(grid[0]), program_of(qwen).counts(int(grid[1] * grid[2]))
        for after, count, state in zip(tokens, planned, states, strict=True):
            after = after.view(frames, -1, after.shape[-1])
            assert after.shape[1] == count
            values = by_hand(after, merges).flatten(0, 1)
            torch.testing.assert_close(state, values, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_an_image_that_is_too_small_for_the_multiples_of_a_device_has_other_counts(
    deep: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(schedule, "multiple_on", lambda *_: 16)
    x, grid = torch.randn(72, pixels(deep).shape[1]), torch.tensor([[1, 8, 8], [1, 2, 4]])
    program = program_of(mergence.apply(deep, macs=0.67))
    assert {count % 16 for count in program.counts()} == {0}
    assert deep(x, grid).pooler_output.shape == (18, 48)
    assert program.macs(8).total <= 0.67 * program.macs(8, dense=True).total
    program = program_of(mergence.apply(deep, macs=0.67, align=16))
    assert deep(x, grid).pooler_output.shape == (18, 48)
    assert set(program.counts(8)) == {8}


@torch.no_grad()
def test_features_from_between_blocks_are_of_every_patch(deep: Any) -> None:
    mergence.apply(deep, macs=0.6)
    found = deep(pixels(deep), GRIDS, output_hidden_states=True)
    mergers = mergence.remove(deep).deepstack_merger_list
    for index, merger, features in zip((1, 3), mergers, found.deepstack_features, strict=True):
        torch.testing.assert_close(merger(found.hidden_states[index + 1]), features)
    torch.testing.assert_close(deep.merger(found.last_hidden_state), found.pooler_output)


@torch.no_grad()
def test_a_merged_token_is_turned_to_the_place_of_its_most_important_patch(deep: Any) -> None:
    deep.double()
    mergence.apply(deep, "topk", schedule=[64, 30, 30, 30, 30, 30], size_attention=False)
    calls: list[Any] = []
    block = deep.blocks[3]
    block.register_forward_hook(
        lambda _, inputs, options, y: calls.append((*inputs, options, y)), with_kwargs=True
    )
    kept: list[Tensor] = []
    handle = deep.blocks[2].register_forward_pre_hook(
        lambda *_: kept.append(program_of(deep).run.carry.position)
    )
    x = torch.randn(64, pixels(deep).shape[1], dtype=torch.float64)
    deep(x, GRIDS[:1])
    handle.remove()
    tokens, options, y = calls[0]
    options["position_embeddings"] = tuple(t[kept[0][0]] for t in options["position_embeddings"])
    options["cu_seqlens"] = torch.tensor([0, 30], dtype=torch.int32)
    with mergence.disabled(deep):
        torch.testing.assert_close(block(tokens, **options), y, rtol=1e-5, atol=1e-6)
        options["position_embeddings"] = tuple(t.flip(0) for t in options["position_embeddings"])
        assert not torch.allclose(block(tokens, **options), y, rtol=1e-2)


def test_macs_are_what_a_counter_finds(model: Any) -> None:
    x = torch.randn(64, pixels(model).shape[1])
    model.set_attn_implementation("eager")

    def counted() -> int:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(x, GRIDS[:1])
        macs: int = counter.get_total_flops() // 2
        return macs

    program = program_of(mergence.apply(model, "random", schedule=[64, 40, 40, 20, 20, 20]))
    assert program.macs(64).importance > 0  # for the places of merged tokens
    # On CPUs importance is a product that the counter sees, and a merge none.
    assert program.macs(64).total - program.macs(64).merging == counted()
    with mergence.disabled(model):
        assert program.macs(64, dense=True).total == counted()


def test_gradients_flow_and_checkpointing_changes_nothing(qwen: Any, checkpointed: Any) -> None:
    x = pixels(qwen)
    mergence.apply(qwen.train(), macs=0.6)

    def loss() -> Tensor:
        outputs = qwen(x, GRIDS)
        features = [outputs.pooler_output, *outputs.get("deepstack_features", [])]
        return torch.cat(features).square().sum()

    checkpointed(qwen, loss)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_it_runs_in_bfloat16_by_either_attention(qwen: Any, implementation: str) -> None:
    qwen.set_attn_implementation(implementation)
    x = pixels(qwen)
    expected = mergence.apply(qwen, macs=0.6)(x, GRIDS).pooler_output
    qwen.bfloat16()
    found = qwen(x.bfloat16(), GRIDS).pooler_output
    assert found.dtype == torch.bfloat16
    assert found.isfinite().all()
    assert torch.cosine_similarity(found.float(), expected).mean() > 0.8


@pytest.mark.slow
@torch.no_grad()
def test_blocks_that_are_compiled_one_by_one_give_the_same(qwen: Any) -> None:
    x = pixels(qwen)
    expected = mergence.apply(qwen, macs=0.6)(x, GRIDS)
    for block in qwen.blocks:
        block.compile(backend="eager")
    assert_same(qwen(x, GRIDS), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("asked", ["of the call", "of the configuration"])
def test_a_tuple_is_given_where_one_is_asked_for(model: Any, asked: str) -> None:
    x, grid = pixels(model), grids(model)
    options: dict[str, Any] = {"output_hidden_states": True}
    if asked == "of the call":
        options["return_dict"] = False
    else:
        model.config.return_dict = False

    def given() -> list[Any]:
        outputs = model(x, grid, **options)
        assert type(outputs) is tuple
        return list(outputs)

    expected = given()
    for macs in (1.0, 0.6):
        mergence.apply(model, macs=macs)
        found = given()
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert type(one) is type(other)
            assert [x.shape for x in one] == [x.shape for x in other]
        if macs == 1.0:
            assert torch.equal(found[0], expected[0])


@torch.no_grad()
def test_patches_that_no_grid_describes_are_refused(model: Any) -> None:
    x, grid = pixels(model), grids(model)
    mergence.apply(model, macs=0.6)
    with pytest.raises(ReducedOutputError, match="given 196 patches, and grids of 136"):
        model(x, grid[:-1])
    with pytest.raises(ReducedOutputError, match="given 136 patches, and grids of 196"):
        model(x[:-60], grid)


def test_what_cannot_be_right_is_refused(qwen: Any, unscaled: Any) -> None:
    x = pixels(qwen)
    mergence.apply(qwen, macs=0.6)
    lengths = torch.tensor([0, 64, 88, 112, 136, 196], dtype=torch.int32)
    with pytest.raises(ReducedOutputError, match="given cu_seqlens for images of several sizes"):
        qwen(x, GRIDS, cu_seqlens=lengths)
    if hasattr(transformers, "vision_utils"):  # older releases compute them always
        qwen(x[:64], GRIDS[:1], cu_seqlens=lengths[:2])
    with pytest.raises(ReducedOutputError, match="output_attentions"):
        qwen(x, GRIDS, output_attentions=True)
    with pytest.raises(ReducedOutputError, match="called by itself"):
        qwen.blocks[0](torch.randn(64, 48), cu_seqlens=lengths[:2])
    qwen.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ReducedOutputError, match="set_attn_implementation"):
        qwen(x, GRIDS)
    with pytest.raises(UnsupportedModelError, match="set_attn_implementation"):
        mergence.apply(qwen, macs=0.5)
    qwen.config._attn_implementation = "sdpa"
    with pytest.raises(OptionError, match="'mstm' learns reads patches in their rows"):
        mergence.apply(qwen, "mstm", macs=0.6, fusion=True)
    mergence.apply(qwen, schedule=unscaled([64, 32, 32, 32, 32, 32]))
    qwen(x[:64], GRIDS[:1])
    with pytest.raises(ScheduleError, match="Counts can only fall"):
        qwen(x, GRIDS)


@torch.no_grad()
@pytest.mark.parametrize("name", TOWERS, ids=lambda name: name.rpartition(".")[2])
def test_in_half_precision_patches_are_embedded_by_a_product(name: str) -> None:
    model = tower(name)
    exact = model.patch_embed(pixels(model))
    x = pixels(model.bfloat16()).bfloat16()
    expected = model.patch_embed(x)
    with mergence.applied(model, macs=1.0):
        assert torch.equal(model.patch_embed(x), expected)
    mergence.apply(model, macs=0.6)
    found = model.patch_embed(x)
    assert found.shape == expected.shape == exact.shape
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2)
    with mergence.disabled(model):
        assert torch.equal(model.patch_embed(x), expected)


def test_an_attention_that_is_built_otherwise_is_refused() -> None:
    kind = transformers.Qwen2_5OmniThinkerForConditionalGeneration
    with torch.device("meta"):
        model = kind(kind.config_class())
    with pytest.raises(UnsupportedModelError, match=r"built otherwise than Qwen2\.5-VL's"):
        mergence.apply(model, macs=0.6)
