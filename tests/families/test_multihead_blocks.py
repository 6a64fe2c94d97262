"""Restated torchvision and open_clip blocks against the libraries' own, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm
from torchvision.models.vision_transformer import EncoderBlock

import mergence
from mergence.errors import ReducedOutputError, UnsupportedModelError
from mergence.families import open_clip, torchvision
from mergence.families._multihead import scale_of

KINDS: dict[str, Any] = {
    "torchvision": (torchvision, partial(EncoderBlock, 3, 24, 48, 0.2, 0.2)),
    "open_clip": (open_clip, partial(ResidualAttentionBlock, 24, 3)),
    "open_clip layer scale": (open_clip, partial(ResidualAttentionBlock, 24, 3, ls_init_value=0.3)),
}


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A block of each library and the halves of its forward, restated."""
    family, build = KINDS[request.param]
    block: nn.Module = build()
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)  # no scale or bias left at 1 or 0
    return block, (partial(family.first_half, block), partial(family.second_half, block))


@pytest.fixture(autouse=True)
def _no_kernel_of_its_own() -> Iterator[None]:
    # Without gradients nn.MultiheadAttention takes a fused kernel that sums in another order.
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(True)


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_the_restated_block_is_bit_identical(kind: Any, training: bool) -> None:
    block, (first, second) = kind
    block.train(training)
    x = torch.randn(4, 11, 24)
    torch.manual_seed(5)
    expected = block(x)
    torch.manual_seed(5)
    assert torch.equal(second(first(x, None)[0]), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_restated_block_is_bit_identical_in_other_dtypes(kind: Any, dtype: torch.dtype) -> None:
    block, (first, second) = kind
    block.eval().to(dtype)
    x = torch.randn(4, 11, 24, dtype=dtype)
    assert torch.equal(second(first(x, None)[0]), block(x))


def test_the_gradients_of_the_restated_block_are_bit_identical(kind: Any) -> None:
    block, (first, second) = kind
    block.eval()
    x, found = torch.randn(4, 11, 24), []
    for run in (block, lambda x: second(first(x, None)[0])):
        block.zero_grad()
        run(x).square().sum().backward()
        found.append([p.grad.clone() for p in block.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_size_bias_is_a_mask_for_every_pair_of_tokens(kind: Any) -> None:
    block, (first, second) = kind
    block.eval()
    attn = next(m for m in block.modules() if isinstance(m, nn.MultiheadAttention))
    x, bias = torch.randn(4, 11, 24), torch.randint(1, 9, (4, 11)).float().log()
    mask = bias[:, None, None, :].expand(4, 3, 11, 11).reshape(12, 11, 11)

    def masked(module: nn.Module, inputs: Any, options: Any) -> Any:
        return inputs, options | {"attn_mask": mask}

    y, q, k = first(x, bias[:, None, None, :])
    logits = q @ k.transpose(-2, -1) * scale_of(attn) + bias[:, None, None, :]
    normed = block.ln_1(x)
    _, own = attn(normed, normed, normed, attn_mask=mask)
    # Not exact: torch scales the queries before the product.
    torch.testing.assert_close(logits.softmax(dim=-1).mean(dim=1), own, rtol=1e-5, atol=1e-6)
    attn.register_forward_pre_hook(masked, with_kwargs=True)
    torch.testing.assert_close(second(y), block(x), rtol=1e-5, atol=1e-6)


class Adapted(nn.Module):
    """As peft's: it forwards to the weights that are there without what it adds."""

    def __init__(self, attn: Any) -> None:
        super().__init__()
        self.base_layer, self.num_heads, self.head_dim = attn, attn.num_heads, attn.head_dim
        self.in_proj_weight, self.in_proj_bias = attn.in_proj_weight, attn.in_proj_bias
        self.out_proj, self.dropout = attn.out_proj, attn.dropout


class OwnForward(nn.MultiheadAttention):
    def forward(self, *inputs: Any, **options: Any) -> Any:
        return super().forward(*inputs, **options)


def exchange(block: nn.Module, change: Any) -> None:
    (name,) = (n for n, m in block.named_children() if isinstance(m, nn.MultiheadAttention))
    setattr(block, name, change(getattr(block, name)))


@pytest.mark.parametrize("other", [Adapted, lambda attn: OwnForward(24, 3)], ids=["peft", "own"])
def test_an_attention_that_computes_something_else_since_is_refused(kind: Any, other: Any) -> None:
    block, (first, _) = kind
    exchange(block, other)
    with pytest.raises(ReducedOutputError, match=r"a .*(Adapted|OwnForward) now.*merge_and_unload"):
        first(torch.randn(4, 11, 24), None)


def test_a_parametrized_attention_is_still_the_one_of_torch(kind: Any) -> None:
    block, (first, second) = kind
    block.eval()
    attn = next(m for m in block.modules() if isinstance(m, nn.MultiheadAttention))
    weight_norm(attn, "in_proj_weight")
    x = torch.randn(4, 11, 24)
    assert torch.equal(second(first(x, None)[0]), block(x))


def test_pruned_weights_are_those_of_this_forward(kind: Any) -> None:
    block, (first, second) = kind
    block.eval()
    attn = next(m for m in block.modules() if isinstance(m, nn.MultiheadAttention))
    prune.l1_unstructured(attn, "in_proj_weight", amount=0.3)
    prune.random_unstructured(attn, "in_proj_bias", amount=0.3)
    x = torch.randn(4, 11, 24)
    for _ in range(2):  # pruning sets them before each forward
        second(first(x, None)[0]).sum().backward()
        with torch.no_grad():
            attn.in_proj_weight_orig.mul_(1.5)
            attn.in_proj_bias_orig.mul_(1.5)
    found = second(first(x, None)[0])
    assert torch.equal(found, block(x))


def test_one_parametrized_before_is_refused_with_what_may_have_made_it_one(fresh: Any) -> None:
    model = fresh("torchvision-vit")
    weight_norm(model.encoder.layers[0].self_attention, "in_proj_weight")
    with pytest.raises(UnsupportedModelError, match=r"fully_shard or a parametrization made it"):
        mergence.apply(model, macs=0.67)
