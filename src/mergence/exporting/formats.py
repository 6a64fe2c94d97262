"""Write a model in each format, and run what was written."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergence.errors import ExportError, MissingExtraError

Runner = Callable[[Tensor], list[Tensor]]
"""Images to all outputs of the model."""

INPUT = "images"
# Larger graphs cannot be one file: protocol buffers end at 2 GiB.
_ONE_FILE = 1_900_000_000


@dataclass(frozen=True)
class Format:
    """One way out.

    Attributes:
        suffix: How its files are called.
        write: Writes a model for images like these, with a dynamic batch, to a path.
        open: Reads it again, as something that runs.
    """

    suffix: str
    write: Callable[[nn.Module, Tensor, Path, int], None]
    open: Callable[[Path], Runner]


def tensors(output: Any) -> list[Tensor]:
    """All tensors of a model's output in order, whatever its library wraps them in."""
    if isinstance(output, Tensor):
        return [output]
    values = output.values() if isinstance(output, Mapping) else output
    return [tensor for value in values if value is not None for tensor in tensors(value)]


def _dynamic() -> Any:
    return ({0: torch.export.Dim("batch")},)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever a torch exporter raises into one error, and keep its own warnings quiet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about its own internals, which no user can act on
        try:
            yield
        except Exception as error:
            cause: BaseException = error
            while cause.__cause__ is not None:  # the exporters wrap what went wrong several times
                cause = cause.__cause__
            raise ExportError(
                f"{what} failed ({type(cause).__name__}): {(str(cause).splitlines() or [''])[0]} "
                "What exports has no control flow on values, and only operations that the "
                "format knows; that goes for a method of your own, too (docs/export.md)."
            ) from error


class _Plain(nn.Module):
    """A model that answers with plain dicts where its library has a class of its own for that.

    A program names the class, and could be read only where it was imported before.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return _plain(self.model(images))


def _plain(output: Any) -> Any:
    if isinstance(output, Mapping):
        return {key: _plain(value) for key, value in output.items() if value is not None}
    return output


def _program(model: nn.Module, images: Tensor) -> torch.export.ExportedProgram:
    with torch.no_grad(), _explained("torch.export"):
        if isinstance(model(images[:1]), Mapping):
            model = _Plain(model).train(model.training)
        return torch.export.export(model, (images,), dynamic_shapes=_dynamic())


def _write_onnx(model: nn.Module, images: Tensor, path: Path, opset: int) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime"):
        if find_spec(package) is None:
            raise MissingExtraError(package, "export", "Exporting to ONNX")
    # By way of the program, as for the other formats: tracing a module itself, torch.onnx.export of
    # torch 2.9 settles on batches above 1. The shapes are given again for the name of the batch.
    exported = _program(model, images)
    with torch.no_grad(), _explained("torch.onnx.export"):
        program = torch.onnx.export(
            exported,
            dynamo=True,
            opset_version=opset,
            dynamic_shapes=_dynamic(),
            input_names=[INPUT],
            verbose=False,
        )
        if program is None:  # never with dynamo=True; the signature says so for the old exporter
            raise RuntimeError("there is no program")
        size = sum(value.nbytes for value in model.state_dict().values())
        program.save(path, external_data=size > _ONE_FILE)


def _open_onnx(path: Path) -> Runner:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    # Or its threads would still wait for work, busily, when the next graph takes its turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> list[Tensor]:
        return [torch.from_numpy(y) for y in session.run(None, {INPUT: images.cpu().numpy()})]

    return run


def _write_pt2(model: nn.Module, images: Tensor, path: Path, opset: int) -> None:
    torch.export.save(_program(model, images), path)


def _open_pt2(path: Path) -> Runner:
    module = torch.export.load(path).module()
    return lambda images: tensors(module(images))


def _write_aoti(model: nn.Module, images: Tensor, path: Path, opset: int) -> None:
    program = _program(model, images)
    with _explained("AOTInductor (it compiles C++: a compiler such as g++ must be installed)"):
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def _open_aoti(path: Path) -> Runner:
    module = torch._inductor.aoti_load_package(str(path))
    return lambda images: tensors(module(images))


FORMATS: dict[str, Format] = {
    "onnx": Format(".onnx", _write_onnx, _open_onnx),
    "pt2": Format(".pt2", _write_pt2, _open_pt2),
    "aoti": Format(".pt2", _write_aoti, _open_aoti),
}
"""`onnx`, `pt2` (a torch.export program) and `aoti` (a package compiled for this machine)."""
