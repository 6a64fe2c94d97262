"""V-JEPA 2: restated blocks, places of tokens, the pooler of the classifier, the predictor."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import mergence
from mergence.errors import ReducedOutputError
from mergence.families.transformers_vjepa2 import FAMILY, _first_half, _second_half, tiny_model
from mergence.state import Carry

COUNTS = [36, 20, 12, 12, 12, 12]


def classifier(**options: Any) -> Any:
    return tiny_model("VJEPA2ForVideoClassification", num_hidden_layers=4, **options)


def encoder(**options: Any) -> Any:
    return tiny_model("VJEPA2Model", **options)


def video(frames: int = 8, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, frames, 3, 96, 96, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture(params=["sdpa", "eager"])
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=["encoder", "pooler"])
def block(request: pytest.FixtureRequest, kernel: str) -> Any:
    """A block of each kind, with all the dropout that it can have."""
    dropout = ("attention_probs_dropout_prob", "attention_dropout", "drop_path_rate")
    model = classifier(**dict.fromkeys(dropout, 0.3))
    model.set_attn_implementation(kernel)
    return FAMILY.inspect(model).blocks[1 if request.param == "encoder" else -1]


def restated(block: Any, x: Tensor) -> Tensor:
    return _second_half(block, _first_half(block, x, Carry(36))[0])


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_restated_block_is_bit_identical(
    block: Any, training: bool, dtype: torch.dtype
) -> None:
    block.train(training).to(dtype)
    x, found = torch.randn(4, 36, 48, dtype=dtype), []
    for run in (lambda x: block(x, None)[0], partial(restated, block)):
        torch.manual_seed(5)
        block.zero_grad()
        y = run(x)
        y.square().sum().backward()
        found.append([y, *(p.grad.clone() for p in block.parameters())])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["eager"], indirect=True)
def test_a_reduction_gets_the_queries_and_keys_of_the_attention(block: Any) -> None:
    x = torch.randn(4, 36, 48)
    own = block.eval()(x, None)[1]
    _, q, k = _first_half(block, x, Carry(36))
    found = (q @ k.mT * q.shape[-1] ** -0.5).softmax(dim=-1)
    torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("method", ["topk", "mergence"])
def test_a_token_keeps_the_place_of_its_most_important_patch(method: str) -> None:
    model: Any = encoder().double()
    # Without sizes, so that the library's own block can be asked again.
    mergence.apply(model, method, schedule=[36, 20, 20, 12, 12, 12], size_attention=False)
    calls: list[tuple[Tensor, Tensor]] = []
    for layer in model.encoder.layer:
        layer.register_forward_hook(lambda module, x, y: calls.append((x[0], y[0])))
    points = mergence.trace(model, video(dtype=torch.float64)).points
    assert [point.block for point in points] == [2, 4]
    for index, point in ((2, points[0]), (4, points[1]), (5, points[1])):
        x, y = calls[index]
        with mergence.disabled(model):
            layer = model.encoder.layer[index]
            assert torch.equal(layer(x, point.anchor)[0], y)
            assert not torch.allclose(layer(x, point.anchor.flip(1))[0], y)


@torch.no_grad()
def test_the_pooler_reads_a_merged_token_as_often_as_its_patches(kernel: str) -> None:
    model: Any = classifier().double()
    model.set_attn_implementation(kernel)
    mergence.apply(model, schedule=COUNTS)
    handed: list[Tensor] = []
    model.vjepa2.encoder.register_forward_hook(
        lambda module, x, y: handed.append(y.last_hidden_state)
    )
    trace = mergence.trace(model, video(dtype=torch.float64))
    assert trace.grid == (4 * 3, 3)
    size = trace.points[-1].size.int()
    assert (size.sum(dim=1) == 36).all()
    mergence.remove(model)
    for x, times, logits in zip(handed[0], size, trace.output.logits, strict=True):
        expected = model.classifier(model.pooler(x.repeat_interleave(times, dim=0)[None]))[0]
        # Sizes are float32.
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(model.classifier(model.pooler(x[None]))[0], expected, rtol=1e-3)


@torch.no_grad()
def test_blocks_of_the_pooler_reduce_too() -> None:
    model = mergence.apply(classifier(), schedule=[36, 36, 36, 20, 12, 6])
    assert [p.block for p in mergence.trace(model, video()).points] == [4, 5, 6]
    assert model(video()).logits.shape == (2, 5)


@torch.no_grad()
def test_the_model_in_a_classifier_finds_every_patch_too() -> None:
    whole, frames = classifier(), video()
    alone = encoder(num_hidden_layers=4)
    alone.load_state_dict(whole.vjepa2.state_dict())
    mergence.apply(whole, schedule=[36, 20, 20, 12, 12, 6])
    mergence.apply(alone, schedule=[36, 20, 20, 12])
    expected = alone(frames)
    scores = whole(frames).logits
    for found in (whole.vjepa2(frames), whole.vjepa2(pixel_values_videos=frames)):
        assert torch.equal(found.last_hidden_state, expected.last_hidden_state)
        assert torch.equal(found.predictor_output[0], expected.predictor_output[0])
    assert torch.equal(whole.vjepa2.get_vision_features(frames), expected.last_hidden_state)
    assert torch.equal(whole(frames).logits, scores)
    assert whole(frames, output_hidden_states=True).hidden_states[-1].shape[1] == 12


@torch.no_grad()
def test_the_predictor_and_masks_find_every_patch() -> None:
    model, frames = encoder(), video()
    context = [torch.arange(0, 36, 2).expand(2, -1)]
    target = [torch.arange(1, 36, 2).expand(2, -1)]
    masks = {"context_mask": context, "target_mask": target}
    expected, masked = model(frames), model(frames, **masks)
    mergence.apply(model, macs=1.0)
    for found, dense in ((model(frames), expected), (model(frames, **masks), masked)):
        for one, other in zip(found.to_tuple(), dense.to_tuple(), strict=True):
            pairs = zip(one, other, strict=True)
            assert all(torch.equal(a, b) for a, b in pairs)
    mergence.apply(model, schedule=COUNTS)
    found, part = model(frames), model(frames, **masks, output_hidden_states=True)
    assert found.last_hidden_state.shape == (2, 36, 48)
    assert torch.equal(model.get_vision_features(frames), found.last_hidden_state)
    assert torch.equal(part.masked_hidden_state, found.last_hidden_state[:, ::2])
    assert part.predictor_output.last_hidden_state.shape == (2, 18, 48)
    assert not torch.equal(found.predictor_output[0], expected.predictor_output[0])
    # Those in between are what the blocks gave out, and remember their patches.
    assert [x.shape[1] for x in part.hidden_states] == [36, *COUNTS]
    assert all(mergence.restore(x).shape == (2, 36, 48) for x in part.hidden_states)
    last = model.encoder.layernorm(mergence.restore(part.hidden_states[-1]))
    torch.testing.assert_close(last, part.last_hidden_state)
    mergence.remove(model)
    assert torch.equal(model(frames)[0], expected[0])


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 4, 12])
def test_videos_of_other_lengths(frames: int) -> None:
    model = mergence.apply(classifier(), keep_rate=0.6)
    trace = mergence.trace(model, video(frames))
    assert trace.grid == (max(frames // 2, 1) * 3, 3)
    assert trace.output.logits.isfinite().all()


@torch.no_grad()
def test_the_dense_macs_are_those_of_the_products() -> None:
    model = classifier()
    model.set_attn_implementation("eager")
    mergence.apply(model, schedule=COUNTS)
    counter = FlopCounterMode(display=False)
    with counter, mergence.disabled(model):
        model(video()[:1])
    assert mergence.describe(model).dense.total == counter.get_total_flops() // 2


def test_maps_and_other_attentions_are_refused() -> None:
    model: Any = mergence.apply(classifier(), keep_rate=0.6)
    with pytest.raises(ReducedOutputError, match="output_attentions"):
        model(video(), output_attentions=True)
    with pytest.raises(ReducedOutputError, match="mask"):
        model.vjepa2.encoder.layer[0](torch.randn(2, 36, 48), torch.arange(36).expand(2, -1))
