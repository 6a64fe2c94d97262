"""Turn the results of run.py into docs/accuracy.md and its plot.

python benchmarks/accuracy/render.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from mergence.frontier import draw_frontier
from mergence.visualize import save

HERE = Path(__file__).parent
INTRO = """# Accuracy

Made by `python benchmarks/accuracy/render.py` from the files in `benchmarks/accuracy/results`; each
of those was made by one command:

```sh
python benchmarks/accuracy/run.py MODEL --data VAL --calibrate-on TRAIN --out NAME.json
```

Nothing was trained. Images to calibrate on come from the training archive, without labels; MACs
include everything. Two comparisons: every method with the schedule of its own paper, which shows
what the method gives, and every method with the schedule calibrated for `mergence`, which shows
what the calibration gives. The calibrated counts leave one token after the last block, which loses
nothing for a model that reads its class token; methods that can remove only half of the tokens in
one step keep more there.
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
    arguments = parser.parse_args()
    parts = [INTRO]
    for file in sorted(arguments.results.glob("*.json")):
        parts.append(_section(file.stem, json.loads(file.read_text()), arguments.docs))
    (arguments.docs / "accuracy.md").write_text("\n".join(parts))


def _section(name: str, result: dict[str, Any], docs: Path) -> str:
    dense, *rows = result["results"]
    measured = (
        f"{result['model']} on {result['images']} images of {result['data']}, fp32, no training. "
        f"Dense: top-1 {dense['top1']:.2f}. {result['cpu']} CPU, {result['threads']} threads, "
        f"torch {result['torch']}, timm {result['timm']}; calibrated on {result['calibrated_on']}."
    )
    lines = [f"## {name.replace('-', ' ')}", "", measured, ""]
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
            f"**{title[0].upper()}{title[1:]}.** Each cell: change of top-1 in points, KL in nats; "
            "the MACs in brackets where they are not the column's."
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
    return f"{change:+.2f}, {row['kl']:.4f}{macs}".replace("-", "−")


if __name__ == "__main__":
    main()
