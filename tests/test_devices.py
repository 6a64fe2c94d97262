"""What a device is called."""

import platform
from pathlib import Path

import pytest
import torch
from torch import nn

from mergence.devices import described, placed

CPU = torch.device("cpu")


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="Linux's list of processors")
def test_a_cpu_is_called_by_the_name_of_its_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "processor", platform.machine)  # as on some distributions
    told = Path("/proc/cpuinfo").read_text().splitlines()
    named = [line for line in told if line.startswith("model name")]
    if not named:
        pytest.skip("this kernel does not name its processor")
    assert described(CPU) == f"cpu ({named[0].partition(':')[2].strip()})"


def test_where_nothing_names_it_its_architecture_does(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(Path, "exists", lambda self: False)
    assert described(CPU) == f"cpu ({platform.machine()})"


def test_a_model_is_copied_only_where_it_has_to_change() -> None:
    model = nn.Sequential(nn.LayerNorm(4), nn.Conv2d(3, 4, 2))
    model[1].bfloat16()
    images = torch.bfloat16  # what meets them is the convolution
    assert placed(model, None, None) == (model, CPU, images)
    assert placed(model, "cpu", None) == (model, CPU, images)
    changed, place, type_ = placed(model, None, torch.float32)
    assert (place, type_) == (CPU, torch.float32)
    assert {parameter.dtype for parameter in changed.parameters()} == {torch.float32}
    assert model[1].weight.dtype == images
    assert placed(changed, "cpu", torch.float32)[0] is changed
