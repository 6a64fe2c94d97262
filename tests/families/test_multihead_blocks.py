"""Restated torchvision and open_clip blocks against the libraries' own, to the last bit."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from open_clip.transformer import ResidualAttentionBlock
from torch import nn
from torchvision.models.vision_transformer import EncoderBlock

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
