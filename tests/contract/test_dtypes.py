"""Half precision, double precision and autocast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergence


@pytest.mark.full_product
def test_the_models_dtype_is_kept(
    reduced: nn.Module, image: Tensor, output: Any, spec: Any
) -> None:
    stream = []
    for block in spec(reduced).blocks:
        block.register_forward_hook(
            lambda module, x, y: stream.append((y if isinstance(y, Tensor) else y[0]).dtype)
        )
    for dtype in (torch.float64, torch.bfloat16, torch.float16):
        stream.clear()
        y = output(reduced.to(dtype), image.to(dtype))
        assert {y.dtype, *stream} == {dtype}
        assert y.isfinite().all()


def test_torchs_default_type_changes_nothing(
    reduced: nn.Module, image: Tensor, output: Any
) -> None:
    expected = output(reduced, image)
    half, halved = copy.deepcopy(reduced).bfloat16(), image.bfloat16()
    expected_half = output(half, halved)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with mergence.disabled(reduced):
            dense = output(reduced, image)
        found, found_half = output(reduced, image), output(half, halved)
    finally:
        torch.set_default_dtype(torch.float32)
    with mergence.disabled(reduced):
        if not torch.equal(dense, output(reduced, image)):
            pytest.skip("it changes the library's own answers")
    assert torch.equal(found, expected)
    assert torch.equal(found_half, expected_half)


def test_autocast_leaves_the_residual_stream_as_the_dense_model_has_it(
    dense: nn.Module, method: str, image: Tensor, output: Any, spec: Any
) -> None:
    stream: list[torch.dtype] = []
    for block in spec(dense).blocks:
        block.register_forward_hook(
            lambda module, x, y: stream.append((y if isinstance(y, Tensor) else y[0]).dtype)
        )
    with torch.autocast("cpu", torch.bfloat16):
        expected = output(dense, image).dtype
        dense_stream = stream.copy()
        mergence.apply(dense, method, keep_rate=0.7)
        y = output(dense, image)
    assert y.dtype == expected
    assert y.isfinite().all()
    assert stream == dense_stream * 2


def test_shapes_are_found_out_without_computing(
    dense: nn.Module, method: str, image: Tensor, output: Any, spec: Any
) -> None:
    shape = output(dense, image).shape
    try:
        output(copy.deepcopy(dense).to("meta"), image.to("meta"))
    except RuntimeError:
        pytest.skip("the library looks at values")
    mergence.apply(dense, method, keep_rate=0.7, coarse=0.25 if spec(dense).coarse else 0)
    assert output(dense.to("meta"), image.to("meta")).shape == shape
