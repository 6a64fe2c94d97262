"""The picture of a trade: how much work is left against how much of the answer is lost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from mergence.errors import MissingExtraError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Colours that also people with a colour vision deficiency tell apart (Okabe and Ito).
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7f7f7f")
_MARKS = "os^Dv<>P"


def draw_frontier(
    lines: Mapping[str, Sequence[tuple[float, float]]],
    *,
    ylabel: str,
    title: str = "",
    log: bool = False,
    bold: str | None = None,
) -> Figure:
    """Draw one line for each way of reducing.

    Args:
        lines: For each name, (share of the dense MACs, value) in any order.
        ylabel: What the value is.
        title: What was measured.
        log: Show the values on a logarithmic scale.
        bold: The name of the line that is drawn thicker.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise MissingExtraError("matplotlib", "viz", "Drawing a frontier")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MultipleLocator, PercentFormatter

    figure = Figure(figsize=(7.0, 4.3), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    for index, (name, points) in enumerate(lines.items()):
        x, y = zip(*sorted(points), strict=True)
        thick = name == bold
        axes.plot(
            x,
            y,
            label=name,
            color=_COLOURS[index % len(_COLOURS)],
            marker=_MARKS[index % len(_MARKS)],
            linestyle="-" if index < len(_COLOURS) else "--",
            linewidth=2.6 if thick else 1.3,
            markersize=6 if thick else 4.5,
            zorder=3 if thick else 2,
        )
    if log:
        axes.set_yscale("log")
    axes.xaxis.set_major_locator(MultipleLocator(0.05))
    axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.set_xlabel("MACs, share of the dense model")
    axes.set_ylabel(ylabel)
    axes.set_title(title, loc="left", fontsize=10)
    axes.grid(alpha=0.25, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right center", frameon=False, fontsize=8)  # never on a line
    return figure
