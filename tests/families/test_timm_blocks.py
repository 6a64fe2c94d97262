"""The restated timm block against timm's own, to the last bit, with all that a block can hold."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import mergence
from mergence.errors import ReducedOutputError
from mergence.families.timm import FAMILY, first_half, second_half

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layer scale": {"init_values": 0.3},
    "qk norm": {"qk_norm": True},
    "scale norms": {"scale_attn_norm": True, "scale_mlp_norm": True},
    "no biases": {"qkv_bias": False, "proj_bias": False},
    "drop path and dropout": {"drop_path": 0.4, "proj_drop": 0.2, "attn_drop": 0.2},
}


@pytest.fixture(params=KINDS)
def block(request: pytest.FixtureRequest) -> nn.Module:
    block = Block(dim=24, num_heads=3, **({"qkv_bias": True} | KINDS[request.param]))
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # no scale or bias left at 1 or 0
    return block


@pytest.fixture(params=[True, False], ids=["fused", "unfused"])
def fused(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def restated(block: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
    y, _, _ = first_half(block, x, bias)
    return second_half(block, y)


def size_bias(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(1, 9, (4, 11)).to(dtype).log()[:, None, None, :]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "size bias"])
def test_the_restated_block_is_bit_identical(
    block: Any, fused: bool, biased: bool, training: bool
) -> None:
    block.train(training).attn.fused_attn = fused
    x, bias = torch.randn(4, 11, 24), size_bias() if biased else None
    torch.manual_seed(5)
    expected = block(x, attn_mask=bias)
    torch.manual_seed(5)
    assert torch.equal(restated(block, x, bias), expected)
    # The bias is no bystander.
    assert not biased or not torch.equal(block.eval()(x), block(x, attn_mask=bias))


@pytest.mark.usefixtures("torchs_attention")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_restated_block_is_bit_identical_in_other_dtypes(
    block: Any, fused: bool, dtype: torch.dtype
) -> None:
    block.eval().to(dtype).attn.fused_attn = fused
    x, bias = torch.randn(4, 11, 24, dtype=dtype), size_bias(dtype)
    assert torch.equal(restated(block, x, bias), block(x, attn_mask=bias))


def test_the_gradients_of_the_restated_block_are_bit_identical(block: Any, fused: bool) -> None:
    block.eval().attn.fused_attn = fused
    x, found = torch.randn(4, 11, 24), []
    for run in (block, partial(restated, block)):
        block.zero_grad()
        run(x).square().sum().backward()
        found.append([p.grad.clone() for p in block.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_reduction_gets_the_queries_and_keys_of_the_attention(block: Any) -> None:
    block.eval().attn.fused_attn = False
    own: list[Tensor] = []
    block.attn.attn_drop.register_forward_hook(lambda module, x, y: own.append(y))
    x = torch.randn(4, 11, 24)
    block(x)
    _, q, k = first_half(block, x, None)
    found = (q @ k.transpose(-2, -1) * block.attn.scale).softmax(dim=-1)
    # Not exact: timm scales the queries before the product, this test scales the product.
    torch.testing.assert_close(found, own[0], rtol=1e-5, atol=1e-6)


def test_masks_reach_timm_as_they_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which masks a block takes differs between releases: 1.0.24 knows no `is_causal`."""
    model = mergence.apply(FAMILY.tiny()["vit"](), macs=0.67)
    x = torch.randn(2, 37, 48)
    expected = Block.forward(model.blocks[0], x)

    def of_then(self: Any, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=attn_mask)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))

    monkeypatch.setattr(Block, "forward", of_then)
    hidden = torch.zeros(37, 37).fill_diagonal_(-torch.inf)
    with mergence.disabled(model):
        assert torch.equal(model.blocks[0](x), expected)
        assert not torch.equal(model.blocks[0](x, attn_mask=hidden), expected)
        assert torch.equal(model.blocks[0](x, hidden), model.blocks[0](x, attn_mask=hidden))
    for masked in (
        partial(model.blocks[0], x, hidden),
        partial(model.blocks[0], x, is_causal=True),
    ):
        with pytest.raises(ReducedOutputError, match="mask"):
            masked()
