"""A reduced model copies, pickles and travels to another process."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergence
from mergence.method import names

LOAD_AND_RUN = """
import sys, torch
models, image = torch.load(sys.argv[1], weights_only=False)
with torch.no_grad():
    torch.save({name: model(image) for name, model in models.items()}, sys.argv[2])
"""


def test_a_deep_copy_reduces_alike_and_is_independent(
    reduced: nn.Module, image: Tensor, output: Any, snapshot: Any
) -> None:
    expected, before = output(reduced, image), snapshot(reduced)
    twin = copy.deepcopy(reduced)
    assert torch.equal(output(twin, image), expected)
    with mergence.disabled(twin):
        assert torch.equal(output(reduced, image), expected)
    mergence.remove(twin)
    with mergence.disabled(reduced):
        dense = output(reduced, image)
    assert torch.equal(output(twin, image), dense)
    assert snapshot(reduced) == before
    assert torch.equal(output(reduced, image), expected)


@pytest.mark.full_product
def test_the_whole_model_pickles(
    reduced: nn.Module, method: str, image: Tensor, output: Any
) -> None:
    expected = output(reduced, image)
    file = io.BytesIO()
    try:
        torch.save(reduced, file)
    except AttributeError:
        with pytest.raises(AttributeError, match="output_capturing_hook"):
            torch.save(mergence.remove(reduced), io.BytesIO())
        pytest.skip("the library's own cannot be pickled")
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is type(reduced)
    assert torch.equal(output(loaded, image), expected)
    assert mergence.recipe_of(loaded) == mergence.recipe_of(reduced)
    with mergence.disabled(reduced):
        dense = output(reduced, image)
    assert torch.equal(output(mergence.remove(loaded), image), dense)


@pytest.mark.slow
def test_pickled_models_run_in_another_process(
    vit: nn.Module, image: Tensor, output: Any, tmp_path: Path
) -> None:
    models = {n: mergence.apply(copy.deepcopy(vit), n, keep_rate=0.7) for n in names()}
    there, back = tmp_path / "models.pt", tmp_path / "outputs.pt"
    torch.save((models, image), there)
    subprocess.run([sys.executable, "-c", LOAD_AND_RUN, str(there), str(back)], check=True)
    outputs = torch.load(back)
    for name, model in models.items():
        # Another process may have another number of threads, and so another order of summing.
        torch.testing.assert_close(outputs[name], output(model, image), rtol=1e-4, atol=1e-5)
