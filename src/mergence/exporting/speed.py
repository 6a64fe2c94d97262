"""The ONNX graph of a reduced model against that of the dense one, in onnxruntime on the CPU."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn

from mergence.api import disabled
from mergence.benchmark import Row, judged, row_of, take_turns
from mergence.evaluation import DENSE, patches_in
from mergence.exporting.formats import FORMATS
from mergence.program import program_of


def compare(
    model: nn.Module,
    path: str | Path,
    images: Tensor,
    *,
    opset: int = 18,
    seconds: float = 5.0,
) -> tuple[Row, ...]:
    """Export the dense model for the moment and let both graphs take turns.

    Args:
        model: The reduced model.
        path: Its ONNX file.
        images: `[B, C, H, W]`, the batch to time.
        opset: That of the dense graph.
        seconds: Keep taking turns for so long, but take at least seven.

    Returns:
        A row of the dense graph and one of the reduced.

    Raises:
        MergenceError: The model is not reduced.
        ExportError: The dense model cannot be exported.
    """
    ratio = program_of(model).share(patches_in(model, images))
    form = FORMATS["onnx"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "dense.onnx"
        with disabled(model):
            form.write(model, images[:2], file, opset)
        calls = {DENSE: form.open(file), "reduced": form.open(Path(path))}
    with torch.inference_mode():
        times = take_turns(calls, images.cpu(), seconds, rounds=7)
    dense = statistics.median(times[DENSE])
    kind = str(images.dtype).removeprefix("torch.")
    return tuple(
        judged(
            row_of(name, len(images), kind, "onnxruntime", times[name], dense, share, None)
            for name, share in ((DENSE, 1.0), ("reduced", ratio))
        )
    )
