"""Attention with a bias on the keys, and one row of it, against the whole map in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from mergence import ops
from mergence.ops import cpu, dense, fused, products

CPU = torch.device("cpu")
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
# batch, heads, tokens, head dim
SHAPES = [(1, 1, 2, 16), (2, 3, 33, 64), (1, 2, 70, 80), (1, 1, 130, 128), (1, 2, 65, 24)]


def packed(
    shape: tuple[int, int, int, int], dtype: torch.dtype, place: torch.device
) -> tuple[Tensor, ...]:
    """Queries, keys and values as they come out of one projection."""
    batch, heads, tokens, dim = shape
    qkv = torch.randn(batch, tokens, 3, heads, dim).to(dtype).to(place)
    return qkv.permute(2, 0, 3, 1, 4).unbind(0)


def sizes(batch: int, tokens: int, dtype: torch.dtype, place: torch.device) -> Tensor:
    bias = torch.randint(1, 40, (batch, tokens)).log()
    bias[:, 0] = 0
    return bias.to(dtype).to(place)[:, None, None, :]


def whole_map(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    logits = q.double() @ k.double().transpose(2, 3) * q.shape[3] ** -0.5
    return (logits if bias is None else logits + bias.double()).softmax(dim=3)


def relative(value: Tensor, expected: Tensor) -> float:
    return float((value.double() - expected).norm() / expected.norm())


@HALF
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_that_of_the_whole_map(
    shape: tuple[int, int, int, int], dtype: torch.dtype, place: torch.device
) -> None:
    q, k, v = packed(shape, dtype, place)
    bias = sizes(shape[0], shape[2], dtype, place)
    y = fused.attend(q, k, v, bias, 0.0)
    assert y.shape == q.shape
    assert y.dtype == dtype
    assert y.transpose(1, 2).is_contiguous()  # heads come together without a copy
    assert relative(y, whole_map(q, k, bias) @ v.double()) < CLOSE[dtype]


@pytest.mark.slow
def test_attention_over_many_tokens(place: torch.device) -> None:
    q, k, v = packed((1, 1, 1370, 64), torch.bfloat16, place)
    bias = sizes(1, 1370, torch.bfloat16, place)
    y = fused.attend(q, k, v, bias, 0.0)
    assert relative(y, whole_map(q, k, bias) @ v.double()) < 1e-2


def test_keys_at_minus_infinity_have_no_weight(place: torch.device) -> None:
    q, k, v = packed((1, 2, 140, 32), torch.float16, place)
    bias = torch.zeros(1, 1, 1, 140, dtype=torch.float16, device=place)
    bias[..., :70] = -torch.inf  # more than the first block of keys
    expected = whole_map(q, k[:, :, 70:], None) @ v[:, :, 70:].double()
    assert relative(fused.attend(q, k, v, bias, 0.0), expected) < CLOSE[torch.float16]


@pytest.mark.parametrize("shape", [(1, 1, 1, 9), (3, 1, 1, 1), (1, 1, 1, 1)], ids=str)
def test_a_bias_is_broadcast(shape: tuple[int, int, int, int], place: torch.device) -> None:
    q, k, v = packed((3, 2, 9, 16), torch.bfloat16, place)
    bias = torch.randn(shape, device=place).bfloat16()
    whole = bias.expand(3, 1, 1, 9).contiguous()
    row = q[:, :, :1], k, 0.25
    assert torch.equal(fused.attend(q, k, v, bias, 0.0), fused.attend(q, k, v, whole, 0.0))
    assert torch.equal(fused.attention_of_row(*row, bias), fused.attention_of_row(*row, whole))


def test_what_the_kernel_does_not_do_is_left_to_torch(place: torch.device) -> None:
    q, k, v = packed((1, 2, 9, 16), torch.bfloat16, place)
    bias, pairs = sizes(1, 9, torch.bfloat16, place), torch.randn(1, 2, 9, 9, device=place)
    cases = [(q, None), (q, pairs.bfloat16()), (q.clone().requires_grad_(), bias)]
    for query, added in cases:
        expected = dense.attend(query, k, v, added, 0.0)
        y = fused.attend(query, k, v, added, 0.0)
        assert torch.equal(y, expected)
        assert y.requires_grad == query.requires_grad


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (1, 1, 1500, 64)], ids=str)
@pytest.mark.parametrize("implementation", [dense, fused], ids=["dense", "fused"])
def test_a_row_is_that_of_the_whole_map(
    implementation: object,
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    place: torch.device,
) -> None:
    q, k, _ = packed(shape, dtype, place)
    for bias in (None, sizes(shape[0], shape[2], dtype, place)):
        arguments = q[:, :, 1:2], k, shape[3] ** -0.5, bias
        row = implementation.attention_of_row(*arguments)  # type: ignore[attr-defined]
        assert row.dtype == torch.float32
        assert relative(row, whole_map(q, k, bias)[:, :, 1]) < CLOSE[dtype]


def test_a_row_whose_gradient_is_wanted_has_one(place: torch.device) -> None:
    q, k, _ = packed((1, 2, 9, 16), torch.float32, place)
    row = fused.attention_of_row(q[:, :, :1].requires_grad_(), k, 0.25, None)
    row[..., 0].sum().backward()
    assert q.grad is None
    assert row.requires_grad


@given(
    shape=st.tuples(
        st.integers(1, 3), st.integers(1, 4), st.integers(1, 40), st.sampled_from([8, 24, 64])
    ),
    at_a_time=st.sampled_from([1, 3000, products.AT_A_TIME]),
    seed=st.integers(0, 99),
)
@settings(deadline=None, max_examples=60)
def test_products_are_the_whole_map_however_many_heads_are_computed_at_a_time(
    shape: tuple[int, int, int, int], at_a_time: int, seed: int
) -> None:
    torch.manual_seed(seed)
    q, k, v = packed(shape, torch.bfloat16, CPU)
    bias = sizes(shape[0], shape[2], torch.bfloat16, CPU)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "AT_A_TIME", at_a_time)
        y = products.attend(q, k, v, bias)
    assert (y.shape, y.dtype) == (q.shape, torch.bfloat16)
    assert relative(y, whole_map(q, k, bias) @ v.double()) < 1e-2


@pytest.mark.parametrize("tokens", [577, pytest.param(1370, marks=pytest.mark.slow)])
def test_products_over_many_tokens(tokens: int) -> None:
    q, k, v = packed((1, 3, tokens, 64), torch.bfloat16, CPU)
    bias = sizes(1, tokens, torch.bfloat16, CPU)
    assert relative(products.attend(q, k, v, bias), whole_map(q, k, bias) @ v.double()) < 1e-2


def test_images_do_not_see_each_others_sizes() -> None:
    q, k, v = packed((5, 3, 30, 16), torch.bfloat16, CPU)
    bias = sizes(5, 30, torch.bfloat16, CPU)
    together = products.attend(q, k, v, bias)
    for one in range(5):
        part = slice(one, one + 1)
        alone = products.attend(q[part], k[part], v[part], bias[part])
        torch.testing.assert_close(alone, together[part])


def test_products_have_the_gradients_of_the_fused_attention() -> None:
    tensors = packed((2, 3, 17, 16), torch.float64, CPU)
    bias = sizes(2, 17, torch.float64, CPU)
    grads = []
    for attend in (products.attend, lambda *a: dense.attend(*a, 0.0)):
        leaves = [t.clone().requires_grad_() for t in (*tensors, bias)]
        attend(*leaves).square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    torch.testing.assert_close(*grads)


def test_products_are_taken_where_they_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    bias = sizes(1, 9, torch.bfloat16, CPU)
    q, k, v = packed((1, 2, 9, 16), torch.bfloat16, CPU)
    both = products.attend(q, k, v, bias), dense.attend(q, k, v, bias, 0.0)
    assert not torch.equal(*both)
    for able, expected in ((True, both[0]), (False, both[1])):
        monkeypatch.setattr(products, "VECTORS", able)
        assert torch.equal(ops.attend(q, k, v, bias), expected)
    monkeypatch.setattr(products, "VECTORS", True)
    monkeypatch.setattr(products, "attend", None)  # all else is left to torch
    pairs = torch.randn(1, 2, 9, 9, dtype=torch.bfloat16)
    for added in (None, pairs):
        assert torch.equal(ops.attend(q, k, v, added), dense.attend(q, k, v, added, 0.0))
    q, k, v, bias = (t.float() for t in (q, k, v, bias))
    assert torch.equal(ops.attend(q, k, v, bias), dense.attend(q, k, v, bias, 0.0))
    assert ops.attend(q, k, v, bias, 0.5).shape == q.shape


@pytest.mark.slow
def test_a_graph_of_products_holds_for_any_number_of_images(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(products, "VECTORS", True)
    torch.compiler.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=graphs)
    def step(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return cpu.attend(q, k, v, bias, 0.0) + 1

    for batch in (2, 3, 7):
        given = (
            *packed((batch, 2, 40, 16), torch.bfloat16, CPU),
            sizes(batch, 40, torch.bfloat16, CPU),
        )
        for tensor in given:
            torch._dynamo.mark_dynamic(tensor, 0)
        assert torch.equal(step(*given), products.attend(*given) + 1)
    assert graphs.frame_count == 1
    # Where a gradient is wanted it is torch's own.
    leaf = given[0].clone().requires_grad_()
    step(leaf, *given[1:]).sum().backward()
    assert leaf.grad is not None
    torch.compiler.reset()
    torch.library.opcheck(products.in_graph, given)
