"""Turn the results of run.py into docs/speed.md.

python benchmarks/speed/render.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
INTRO = """# Speed

Made by `python benchmarks/speed/render.py` from the files in `benchmarks/speed/results`; each of
those was made by one command on one device:

```sh
python benchmarks/speed/run.py --out benchmarks/speed/results/NAME.json
```

Each cell: how many times faster than the dense model in the same setting, and in brackets that
times the share of the MACs: 1 where the time fell as much as the MACs. Dense and reduced models
take turns, medians; compare cells of one row, not times of two runs. The dense model runs torch's
fused attention like everything else. Schedules are those that each method has without calibration.
Bold where `mergence` is the fastest of the row at that budget.
"""


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--docs", type=Path, default=HERE.parents[1] / "docs")
    arguments = parser.parse_args()
    files = sorted(arguments.results.glob("*.json"))
    sections = [_machine(file.stem, json.loads(file.read_text())) for file in files]
    (arguments.docs / "speed.md").write_text("\n".join([INTRO, *sections]))


def _machine(name: str, result: dict[str, Any]) -> str:
    machine = (
        f"{result['tables'][0]['device']}, {result['capability']}, {result['threads']} threads, "
        f"torch {result['torch']}, timm {result['timm']}, token counts in multiples of "
        f"{result['align']}."
    )
    lines = [f"## {name.replace('-', ' ')}", "", machine, ""]
    if result["left_out"]:
        lines += [f"Left out: {'; '.join(result['left_out'])}.", ""]
    for table in result["tables"]:
        lines += _table(table)
    return "\n".join(lines)


def _table(table: dict[str, Any]) -> list[str]:
    names = list(dict.fromkeys(row["name"] for row in table["rows"] if row["name"] != "dense"))
    lines = [f"### {table['model']}", ""]
    for budget in dict.fromkeys(name.split("@")[1] for name in names):
        at = [name for name in names if name.endswith(f"@{budget}")]
        heads = " | ".join(f"`{name.split('@')[0]}`" for name in at)
        lines += [f"| {budget} of the MACs | dense ms | {heads} |", "|---" * (len(at) + 2) + "|"]
        settings: dict[tuple[str, str, int], dict[str, Any]] = {}
        for row in table["rows"]:
            settings.setdefault((row["dtype"], row["mode"], row["batch"]), {})[row["name"]] = row
        for (dtype, mode, batch), rows in settings.items():
            cells = [_cell(rows[name], [rows[other] for other in at]) for name in at]
            what = f"{dtype}, {mode}, batch {batch}"
            lines.append(f"| {what} | {rows['dense']['ms']:.1f} | {' | '.join(cells)} |")
        lines.append("")
    return lines


def _cell(row: dict[str, Any], rivals: list[dict[str, Any]]) -> str:
    text = f"{row['speedup']:.2f} ({row['of_ideal']:.2f})"
    fastest = row["speedup"] >= max(rival["speedup"] for rival in rivals)
    return f"**{text}**" if fastest and row["name"].startswith("mergence") else text


if __name__ == "__main__":
    main()
