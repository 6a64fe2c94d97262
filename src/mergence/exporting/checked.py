"""Export a model, and keep the file only where it does what the model does."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mergence.errors import OptionError
from mergence.exporting import agreement, graph
from mergence.exporting.agreement import Agreement
from mergence.exporting.formats import FORMATS, Format
from mergence.files import check_target, staged
from mergence.program import require_images_alone


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        path: The file.
        to: Its format.
        opset: The ONNX opset; None for other formats.
        image: The shape of one image (or video) that it takes; the batch is dynamic.
        torch: The version that exported it.
        agreement: How it compares with the model.
        operators: The operators of the ONNX graph with how often each is there; else empty.
    """

    path: str
    to: str
    opset: int | None
    image: tuple[int, ...]
    torch: str
    agreement: Agreement
    operators: dict[str, int]

    def to_dict(self) -> dict[str, Any]:
        """The export as plain JSON values."""
        return asdict(self)


def export(
    model: nn.Module,
    path: str | Path,
    images: Tensor,
    *,
    to: str | None = None,
    opset: int = 18,
) -> Export:
    """Write a model, reduced or not, for use without mergence, and check what was written.

    The file is written elsewhere, run on the images at several batch sizes and compared with the
    model before it is moved to its place; where anything is wrong, nothing is left behind.

    Example:
        >>> mergence.export(model, "model.onnx", images)
        >>> mergence.export(model, "model.pt2", images)
        >>> mergence.export(model, "package.pt2", images, to="aoti")

    Args:
        model: The model, in evaluation mode.
        path: The file to write.
        images: `[B, C, H, W]` real images, or videos `[B, T, C, H, W]`, prepared as for the model,
            at least 2. Their size is that of the exported model; its batch is dynamic.
        to: `onnx`, `pt2` (torch.export) or `aoti` (AOTInductor: compiled for this kind of machine,
            needs a C++ compiler). None goes by the suffix.
        opset: Version of the ONNX operators, 18 or later.

    Raises:
        OptionError: An argument cannot be used; nothing was done.
        Exception: Whatever the model itself raises for these images.
        ExportError: The exporter failed, the graph has operators that runtimes cannot run well, or
            what was exported does not do what the model does.
        MissingExtraError: A package that exports or runs the format is not installed.
    """
    path = Path(path).expanduser()
    name, form = format_of(path, to)
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise OptionError("The model is wrapped by torch.compile. Pass its `_orig_mod`.")
    if model.training:
        raise OptionError(
            "The model is in training mode, with dropout and the like. Call model.eval() first."
        )
    require_images_alone(model)
    given: Any = images
    if not isinstance(given, Tensor):
        raise OptionError(
            f"The images are a {type(given).__name__}; give a tensor. A loader's batch often holds "
            "labels as well: images, labels = batch."
        )
    if images.ndim not in (4, 5) or len(images) < 2:
        raise OptionError(
            f"The images have the shape {list(images.shape)}; give [B, C, H, W], or "
            "[B, T, C, H, W] for videos, with a batch of at least 2, so that the batch can be told "
            "from the other sizes."
        )
    if opset < 18:
        raise OptionError(f"opset {opset} is too old for torch's exporter; give 18 or later.")
    _run(model, images[:2])
    with staged(path.parent, what=path) as temporary:
        file = temporary / path.name
        form.write(model, images[:2], file, opset)
        operators = {}
        if name == "onnx":
            graph.check(file)
            operators = graph.operators(file)
        found = agreement.compare(model, form.open(file), images)
    return Export(
        path=str(path),
        to=name,
        opset=opset if name == "onnx" else None,
        image=tuple(images.shape[1:]),
        torch=torch.__version__,
        agreement=found,
        operators=operators,
    )


@torch.no_grad()
def _run(model: nn.Module, images: Tensor) -> None:
    """Run the model as it is, so that an error of its own is not taken for one of the export.

    Raises:
        OptionError: It does not run, and the images are of another type than its weights; some
            models convert them.
    """
    try:
        model(images)
    except RuntimeError as error:
        types = {p.dtype for p in model.parameters() if p.is_floating_point()}
        if not types or images.dtype in types:
            raise
        raise OptionError(
            f"The images are of {images.dtype} and the model of {', '.join(map(str, types))}, and "
            f"it does not run: {str(error).splitlines()[0]}. Convert the images: images.to(dtype)."
        ) from error


def format_of(path: Path, to: str | None) -> tuple[str, Format]:
    """The format that a file is to be written in.

    Raises:
        OptionError: There is no such format, the suffix says another, or there is no such folder.
    """
    suffixes = {form.suffix: name for name, form in reversed(FORMATS.items())}
    name = suffixes.get(path.suffix) if to is None else to
    if name not in FORMATS:
        raise OptionError(
            f"'{path.name if to is None else to}' names no format. Choose from "
            f"{', '.join(FORMATS)}, or end the file's name in {' or '.join(sorted(suffixes))}."
        )
    form = FORMATS[name]
    if path.suffix != form.suffix:
        raise OptionError(f"A file of the format {name} ends in {form.suffix}; '{path}' does not.")
    check_target(path, str(path))
    return name, form
