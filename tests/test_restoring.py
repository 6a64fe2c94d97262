"""`mergence.restore`: each patch has its slot's value, and what set it apart from that."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import VisionTransformer
from torch import nn

import mergence
from mergence import family
from mergence.errors import ReducedOutputError
from mergence.method import names
from mergence.plan import MergePlan
from mergence.program import program_of
from mergence.restoring import restored
from mergence.state import Carry, Merge


@given(
    st.lists(st.lists(st.integers(-1, 3), min_size=5, max_size=5), min_size=1, max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64]),
    st.sampled_from([torch.int64, torch.int32]),
)
def test_each_patch_gets_the_value_of_its_slot_and_dropped_ones_zeros(
    source: list[list[int]], dtype: torch.dtype, index: torch.dtype
) -> None:
    tokens = torch.arange(1, len(source) * 4 * 2 + 1).reshape(len(source), 4, 2).to(dtype)
    full = mergence.restore(tokens, torch.tensor(source, dtype=index))
    zeros = torch.zeros(2, dtype=dtype)
    for image, slots in enumerate(source):
        expected = [tokens[image, slot] if slot >= 0 else zeros for slot in slots]
        assert torch.equal(full[image], torch.stack(expected))


def test_what_is_not_a_number_in_a_token_stays_out_of_dropped_patches() -> None:
    tokens = torch.tensor([[[float("nan")], [2.0]]])
    full = mergence.restore(tokens, torch.tensor([[-1, 1, -1]]))
    assert full.flatten().tolist() == [0.0, 2.0, 0.0]


def test_gradients_of_a_slot_are_summed_over_its_patches() -> None:
    tokens = torch.zeros(1, 2, 1, requires_grad=True)
    mergence.restore(tokens, torch.tensor([[0, 0, 1, -1, 0]])).sum().backward()
    assert tokens.grad is not None
    assert tokens.grad.flatten().tolist() == [3.0, 1.0]


@given(
    st.lists(st.lists(st.integers(-1, 2), min_size=6, max_size=6), min_size=1, max_size=3),
    st.booleans(),
)
def test_a_merge_is_undone_where_it_happens(slots: list[list[int]], keep_norm: bool) -> None:
    # Every slot has a token.
    slot = torch.tensor([[*range(3), *image[3:]] for image in slots])
    program = program_of(mergence.apply(family.registry()["timm"].tiny()["vit"](), keep_rate=0.6))
    x, size = torch.randn(len(slot), 1 + 6, 48).double(), torch.rand(slot.shape) + 0.5
    plan = MergePlan(slot, size, 3, keep_norm)
    carry = Carry(patches=6, every_patch=True)
    merged, after = program.merged(x, size, carry, plan)
    torch.testing.assert_close(restored(merged, after, prefix=1), x)
    # One that was alone goes on as it is.
    gone_on = torch.randn_like(merged)
    found = restored(gone_on, after, prefix=1)
    for image, homes in enumerate(slot.tolist()):
        for token, home in enumerate(homes):
            if homes.count(home) == 1 and home >= 0:
                assert torch.equal(found[image, 1 + token], gone_on[image, 1 + home])


def test_a_single_token_leaves_patches_as_far_apart_as_they_were() -> None:
    apart = torch.tensor([[[-1.0, 0.0], [1.0, 0.0]]])
    merge = Merge.of(torch.zeros(1, 2).long(), apart + 5, torch.full((1, 1, 2), 5.0))
    token = torch.tensor([[[7.0, 1.0]]], requires_grad=True)
    found = restored(token, Carry(patches=2, merges=(merge,)))
    assert found.tolist() == [[[6.0, 1.0], [8.0, 1.0]]]
    found.sum().backward()
    assert token.grad is not None
    assert token.grad.tolist() == [[[2.0, 2.0]]]


@pytest.mark.parametrize("method", names())
@torch.no_grad()
def test_what_forward_features_returns_is_restored_before_its_norm(
    method: str, merges: Any, by_hand: Any
) -> None:
    model: Any = family.registry()["timm"].tiny()["deit_distilled"]()
    mergence.apply(model, method, keep_rate=0.6)
    image = torch.randn(2, 3, 96, 96)
    last: list[torch.Tensor] = []
    model.blocks[-1].register_forward_hook(lambda *a: last.append(a[2]))
    features = model.forward_features(image)
    full = mergence.restore(features)
    expected = model.norm(by_hand(last[0][:, 2:], merges))
    torch.testing.assert_close(full[:, 2:], expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(full[:, :2], features[:, :2])
    with mergence.disabled(model):
        dense = model.forward_features(image)
        assert full.shape == dense.shape
        assert torch.equal(mergence.restore(dense), dense)


@pytest.mark.parametrize(
    ("tokens", "source", "message"),
    [
        ((2, 3, 4), torch.zeros(1, 5).long(), "do not belong together"),
        ((3, 4), torch.zeros(3, 5).long(), "do not belong together"),
        ((1, 3, 4), torch.zeros(5).long(), "do not belong together"),
        ((1, 3, 4), torch.zeros(1, 5), r"torch\.float32.*integers"),
        ((1, 3, 4), torch.zeros(1, 5).bool(), r"torch\.bool.*integers"),
        ((1, 3, 4), torch.tensor([[0, 3, -1]]), "names slot 3, and there are 3 tokens"),
    ],
)
def test_a_map_that_does_not_fit_is_refused(
    tokens: tuple[int, ...], source: torch.Tensor, message: str
) -> None:
    with pytest.raises(ReducedOutputError, match=message):
        mergence.restore(torch.zeros(tokens), source)


def test_prefix_tokens_in_front_of_those_of_a_map_are_refused() -> None:
    model: Any = mergence.apply(family.registry()["timm"].tiny()["deit_distilled"](), macs=0.6)
    image = torch.randn(1, 3, 96, 96)
    source = mergence.trace(model, image).points[-1].source
    features = model.forward_features(image)
    assert mergence.restore(features[:, 2:], source).shape == (1, 36, 48)
    with pytest.raises(ReducedOutputError, match="2 are prefix tokens"):
        mergence.restore(features, source)


def test_features_made_without_gradients_train_nothing() -> None:
    model: Any = mergence.apply(family.registry()["timm"].tiny()["vit"](), keep_rate=0.6)
    image = torch.randn(1, 3, 96, 96)
    with torch.no_grad():
        frozen = model.forward_features(image)
    assert not mergence.restore(frozen).requires_grad
    mergence.restore(model.forward_features(image)).sum().backward()
    assert model.norm.weight.grad is not None


@torch.no_grad()
def test_files_of_features_hold_features_alone_and_copies_remember() -> None:
    model: Any = mergence.apply(family.registry()["timm"].tiny()["vit"](), keep_rate=0.6)
    features = model.forward_features(torch.randn(1, 3, 96, 96))
    file, plain = io.BytesIO(), io.BytesIO()
    torch.save(features, file)
    torch.save(features.clone(), plain)
    assert file.tell() < plain.tell() + 1024
    file.seek(0)
    loaded = torch.load(file)  # which by itself takes tensors alone
    assert torch.equal(loaded, features)
    with pytest.raises(ReducedOutputError, match="do not remember"):
        mergence.restore(loaded)
    assert torch.equal(mergence.restore(copy.deepcopy(features)), mergence.restore(features))


@torch.no_grad()
def test_tokens_that_remember_nothing_are_refused() -> None:
    model: Any = family.registry()["timm"].tiny()["vit"]()
    assert isinstance(model, nn.Module)
    mergence.apply(model, keep_rate=0.6)
    features = model.forward_features(torch.randn(1, 3, 96, 96))
    with pytest.raises(ReducedOutputError, match=r"the very tensor.*or a source map"):
        mergence.restore(features.clone())


class Segmenter(VisionTransformer):  # type: ignore[misc]
    """A model whose own forward reads the maps of an image and of its mirror image."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        def read(image: torch.Tensor) -> tuple[torch.Tensor, ...]:
            (features,) = self.forward_intermediates(image, indices=[3], intermediates_only=True)
            tokens = self.forward_features(image)
            return features, mergence.restore(tokens), self.forward_head(tokens)

        return *read(x), *read(x.flip(3))


