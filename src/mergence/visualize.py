"""Pictures of a reduction: which tokens stayed, and what was merged into what.

The pixel work is done by small functions on tensors; `draw` only arranges their results.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mergence import family
from mergence.api import applied, disabled
from mergence.errors import DataError, MissingExtraError, OptionError
from mergence.files import check_target, staged_file
from mergence.outputs import answer
from mergence.regions import crucial_only, region_borders, region_colours, spread, stray_links
from mergence.tracing import trace

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

    from mergence.models import LoadedModel
    from mergence.recipe import Recipe
    from mergence.tracing import ReductionPoint, Trace

SUFFIXES = (".png", ".pdf", ".svg")
MAX_POINTS = 4
_MAX_LINKS = 16  # more lines would hide the regions that they explain
# By the number of points shown: wide figures are shown smaller, so their text is larger.
_FONT = (9.0, 10.0, 11.0, 12.0)  # points
_PANEL = (2.3, 1.9, 1.75, 1.6)  # inches
_MARGIN, _GAP, _BETWEEN = 0.15, 0.08, 0.3
_INK, _SOFT, _LINK = "#1a1a1a", "#555555", "#e69f00"


def check_path(path: str | Path) -> Path:
    """Refuse a picture that could not be drawn and saved; call it before long work.

    Raises:
        OptionError: It could not be written to this path.
        MissingExtraError: matplotlib is not installed.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise OptionError(
            f"A picture cannot be saved as '{path.name}': the suffix is '{path.suffix}'. "
            f"Use one of {', '.join(SUFFIXES)}."
        )
    check_target(path, str(path))
    if find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "viz", "Drawing a picture")
    return path


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, PDF or SVG, by the path's suffix.

    Raises:
        OptionError: It cannot be written to this path.
        MissingExtraError: matplotlib is not installed.
    """
    path = check_path(path)
    with staged_file(path) as file:
        kind = path.suffix[1:].lower()  # a link may lead to another name
        figure.savefig(file, format=kind, dpi=figure.dpi, facecolor="white")
    return path


def draw(
    images: Tensor | Sequence[Image],
    trace: Trace,
    *,
    titles: Sequence[str] | None = None,
    captions: Sequence[str] | None = None,
) -> Figure:
    """Draw what a reduction did with each image, one row an image.

    Args:
        images: what the model saw, before normalisation: uint8 or float in [0, 1], `[B, 3, H, W]`
            or `[B, 1, H, W]`; or PIL images of one size.
        trace: what the model did with them.
        titles: a name for each image.
        captions: more text for each image, such as its prediction.

    Returns:
        A matplotlib figure that belongs to no window.

    Raises:
        DataError: the images cannot be drawn or do not fit the trace.
        OptionError: titles or captions do not fit the images, or the trace has no reduction.
        MissingExtraError: matplotlib is not installed.
    """
    pixels = _pixels(images)
    _check(pixels, trace, titles, captions)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise MissingExtraError("matplotlib", "viz", "Drawing a picture") from error

    count, _, high, wide = pixels.shape
    shown = spread(len(trace.points), MAX_POINTS)
    points = [trace.points[i] for i in shown]
    headings, legend = _headings(trace, shown), _legend(trace, points)
    columns = ("original", "crucial tokens", "merged regions")
    if not any(bool((point.size > 1).any()) for point in points):
        columns = ("original", "crucial tokens", "kept and dropped")
    figure = Figure(dpi=160, facecolor="white")
    pen = _Pen(figure, FigureCanvasAgg(figure).get_renderer(), _FONT[len(points) - 1])

    # Lengths are inches from the top left corner. Panels have the images' shape and about one
    # area; where they are narrow, they stand in cells wide enough for the headings.
    ratio = wide / high
    panel_w = _PANEL[len(points) - 1] * min(ratio**0.5, 1.2, 1.5 * ratio)
    panel_h = panel_w / ratio
    cell = max(panel_w, *(pen.width(name) + _GAP for name in columns))
    cell = max(cell, *((pen.width(text, bold=True) - _GAP) / 2 for text in headings))
    labels = [
        [(line, True) for line in pen.wrap(title, 1.6, bold=True)]
        + [(line, False) for line in pen.wrap(caption, 1.6)]
        for title, caption in zip(titles or [""] * count, captions or [""] * count, strict=True)
    ]
    widths = [pen.width(text, bold=bold) + 0.12 for label in labels for text, bold in label]
    left = _MARGIN + max(widths, default=0.0)
    width = left + cell + len(points) * (_BETWEEN + 2 * cell + _GAP) + _MARGIN
    lines = pen.wrap(legend, width - 2 * _MARGIN)
    pitch = max(panel_h, max(map(len, labels)) * pen.line) + _GAP
    top = _MARGIN + 2 * pen.line + 0.05
    bottom = top + count * pitch
    pen.resize(width, bottom + (len(lines) + 0.2) * pen.line + _MARGIN)

    starts = [left + cell + _BETWEEN + i * (2 * cell + _GAP + _BETWEEN) for i in range(len(points))]
    under, over = top - 0.05, top - 0.05 - pen.line
    pen.write(left + cell / 2, under, columns[0], color=_SOFT)
    if len(points) < len(trace.points):
        note = f"{len(points)} of {len(trace.points)} steps"
        pen.write(left + cell / 2, over, note, color=_SOFT)
    for start, heading in zip(starts, headings, strict=True):
        pen.write(start + cell + _GAP / 2, over, heading, weight="bold")
        pen.write(start + cell / 2, under, columns[1], color=_SOFT)
        pen.write(start + cell * 1.5 + _GAP, under, columns[2], color=_SOFT)
    for i, text in enumerate(lines):
        pen.write(_MARGIN, bottom + (i + 1.2) * pen.line, text, ha="left")

    offset = (cell - panel_w) / 2
    for row, label in enumerate(labels):
        y = top + row * pitch + (pitch - _GAP - panel_h) / 2
        first = y + panel_h / 2 + (0.8 - len(label) / 2) * pen.line
        for i, (text, bold) in enumerate(label):
            weight = "bold" if bold else "normal"
            pen.write(left - 0.12, first + i * pen.line, text, ha="right", weight=weight)
        _panel(pen.axes(left + offset, y, panel_w, panel_h), pixels[row], trace.grid)
        for start, point in zip(starts, points, strict=True):
            source, anchor = point.source[row].cpu(), point.anchor[row].cpu()
            kept = crucial_only(pixels[row], anchor[point.size[row].cpu() > 0], trace.grid)
            _panel(pen.axes(start + offset, y, panel_w, panel_h), kept, trace.grid)
            axes = pen.axes(start + offset + cell + _GAP, y, panel_w, panel_h)
            _regions(axes, pixels[row], source, anchor, trace.grid)
    return figure


@torch.no_grad()
def explain(loaded: LoadedModel, images: Tensor, recipe: Recipe, titles: Sequence[str]) -> Figure:
    """Reduce a model, run it on images and draw what happened, with both models' answers.

    Args:
        loaded: A model; it is left as it was. Where it classifies, its answers are written down.
        images: `[B, C, H, W]`, transformed for the model.
        recipe: How to reduce it.
        titles: What to write above the answers, one an image.
    """
    model = loaded.model
    with applied(model, recipe):
        traced = trace(model, images)
        with disabled(model):
            dense = model(images)
    pairs = zip(answer(dense), answer(traced.output), strict=True)

    def words(logits: Tensor) -> str:
        if len(logits) == 1:
            return f"{float(logits):.4g}"
        probability, index = logits.float().softmax(0).max(0)
        return f"{loaded.label(int(index))} {float(probability):.0%}"

    captions = None
    if family.spec_of(model).classes:
        captions = [f"dense: {words(before)}\nreduced: {words(after)}" for before, after in pairs]
    return draw(loaded.pixels(images), traced, titles=titles, captions=captions)


class _Pen:
    """Measures and places text and axes in inches from the top left corner."""

    def __init__(self, figure: Figure, renderer: Any, font: float) -> None:
        self.figure, self.font, self.line = figure, font, font * 1.35 / 72
        self._measure = renderer.get_text_width_height_descent

    def width(self, text: str, *, bold: bool = False) -> float:
        from matplotlib.font_manager import FontProperties

        font = FontProperties(size=self.font, weight="bold" if bold else "normal")
        return float(self._measure(text, font, False)[0] / self.figure.dpi)

    def wrap(self, text: str, width: float, *, bold: bool = False) -> list[str]:
        lines: list[str] = []
        for paragraph in text.splitlines():
            lines.append("")
            for word in paragraph.split():
                longer = f"{lines[-1]} {word}".strip()
                if lines[-1] and self.width(longer, bold=bold) > width:
                    lines.append(word)
                else:
                    lines[-1] = longer
        return lines

    def resize(self, width: float, height: float) -> None:
        self.size = width, height
        self.figure.set_size_inches(width, height)

    def write(self, x: float, y: float, text: str, **style: Any) -> None:
        style = {"color": _INK, "ha": "center", "va": "baseline", "size": self.font, **style}
        x, y = x / self.size[0], 1 - y / self.size[1]
        self.figure.text(x, y, text, parse_math=False, **style)  # names may hold dollar signs

    def axes(self, x: float, y: float, width: float, height: float) -> Any:
        full_w, full_h = self.size
        box = (x / full_w, 1 - (y + height) / full_h, width / full_w, height / full_h)
        axes = self.figure.add_axes(box)
        axes.set_axis_off()
        return axes


def _panel(axes: Any, image: Tensor, grid: tuple[int, int]) -> None:
    """Show `[3, H, W]`, measured in patches, so that lines can be drawn on patch edges."""
    rows, columns = grid
    small = image.shape[1] < 128  # blocks stay blocks; photographs are resampled smoothly
    axes.imshow(
        image.permute(1, 2, 0).cpu().numpy(),
        extent=(0, columns, rows, 0),
        aspect="auto",
        interpolation="nearest" if small else "antialiased",
    )


def _regions(
    axes: Any, image: Tensor, source: Tensor, anchor: Tensor, grid: tuple[int, int]
) -> None:
    from matplotlib.collections import LineCollection

    rows, columns = grid
    _panel(axes, region_colours(image, source, grid).permute(2, 0, 1).nan_to_num(0.96), grid)
    right, below = region_borders(source, grid)
    edges = [((c + 1, r), (c + 1, r + 1)) for r, c in right.nonzero().tolist()]
    edges += [((c, r + 1), (c + 1, r + 1)) for r, c in below.nonzero().tolist()]
    strokes = []
    for patch in (source < 0).nonzero().flatten().tolist():
        r, c = divmod(patch, columns)
        strokes += [
            ((c, r + 0.5), (c + 0.5, r)),
            ((c, r + 1), (c + 1, r)),
            ((c + 0.5, r + 1), (c + 1, r + 0.5)),
        ]
    links = [
        tuple((patch % columns + 0.5, patch // columns + 0.5) for patch in pair)
        for pair in stray_links(source, anchor, grid)
    ]
    axes.add_collection(LineCollection(strokes, colors="#888888", linewidths=0.5))
    # White on a faint dark casing shows on light and on dark regions alike.
    axes.add_collection(LineCollection(edges, colors="black", linewidths=1.3, alpha=0.35))
    axes.add_collection(LineCollection(edges, colors="white", linewidths=0.7))
    if len(links) <= _MAX_LINKS:
        axes.add_collection(LineCollection(links, colors=_LINK, linewidths=0.6, alpha=0.9))
    dots = anchor[torch.bincount(source[source >= 0], minlength=len(anchor)) > 1]
    x, y = dots % columns + 0.5, dots // columns + 0.5
    axes.scatter(x, y, s=5, c=_LINK, edgecolors="black", linewidths=0.3)
    axes.set(xlim=(0, columns), ylim=(rows, 0))


def _headings(trace: Trace, shown: Sequence[int]) -> list[str]:
    texts, before, first = [], trace.grid[0] * trace.grid[1], 0
    for last in shown:
        begin, end = trace.points[first].block, trace.points[last].block
        after = trace.points[last].size.shape[1]
        blocks = f"block {end}" if first == last else f"blocks {begin}–{end}"
        if begin == 0:  # coarse patches
            blocks = f"up to block {end}" if end else "before block 1"
        texts.append(f"{blocks}: {before} → {after} tokens")
        before, first = after, last + 1
    return texts


def _legend(trace: Trace, points: Sequence[ReductionPoint]) -> str:
    text = "The model sees an image as patches, one token each; in the blocks named above, "
    if not any(bool((point.size > 1).any()) for point in points):
        return text + (
            f"{trace.method} drops the tokens that it can spare (pale, hatched) and keeps the "
            "crucial ones (full colour)."
        )
    text += (
        f"{trace.method} merges the tokens that it can spare (pale) into crucial tokens that stand "
        "for them (full colour). In the merged regions, each outlined area is one token in its "
        "mean colour; a dot marks its crucial patch, and lines, where they are few, join parts "
        "that lie apart."
    )
    dropped = any(bool((point.source < 0).any()) for point in points)
    return text + (" Hatched patches were dropped." if dropped else "")


def _pixels(images: Tensor | Sequence[Image]) -> Tensor:
    """Bring any accepted input to float `[B, 3, H, W]` in [0, 1] on the CPU."""
    if not isinstance(images, Tensor):
        images = _from_pil(images)
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise DataError(
            f"Images must be [B, 3, H, W] or [B, 1, H, W], not {list(images.shape)}. "
            "A single image needs a leading dimension: image[None]."
        )
    pixels = images.detach().cpu()
    if pixels.dtype == torch.uint8:
        pixels = pixels.float() / 255
    elif not pixels.is_floating_point():
        raise DataError(f"Images must be uint8 or float in [0, 1], not {pixels.dtype}.")
    pixels = pixels.float()
    low, high = float(pixels.min()), float(pixels.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # rounding is forgiven; nan is not
        raise DataError(
            f"Float images must lie in [0, 1]; these span [{low:.3g}, {high:.3g}]. "
            "Undo the model's normalisation (x * std + mean) first."
        )
    return pixels.clamp(0, 1).expand(-1, 3, -1, -1)


def _from_pil(images: Sequence[Image]) -> Tensor:
    for image in images:
        if not hasattr(image, "convert"):
            raise DataError(f"Images must be a tensor or PIL images, not {type(image).__name__}.")
    sizes = sorted({image.size for image in images})
    if len(sizes) != 1:
        found = f"sizes {sizes}" if sizes else "none"
        raise DataError(f"Give at least one image, all of one size; found {found}.")
    width, height = sizes[0]
    data = [
        torch.frombuffer(bytearray(image.convert("RGB").tobytes()), dtype=torch.uint8)
        for image in images
    ]
    return torch.stack(data).reshape(-1, height, width, 3).permute(0, 3, 1, 2)


def _check(
    pixels: Tensor, trace: Trace, titles: Sequence[str] | None, captions: Sequence[str] | None
) -> None:
    count, patches = len(pixels), trace.grid[0] * trace.grid[1]
    if not trace.points:
        raise OptionError("The trace holds no reduction, so there is nothing to draw.")
    for name, texts in (("titles", titles), ("captions", captions)):
        if texts is not None and len(texts) != count:
            raise OptionError(f"{len(texts)} {name} were given for {count} images. Give one each.")
    for point in trace.points:
        if tuple(point.source.shape) != (count, patches):
            raise DataError(
                f"The trace's source map at block {point.block} is {list(point.source.shape)}; "
                f"{count} images with a grid of {trace.grid[0]} x {trace.grid[1]} patches need "
                f"{[count, patches]}. Draw the images that were traced, all and in order."
            )
