"""Exported files, used as somebody without mergence uses them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnxruntime
import pytest
import timm
import torch
from torch import Tensor
from typer.testing import CliRunner

import mergence
from mergence import family
from mergence.cli import app
from mergence.errors import ExportError
from mergence.exporting import formats, speed
from mergence.program import program_of

pytestmark = pytest.mark.slow


@pytest.fixture
def model(shorten: Any) -> Any:
    """A tiny model of two blocks, of which the first reduces."""
    short = shorten(family.registry()["timm"].tiny()["vit"](), 2)
    return mergence.apply(short, schedule=[20, 20])


@pytest.fixture
def images() -> Tensor:
    return torch.randn(6, 3, 96, 96, generator=torch.Generator().manual_seed(1))


def test_a_program_of_transformers_is_read_without_transformers(
    tmp_path: Path, shorten: Any
) -> None:
    model = shorten(family.registry()["transformers"].tiny()["vit"](), 2)
    mergence.apply(model, schedule=[20, 20])
    images = torch.randn(2, 3, 96, 96)
    mergence.export(model, tmp_path / "m.pt2", images)
    torch.save(images, tmp_path / "images.pt")
    program = (
        "import sys, torch; sys.modules['transformers'] = sys.modules['mergence'] = None;"
        "found = torch.export.load('m.pt2').module()(torch.load('images.pt'));"
        "torch.save(found, 'found.pt')"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    found = torch.load(tmp_path / "found.pt")
    assert found.keys() == {"logits"}
    with torch.no_grad():
        torch.testing.assert_close(found["logits"], model(images).logits, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_onnx_with_its_weights_beside_runs_from_its_place(
    model: Any, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(formats, "_ONE_FILE", 0)  # as if the model were larger than 2 GB
    done = mergence.export(model, tmp_path / "m.onnx", images)
    names = sorted(file.name for file in tmp_path.iterdir())
    assert names == ["m.onnx", "m.onnx.data"]
    session = onnxruntime.InferenceSession(done.path, providers=["CPUExecutionProvider"])
    (given,) = session.get_inputs()
    assert given.shape == ["batch", 3, 96, 96]
    for batch in (images[:1], images):
        (found,) = session.run(None, {"images": batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), model(batch), rtol=1e-4, atol=1e-5)
    assert done.opset == 18
    assert done.operators["TopK"] == 2  # the lowest score that stays, and the order of the tokens
    assert not graph_scatters(done.operators)


def test_the_threads_of_a_graph_that_has_run_leave_the_cores_to_others(tmp_path: Path) -> None:
    onnx, images, file = formats.FORMATS["onnx"], torch.randn(64, 512), tmp_path / "m.onnx"
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        onnx.write(torch.nn.Linear(512, 512), images, file, 18)
        run = onnx.open(file)
    finally:
        torch.set_num_threads(threads)
    for _ in range(10):
        run(images)
    begin = time.process_time()
    time.sleep(0.05)
    assert time.process_time() - begin < 0.01


def graph_scatters(operators: dict[str, int]) -> bool:
    return any(name.startswith("Scatter") for name in operators)


RUN = """
import sys, torch
sys.modules["mergence"] = None
kind, file, images = sys.argv[1:]
if kind == "pt2":
    model = torch.export.load(file).module()
else:
    model = torch._inductor.aoti_load_package(file)
y = model(torch.load(images))
torch.save(y if isinstance(y, torch.Tensor) else y[0], images)
"""


@torch.no_grad()
@pytest.mark.parametrize("kind", ["pt2", "aoti"])
def test_torch_files_run_without_mergence(
    kind: str, model: Any, images: Tensor, tmp_path: Path
) -> None:
    if kind == "aoti" and shutil.which("g++") is None:
        pytest.skip("AOTInductor compiles C++, and there is no g++ here")
    done = mergence.export(model, tmp_path / "m.pt2", images, to=kind)
    assert done.agreement.worst < 1e-5
    assert (done.to, done.operators) == (kind, {})
    torch.save(images[:5], tmp_path / "images.pt")
    command = [sys.executable, "-c", RUN, kind, done.path, str(tmp_path / "images.pt")]
    subprocess.run(command, check=True)
    found = torch.load(tmp_path / "images.pt")
    torch.testing.assert_close(found, model(images[:5]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("to", ["onnx", "pt2"])
def test_a_forward_that_looks_at_values_is_explained(
    to: str, model: Any, images: Tensor, tmp_path: Path
) -> None:
    def look(module: Any, arguments: Any, y: Tensor) -> Tensor:
        return y if y.sum() > 0 else -y

    model.norm.register_forward_hook(look)
    with pytest.raises(ExportError, match=r"failed \(.*no control flow on values"):
        mergence.export(model, tmp_path / f"m.{to}", images)
    assert not list(tmp_path.iterdir())


def test_the_command_writes_checks_and_times(tmp_path: Path) -> None:
    sizes = {"embed_dim": 48, "depth": 2, "num_heads": 3, "img_size": 96}
    tiny = timm.create_model("vit_tiny_patch16_224", **sizes)
    timm.models.save_for_hf(tiny, str(tmp_path / "tiny"), safe_serialization=True)
    out, report = tmp_path / "m.onnx", tmp_path / "r.json"
    command = ["export", f"local-dir:{tmp_path / 'tiny'}", "--out", str(out), "--images", "6"]
    timing = ["--batch-size", "8", "--seconds", "0", "--json", str(report)]
    result = CliRunner().invoke(
        app, [*command, "--keep-rate", "0.6", *timing], catch_exceptions=False
    )
    assert result.exit_code == 0, result.output
    data = json.loads(report.read_text())
    # Two for the reduction of the first block; that of the last is left out.
    assert data["export"]["operators"]["TopK"] == 2
    assert data["export"]["agreement"]["images"] == 6
    assert data["recipe"]["schedule"]["keep_rate"] == 0.6
    dense, reduced = data["speed"]
    assert (dense["name"], reduced["name"]) == ("dense", "reduced")
    assert dense["batch"] == reduced["batch"] == 8
    assert reduced["macs_ratio"] < 0.9
    assert reduced["of_ideal"] == pytest.approx(dense["ms"] / reduced["ms"] * reduced["macs_ratio"])
    assert "same answer on 6" in result.output
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == ["batch", 3, 96, 96]


def test_macs_are_those_at_the_size_that_is_timed(
    monkeypatch: pytest.MonkeyPatch, fresh: Any
) -> None:
    graph = SimpleNamespace(write=lambda *_: None, open=lambda _: lambda images: images)
    monkeypatch.setattr(speed, "FORMATS", {"onnx": graph})
    model = mergence.apply(fresh("transformers-dinov2"), schedule=[20] * 6)  # for 36 patches
    _, reduced = speed.compare(model, "m.onnx", torch.randn(1, 3, 160, 160), seconds=0)
    assert reduced.macs_ratio == program_of(model).share(100)
    assert reduced.macs_ratio != mergence.describe(model).macs_ratio