@pytest.mark.parametrize("method", ["mergence", "tome", "topk"])
@torch.no_grad()
def test_a_models_own_forward_gets_what_a_call_from_outside_gets(method: str) -> None:
    model = Segmenter(img_size=96, embed_dim=48, depth=4, num_heads=3, global_pool="avg").eval()
    mergence.apply(model, method, keep_rate=0.7)
    image = torch.randn(2, 3, 96, 96)
    inside, outside = model(image), Segmenter.forward(model, image)
    assert len(inside) == 6
    assert all(map(torch.equal, inside, outside))


@pytest.mark.parametrize("method", ["mergence", "topk"])
@torch.no_grad()
def test_a_model_that_answers_with_its_tokens_keeps_what_set_them_apart(method: str) -> None:
    model: Any = family.registry()["timm"].tiny()["vit"]()
    model.reset_classifier(0, "")
    mergence.apply(model, method, keep_rate=0.7)
    image = torch.randn(2, 3, 96, 96)
    expected = mergence.restore(model.forward_features(image))
    assert torch.equal(mergence.restore(model(image)), expected)


@pytest.mark.parametrize("kind", ["vit_pooler", "dinov2"])
@torch.no_grad()
def test_a_tower_of_transformers_is_whole_while_it_is_disabled(kind: str, fresh: Any) -> None:
    model = fresh(f"transformers-{kind}")
    mergence.apply(model, keep_rate=0.7)
    image = torch.randn(2, 3, 96, 96)
    with mergence.disabled(model):
        found = model(image, output_hidden_states=True)
    last = [found.last_hidden_state] if kind == "vit_pooler" else []
    for tokens in (*found.hidden_states, *last):
        assert torch.equal(mergence.restore(tokens), tokens)
