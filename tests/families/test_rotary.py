"""Models that turn queries and keys by place: restated blocks, and the places of merged tokens."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import mergence
from mergence import family
from mergence.errors import ReducedOutputError, UnsupportedModelError
from mergence.families.timm_eva import FAMILY, first_half, second_half
from mergence.program import program_of

KINDS = {f"timm_eva-{kind}": build for kind, build in FAMILY.tiny().items()}
ROTARY = KINDS | {"transformers-dinov3": family.registry()["transformers"].tiny()["dinov3"]}


def restated(block: Any, x: Tensor, rope: Tensor, bias: Tensor | None = None) -> Tensor:
    y, _, _ = first_half(block, x, rope, bias)
    return second_half(block, y)


def lively(kind: str, **options: Any) -> Any:
    """A model with all the dropout that its blocks can have."""
    name, own = FAMILY.kinds[kind.partition("-")[2]]
    size = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 64, "patch_size": 16}
    dropout = {"proj_drop_rate": 0.2, "attn_drop_rate": 0.2, "drop_path_rate": 0.4}
    model = timm.create_model(name, **own, **size, **dropout, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model


@pytest.fixture(params=[True, False], ids=["fused", "unfused"])
def fused(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, fused: bool, replica: Any) -> tuple[Any, Tensor]:
    """A block and the rotations of 16 patches."""
    model = replica(("lively", request.param), lambda: lively(request.param))
    torch.manual_seed(1)  # what is drawn next is the same for the first and for a later copy
    rope = model.rope.get_embed(shape=(4, 4))
    block = model.blocks[-1]
    block.attn.fused_attn = fused
    return block, rope[-1] if rope.ndim == 4 else rope


@pytest.mark.usefixtures("torchs_attention")
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "size bias"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_restated_block_is_bit_identical(
    kind: Any, biased: bool, training: bool, dtype: torch.dtype
) -> None:
    block, rope = kind
    block.train(training).to(dtype)
    tokens = block.attn.num_prefix_tokens + 16
    x = torch.randn(4, tokens, 48).to(dtype)
    sizes = torch.randint(1, 9, (4, tokens)).to(dtype)
    bias = sizes.log()[:, None, None, :] if biased else None
    torch.manual_seed(5)
    expected = block(x, rope=rope, attn_mask=bias)
    torch.manual_seed(5)
    assert torch.equal(restated(block, x, rope, bias), expected)
    # The rotations are no bystanders.
    assert not torch.equal(block.eval()(x), block(x, rope=rope))


def test_attentions_of_older_releases_are_read_too(kind: Any) -> None:
    """timm 1.0.21 to 1.0.26: neither a gate nor a width of the heads to look up."""
    block, rope = kind
    x = torch.randn(4, block.attn.num_prefix_tokens + 16, 48)
    expected = block.eval()(x, rope=rope)
    assert block.attn.gate is None
    del block.attn.gate, block.attn.head_dim
    assert torch.equal(restated(block, x, rope), expected)


def test_the_gradients_of_the_restated_block_are_bit_identical(kind: Any) -> None:
    block, rope = kind
    block.eval()
    x, found = torch.randn(4, block.attn.num_prefix_tokens + 16, 48), []
    for run in (partial(block, rope=rope), partial(restated, block, rope=rope)):
        block.zero_grad()
        run(x).square().sum().backward(retain_graph=True)
        found.append([p.grad.clone() for p in block.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@torch.no_grad()
@pytest.mark.parametrize("method", ["topk", "mergence"])
@pytest.mark.parametrize("name", ROTARY)
def test_a_token_keeps_the_place_of_its_most_important_patch(name: str, method: str) -> None:
    model = ROTARY[name]().double()
    options = {"size_attention": False}  # so that the library's own block can be asked again
    mergence.apply(model, method, schedule=[36, 20, 20, 12, 12, 12], **options)
    blocks = family.find(model).inspect(model).blocks
    calls: list[tuple[Any, Any, Tensor]] = []
    for block in blocks:
        block.register_forward_hook(
            lambda module, x, options, y: calls.append((x, options, y)), with_kwargs=True
        )
    image = torch.randn(2, 3, 96, 96, dtype=torch.float64)
    points = mergence.trace(model, image).points
    assert [point.block for point in points] == [2, 4]
    for index, point in ((2, points[0]), (4, points[1]), (5, points[1])):
        (x, *_), given, y = calls[index]
        own = {key: at(rope, point.anchor) for key, rope in given.items() if "mask" not in key}
        with mergence.disabled(model):
            assert torch.equal(blocks[index](x, **own), y)
            elsewhere = {key: at(rope, point.anchor.flip(1)) for key, rope in given.items()}
            assert not torch.allclose(blocks[index](x, **elsewhere), y)


def at(rope: Any, patches: Tensor) -> Any:
    """The rotations `[B, H, N, D]` of patches `[B, N]`."""
    if isinstance(rope, tuple):
        return tuple(at(table, patches) for table in rope)
    if rope is None or isinstance(rope, bool):
        return rope
    each = [rope[..., row, :] for row in patches]
    return torch.stack([one if one.ndim == 3 else one[None] for one in each])


@torch.no_grad()
def test_choosing_places_is_counted() -> None:
    model = ROTARY["timm_eva-dinov3"]()
    counts = [36, 20, 20, 12, 12, 12]
    mergence.apply(model, "random", schedule=counts)
    found = mergence.describe(model).reduced
    assert program_of(model).needs == {"importance"}
    assert found.importance == (36 + 5 + 20 + 5) * 48


def test_eva_blocks_of_another_kind_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"block 1 is a .*EvaBlockPostNorm;"):
        mergence.apply(lively("timm_eva-rope_mixed", use_post_norm=True), macs=0.67)
    with pytest.raises(UnsupportedModelError, match="patch_drop_rate"):
        mergence.apply(lively("timm_eva-rope_mixed", patch_drop_rate=0.5), macs=0.67)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"use_rot_pos_emb": False}], ids=["rotary", "absolute"])
def test_heads_masks_and_other_sizes(options: dict[str, Any]) -> None:
    model = lively("timm_eva-eva02", dynamic_img_size=True, num_classes=5, **options).eval()
    for size in ((64, 64), (96, 48)):
        image = torch.randn(2, 3, *size)
        expected = model(image)
        mergence.apply(model, macs=1.0)
        assert torch.equal(model(image), expected)
        mergence.apply(model, keep_rate=0.5)
        found = model(image)
        assert not torch.equal(found, expected)
        assert torch.equal(model.forward_head(model.forward_features(image)), found)
        with pytest.raises(ReducedOutputError, match="attention mask"):
            model(image, attn_mask=torch.zeros(1, 1, 1, 1))
        maps = model.forward_intermediates(image, indices=1, intermediates_only=True)
        assert maps[0].shape == (2, 48, size[0] // 16, size[1] // 16)
        mergence.remove(model)
        assert torch.equal(model(image), expected)


@torch.no_grad()
def test_pooling_is_by_size() -> None:
    for name in ("timm_eva-eva02", "timm_eva-perception_encoder"):
        model: Any = ROTARY[name]().double()
        mergence.apply(model, keep_rate=0.6)
        image = torch.randn(2, 3, 96, 96, dtype=torch.float64)
        features, size = model.forward_features(image), mergence.trace(model, image).points[-1].size
        prefix = model.num_prefix_tokens
        found = model.pool(features)
        one_by_one = []
        for x, n in zip(features, size.int(), strict=True):
            times = nn.functional.pad(n, (prefix, 0), value=1)
            one_by_one.append(x.repeat_interleave(times, dim=0).unsqueeze(0))
        mergence.remove(model)
        expected = torch.cat([model.pool(x) for x in one_by_one])
        # log(size) and the shares are float32.
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
