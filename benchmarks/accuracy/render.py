"""Turn the results of run.py into docs/accuracy.md and its plot.

python benchmarks/accuracy/render.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mergence.coarse import tokens_left
from mergence.frontier import draw_frontier
from mergence.visualize import save

HERE = Path(__file__).parent
START, END = "<!-- accuracy: made by benchmarks/accuracy/render.py -->", "<!-- /accuracy -->"
INTRO = """# Accuracy

How much of a model's accuracy each method keeps at a given share of the MACs. Nothing was \
trained, and the MACs include everything.

There are two comparisons:

- Every method with the schedule of its own paper shows what the method gives.
- Every method with the schedule calibrated for `mergence` shows what the calibration gives.

Images to calibrate on come from the training archive, without labels. With every method, DeiT-S \
does not compute the [last MLP](macs.md#the-last-mlp) of its patch tokens, which leaves room to \
keep more of them elsewhere.

This page is made by `python benchmarks/accuracy/render.py` from the files in \
`benchmarks/accuracy/results`. Each of those files was made by one command:

```sh
python benchmarks/accuracy/run.py MODEL --data VAL --calibrate-on TRAIN --out NAME.json
```
"""
KINDS = {
    "own": "each method with its own published schedule",
    "calibrated": "all methods with the schedule calibrated for `mergence`",
}


def main() -> None:
    """Write the page and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--docs", type=Path, default=HERE.parents[1] / "docs")
    parser.add_argument("--readme", type=Path, default=HERE.parents[1] / "README.md")
    arguments = parser.parse_args()
    files = sorted(arguments.results.glob("*.json"))
    results = {file.stem: json.loads(file.read_text()) for file in files}
    sections = [_section(name, result, arguments.docs) for name, result in results.items()]
    (arguments.docs / "accuracy.md").write_text("\n".join([INTRO, *sections]))
    readme = arguments.readme.read_text()
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    largest = max(results.values(), key=lambda result: result["images"])
    arguments.readme.write_text(f"{before}{START}\n{_headline(largest)}\n{END}{after}")


def _headline(result: dict[str, Any]) -> str:
    """The calibrated recipes of `mergence`, in one table."""
    dense, *rows = result["results"]
    lines = ["| MACs | top-1 | change | same answer | KL | coarse | reductions |"]
    lines += ["|---" * 7 + "|", f"| 100 % | {dense['top1']:.2f} | | | | | |"]
    for row in rows:
        if row["name"].startswith("mergence") and row["name"].endswith("calibrated"):
            schedule = row["recipe"]["schedule"]
            share = row["recipe"]["method"].get("coarse") or 0.0
            points = len(set(schedule["after"]) - {tokens_left(share, schedule["of"])})
            lines.append(
                f"| {row['macs_ratio']:.0%} | {row['top1']:.2f} | "
                f"{_signed(row['top1'] - dense['top1'])} | {row['agreement']:.1f} % | "
                f"{row['kl']:.4f} | {share:.0%} | {points} |"
            )
    return "\n".join([*lines, "", f"{result['model']}, {result['images']:,} validation images."])


def _threads(result: dict[str, Any]) -> str:
    return f"{result['threads']} thread{'s' * (result['threads'] > 1)}"


def _section(name: str, result: dict[str, Any], docs: Path) -> str:
    dense, *rows = result["results"]
    measured = (
        f"{result['model']} on {result['images']} images of {result['data']}, "
        f"{result.get('dtype', 'float32')}, no training. "
        f"Dense: top-1 {dense['top1']:.2f}. {result['cpu']} CPU, {_threads(result)}, "
        f"torch {result['torch']}, timm {result['timm']}; calibrated on {result['calibrated_on']}."
    )
    lines = [f"## {name.replace('-', ' ')}", "", measured, ""]
    if "note" in result:
        lines += [result["note"], ""]
    for kind, title in KINDS.items():
        chosen = {
            (row["name"].split("@")[0], row["name"].split("@")[1].split()[0]): row
            for row in rows
            if row["name"].endswith(kind)
        }
        if not chosen:
            continue
        budgets = sorted({budget for _, budget in chosen}, key=float, reverse=True)
        methods = sorted(
            {method for method, _ in chosen},
            key=lambda m: min(row["kl"] for (n, _), row in chosen.items() if n == m),
        )
        caption = (
            f"**{title[0].upper()}{title[1:]}.** Each cell has the change of top-1 in points and "
            "the KL divergence in nats; the MACs follow in brackets where they are not those of "
            "the column."
        )
        lines += [caption, ""]
        lines += ["| method | " + " | ".join(budgets) + " |", "|---" * (len(budgets) + 1) + "|"]
        for method in methods:
            cells = [_cell(chosen.get((method, b)), dense, float(b)) for b in budgets]
            lines.append(f"| `{method}` | " + " | ".join(cells) + " |")
        lines.append("")
        if len(budgets) > 1:
            picture = f"accuracy-{name}-{kind}.png"
            figure = draw_frontier(
                {
                    m: [(r["macs_ratio"], r["kl"]) for (n, _), r in chosen.items() if n == m]
                    for m in methods
                },
                ylabel="KL to the dense model, nats",
                title=f"{result['images']} images: {title.replace('`', '')}",
                log=True,
                bold="mergence",
            )
            save(figure, docs / picture)
            lines += [f"![KL against MACs, {title}]({picture})", ""]
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None, dense: dict[str, Any], budget: float) -> str:
    if row is None:
        return "–"
    change = row["top1"] - dense["top1"]
    macs = "" if abs(row["macs_ratio"] - budget) < 0.01 else f" ({row['macs_ratio']:.2f})"
    return f"{_signed(change)}, {row['kl']:.4f}{macs}"


def _signed(points: float) -> str:
    return f"{points:+.2f}".replace("-", "−")


if __name__ == "__main__":
    main()
