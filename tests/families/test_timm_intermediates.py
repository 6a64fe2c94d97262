"""Feature maps of reduced timm models: full grids at every block, whatever form is asked for."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from timm.models._features import FeatureGetterNet
from torch import Tensor

import mergence
from mergence.errors import ReducedOutputError

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "class token": ("vit_tiny_patch16_224", {}),
    "registers": ("vit_small_patch14_reg4_dinov2", {}),
    "no prefix": ("vit_base_patch16_siglip_224", {}),
    "distilled": ("deit_tiny_distilled_patch16_224", {}),
}
FORMS: list[dict[str, Any]] = [
    {},
    {"indices": 2},
    {"indices": [0, -1], "norm": True},
    {"output_fmt": "NLC"},
    {"return_prefix_tokens": True},
    {"intermediates_only": True, "output_fmt": "NLC", "return_prefix_tokens": True},
    {"indices": [1, 2], "stop_early": True},
    {"output_dict": True, "return_prefix_tokens": True},
    {"output_dict": True, "intermediates_only": True},
]


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, small: Any) -> Any:
    name, options = KINDS[request.param]
    return small(name, dynamic_img_size=True, **options)


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 64, 48, dtype=torch.float64)  # 4 x 3 patches


def flat(value: Any) -> list[Tensor]:
    """All tensors of a nested answer, in order."""
    if isinstance(value, Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    return [tensor for part in values for tensor in flat(part)]


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_with_nothing_reduced_all_is_bit_identical(model: Any, form: Any, image: Tensor) -> None:
    expected = model.forward_intermediates(image, **form)
    mergence.apply(model, keep_rate=1.0)
    answers = [model.forward_intermediates(image, **form)]
    mergence.apply(model, keep_rate=0.6)
    with mergence.disabled(model):
        answers.append(model.forward_intermediates(image, **form))
    for found in answers:
        assert type(found) is type(expected)
        pairs = list(zip(flat(found), flat(expected), strict=True))
        assert pairs
        assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in pairs)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_reduced_model_answers_in_the_same_form(model: Any, form: Any, image: Tensor) -> None:
    dense = model.forward_intermediates(image, **form)
    mergence.apply(model, "tome", keep_rate=0.6)
    found = model.forward_intermediates(image, **form)
    final = None
    if isinstance(found, dict):
        assert found.keys() == dense.keys()
        final = found.pop("image_features", None)
        dense.pop("image_features", None)
    elif not form.get("intermediates_only"):
        (final, found), (_, dense) = found, dense
    assert [y.shape for y in flat(found)] == [y.shape for y in flat(dense)]
    if final is not None and not form.get("stop_early"):
        assert torch.equal(final, model.forward_features(image))
        answer = model.forward_head(final)
        torch.testing.assert_close(answer, model(image), rtol=1e-12, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("method", ["mergence", "topk"])
def test_every_patch_has_its_value_at_every_block(
    model: Any, method: str, image: Tensor, merges: Any, by_hand: Any
) -> None:
    prefix = model.num_prefix_tokens
    mergence.apply(model, method, schedule=mergence.Counts(after=(12, 7, 7, 3), of=12))
    outputs: list[Tensor] = []
    for block in model.blocks:
        block.register_forward_hook(lambda module, x, y: outputs.append(y))
    _, tokens = model.forward_intermediates(image, output_fmt="NLC")
    expected = [by_hand(y[:, prefix:], merges) for y in outputs]
    _, grids = model.forward_intermediates(image)
    _, normed = model.forward_intermediates(image, output_fmt="NLC", norm=True)
    for want, found, norm, grid in zip(expected, tokens, normed, grids, strict=True):
        torch.testing.assert_close(found, want)
        torch.testing.assert_close(norm, model.norm(want))
        assert torch.equal(grid, found.transpose(1, 2).reshape(2, 24, 4, 3))
    assert torch.equal(mergence.restore(model.forward_features(image))[:, prefix:], normed[-1])


@torch.no_grad()
def test_prefix_tokens_beside_maps_are_normed_as_well(model: Any, image: Tensor) -> None:
    if not model.num_prefix_tokens:
        pytest.skip("it has none")
    mergence.apply(model, keep_rate=0.6)
    form = {"return_prefix_tokens": True, "output_dict": True}
    plain = model.forward_intermediates(image, **form)["image_intermediates_prefix"]
    normed = model.forward_intermediates(image, norm=True, **form)["image_intermediates_prefix"]
    assert all(torch.equal(a, model.norm(b)) for a, b in zip(normed, plain, strict=True))
    tuples = model.forward_intermediates(image, norm=True, return_prefix_tokens=True)[1]
    assert all(torch.equal(a, b[1]) for a, b in zip(normed, tuples, strict=True))


@torch.no_grad()
def test_feature_extractors_work_on_reduced_models(small: Any, image: Tensor) -> None:
    model = mergence.apply(small(dynamic_img_size=True), keep_rate=0.6)
    expected = model.forward_intermediates(image, indices=[1, 3], intermediates_only=True)
    getter = FeatureGetterNet(model, out_indices=[1, 3], prune=False)
    assert all(torch.equal(a, b) for a, b in zip(getter(image), expected, strict=True))
    layers = model.get_intermediate_layers(image, n=[1, 3], reshape=True)
    assert all(torch.equal(a, b) for a, b in zip(layers, expected, strict=True))


@torch.no_grad()
def test_a_model_built_as_a_backbone_reduces() -> None:
    sizes = {"embed_dim": 24, "depth": 4, "num_heads": 2, "img_size": 64}
    net = timm.create_model(
        "vit_tiny_patch16_224", features_only=True, out_indices=(1, 2), **sizes
    ).eval()
    image = torch.randn(2, 3, 64, 64)
    dense = net(image)
    mergence.apply(net.model, schedule=[16, 7, 5])  # timm cut the last block off
    found = net(image)
    assert [y.shape for y in found] == [y.shape for y in dense]
    assert not torch.equal(found[1], dense[1])
    mergence.remove(net)
    assert all(torch.equal(a, b) for a, b in zip(net(image), dense, strict=True))


def test_gradients_flow_through_restored_maps_also_with_checkpointing(small: Any) -> None:
    image, gradients = torch.randn(2, 3, 64, 64).double(), []
    for checkpointing in (False, True):
        model = mergence.apply(small(), keep_rate=0.6)
        model.set_grad_checkpointing(checkpointing)
        maps = model.forward_intermediates(image, intermediates_only=True)
        torch.stack(maps).square().mean().backward()
        gradients.append(model.patch_embed.proj.weight.grad)
    assert gradients[0].abs().min() > 0
    assert torch.equal(*gradients)


@torch.no_grad()
def test_masks_stay_refused(small: Any) -> None:
    model = mergence.apply(small(), keep_rate=0.6)
    with pytest.raises(ReducedOutputError, match="attention mask"):
        model.forward_intermediates(
            torch.randn(1, 3, 64, 64).double(), attn_mask=torch.zeros(17, 17).double()
        )


@pytest.mark.slow
@torch.no_grad()
def test_intermediates_compile_in_one_graph_and_export(small: Any) -> None:
    model = mergence.apply(small(depth=2), keep_rate=0.6)
    image = torch.randn(2, 3, 64, 64).double()
    expected = model.forward_intermediates(image, intermediates_only=True)
    compiled = torch.compile(model.forward_intermediates, fullgraph=True, backend="eager")
    found = compiled(image, intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    getter = FeatureGetterNet(model, out_indices=[0, 1], prune=False)
    batch = torch.export.Dim("batch", min=1, max=64)
    exported = torch.export.export(getter, (image,), dynamic_shapes=({0: batch},)).module()
    found = exported(image[:1])
    for a, b in zip(found, getter(image[:1]), strict=True):
        # An exported graph merges without scatter, in another order of float32 sums.
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
