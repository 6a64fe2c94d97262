"""What a device is called."""

import platform
from pathlib import Path

import pytest
import torch

from mergence.devices import described

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
