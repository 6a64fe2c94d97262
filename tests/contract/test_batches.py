"""Images do not see each other: in a batch, in threads, or after a forward that failed."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergence
from mergence.method import names


@pytest.mark.full_product
def test_a_batch_equals_its_images_one_by_one(
    reduced: nn.Module, image: Tensor, output: Any
) -> None:
    # In float64, where another order of summing cannot tip a choice between two tokens. Importance
    # and sizes are float32 by design, hence not tighter.
    reduced, image = reduced.double(), image.double()
    single = torch.cat([output(reduced, one.unsqueeze(0)) for one in image])
    torch.testing.assert_close(output(reduced, image), single, rtol=1e-6, atol=1e-6)


def test_no_image_has_no_answer(reduced: nn.Module, image: Tensor, output: Any) -> None:
    with mergence.disabled(reduced):
        try:
            expected = output(reduced, image[:0]).shape
        except (RuntimeError, ValueError):
            pytest.skip("the library's own takes none")
    assert output(reduced, image[:0]).shape == expected


@pytest.mark.parametrize("method", names())
def test_images_can_be_mapped(vit: nn.Module, image: Tensor, method: str) -> None:
    mergence.apply(vit.double(), method, keep_rate=0.7)
    with torch.no_grad():
        mapped = torch.func.vmap(vit, randomness="error")(image.double().unsqueeze(1)).squeeze(1)
        torch.testing.assert_close(mapped, vit(image.double()), rtol=1e-6, atol=1e-6)


def test_three_threads_at_once_equal_one_after_another(
    reduced: nn.Module, inputs: Any, output: Any, spec: Any, threads: Any
) -> None:
    images = [inputs(batch) for batch in (1, 2, 3)]
    expected = [output(reduced, image) for image in images]
    together = threading.Barrier(3, timeout=10)

    def meet(*_: object) -> None:
        together.wait()

    # All three stand in the middle of the model at the same time, whatever the scheduler does.
    for block in (spec(reduced).blocks[2], spec(reduced).blocks[-1]):
        block.register_forward_pre_hook(meet)
    with threads(3) as pool:
        found = list(pool.map(lambda image: output(reduced, image), images))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_disabling_in_one_thread_leaves_the_others_reduced(
    reduced: nn.Module, image: Tensor, output: Any, threads: Any
) -> None:
    expected = output(reduced, image)
    with mergence.disabled(reduced), threads(1) as pool:
        assert not torch.equal(output(reduced, image), expected)
        assert torch.equal(pool.submit(output, reduced, image).result(), expected)


def test_a_forward_that_fails_leaves_nothing_behind(
    reduced: nn.Module, image: Tensor, inputs: Any, output: Any, spec: Any
) -> None:
    expected = output(reduced, image)

    def fail(*_: object) -> None:
        raise ValueError("from inside")

    handle = spec(reduced).blocks[-1].register_forward_pre_hook(fail)
    with pytest.raises(ValueError, match="from inside"):
        output(reduced, inputs(1))
    with pytest.raises(ValueError, match="from inside"):
        mergence.trace(reduced, image)
    handle.remove()
    assert torch.equal(output(reduced, image), expected)
