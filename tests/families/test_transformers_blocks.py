"""Restated transformers blocks against the library's own, to the last bit."""

from __future__ import annotations

from functools import partial
from inspect import signature
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mergence.families._transformers_blocks import first_half, scale_of, second_half
from mergence.families.transformers import FAMILY

KINDS = (
    *("vit", "deit", "dinov2", "dinov2_reg", "clip", "siglip", "videomae"),
    *("owlvit", "blip", "blip2", "vitpose_backbone"),
)
RANDOM = (
    "hidden_dropout_prob",
    "attention_probs_dropout_prob",
    "attention_dropout",
    "drop_path_rate",
)


@pytest.fixture(params=["sdpa", "eager"])
def kernel(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, kernel: str, fresh: Any) -> tuple[Any, Any, Any]:
    """A block of each architecture, with all the dropout it can have, its call and its halves."""
    spec = FAMILY.inspect(fresh(f"transformers-{request.param}"))
    found, layout = spec.blocks[0], spec.block_mixin._mergence_layout
    attn = getattr(found, layout.attention)
    config = (attn.attention if layout.split else attn).config
    options = {name: 0.3 for name in RANDOM if hasattr(config, name)}
    config = type(config)(**(config.to_dict() | options))
    config._attn_implementation = kernel
    block = type(found)(config)
    block.load_state_dict(found.state_dict())

    takes = signature(block.forward).parameters

    def call(x: Tensor, bias: Tensor | None = None) -> Tensor:
        if bias is not None and (layout.split or hasattr(attn, "qkv")):
            pytest.skip("the library's block has no way in for a bias")
        masks = {"attention_mask": bias, "causal_attention_mask": None}  # in older releases
        masks |= {"output_attentions": kernel == "eager" and layout.tuples}
        y: Any = block(x, **{name: mask for name, mask in masks.items() if name in takes})
        return y[0] if layout.tuples else y

    return block, call, (partial(first_half, block, layout), partial(second_half, block, layout))


def size_bias(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randint(1, 9, (4, 11)).to(dtype).log()[:, None, None, :]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("biased", [False, True], ids=["no bias", "size bias"])
def test_the_restated_block_is_bit_identical(kind: Any, biased: bool, training: bool) -> None:
    block, call, (first, second) = kind
    block.train(training)
    x, bias = torch.randn(4, 11, 48), size_bias() if biased else None
    torch.manual_seed(5)
    expected = call(x, bias)
    torch.manual_seed(5)
    assert torch.equal(second(first(x, bias)[0]), expected)
    # The bias is no bystander.
    block.eval()
    assert not biased or not torch.equal(call(x), call(x, bias))


@pytest.mark.usefixtures("torchs_attention")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_restated_block_is_bit_identical_in_other_dtypes(kind: Any, dtype: torch.dtype) -> None:
    block, call, (first, second) = kind
    block.eval().to(dtype)
    x, bias = torch.randn(4, 11, 48, dtype=dtype), size_bias(dtype)
    assert torch.equal(second(first(x, bias)[0]), call(x, bias))


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_gradients_of_the_restated_block_are_bit_identical(kind: Any, training: bool) -> None:
    block, call, (first, second) = kind
    block.train(training)
    x, found = torch.randn(4, 11, 48), []
    for run in (call, lambda x: second(first(x, None)[0])):
        torch.manual_seed(5)
        block.zero_grad()
        run(x).square().sum().backward()
        found.append([p.grad.clone() for p in block.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("kernel", ["eager"], indirect=True)
def test_a_reduction_gets_the_queries_and_keys_of_the_attention(kind: Any) -> None:
    block, call, (first, _) = kind
    block.eval()
    attn: nn.Module = next(
        m for m in block.modules() if any(hasattr(m, name) for name in ("q_proj", "query", "qkv"))
    )
    own: list[Tensor] = []
    attn.register_forward_hook(lambda module, x, y: own.append(y[1]))
    x = torch.randn(4, 11, 48)
    call(x)
    _, q, k = first(x, None)
    found = (q @ k.transpose(-2, -1) * scale_of(attn)).softmax(dim=-1)
    torch.testing.assert_close(found, own[0], rtol=1e-5, atol=1e-6)
