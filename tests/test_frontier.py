"""The plot of a trade."""

from __future__ import annotations

from mergence.frontier import draw_frontier


def test_each_line_is_drawn_in_the_order_of_its_macs() -> None:
    lines = {"ours": [(0.5, 0.03), (0.8, 0.001), (0.67, 0.01)], "theirs": [(0.67, 0.04)]}
    figure = draw_frontier(lines, ylabel="KL", title="model", log=True, bold="ours")
    (axes,) = figure.axes
    drawn = {line.get_label(): line for line in axes.lines}
    assert list(drawn["ours"].get_xdata()) == [0.5, 0.67, 0.8]
    assert list(drawn["ours"].get_ydata()) == [0.03, 0.01, 0.001]
    assert drawn["ours"].get_linewidth() > drawn["theirs"].get_linewidth()
    assert (axes.get_ylabel(), axes.get_yscale()) == ("KL", "log")
