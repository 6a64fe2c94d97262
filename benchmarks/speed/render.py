"""Turn the results of run.py into docs/speed.md and the table of the README.

python benchmarks/speed/render.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
START, END = "<!-- speed: made by benchmarks/speed/render.py -->", "<!-- /speed -->"
INTRO = """# Speed

Made by `python benchmarks/speed/render.py` from the files in `benchmarks/speed/results`; each of
those was made by one command on one device, where nothing else is said:

```sh
python benchmarks/speed/run.py --out benchmarks/speed/results/NAME.json
```

Each cell: how many times faster than the dense model in the same setting, and in brackets that
times the share of the MACs: 1 where the time fell as much as the MACs. Dense and reduced models
take turns, medians; compare cells of one row, not times of two runs. The dense model runs torch's
fused attention, and reduced models what is fastest with sizes
([which](benchmarking.md#what-a-device-allows)). Schedules are those that each method has without
calibration. Bold where `mergence` is the fastest of the row at that budget.

Below the speeds is what reducing costs: scoring + planning + merging in per cent of the dense
forward, in eager mode ([what they are](benchmarking.md#where-the-time-goes)).
"""
LEAD = (
    "How many times faster than the dense model `mergence` is in the same setting, not calibrated, "
    "and in brackets that times the share of the MACs: 1 where the time fell as much as the MACs. "
    "Other methods, and where the time goes: [docs/speed.md](docs/speed.md)."
)
REDUCING = ("scoring", "planning", "merging")


def main() -> None:
    """Write the page and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--docs", type=Path, default=HERE.parents[1] / "docs")
    parser.add_argument("--readme", type=Path, default=HERE.parents[1] / "README.md")
    arguments = parser.parse_args()
    files = sorted(arguments.results.glob("*.json"))
    if not files:
        parser.error(f"there is no result in {arguments.results}; make one with run.py")
    results = {file.stem: json.loads(file.read_text()) for file in files}
    readme = arguments.readme.read_text()
    if START not in readme or END not in readme:
        parser.error(f"{arguments.readme} has no place for the table: '{START}' to '{END}'")
    before, _, rest = readme.partition(START)
    _, _, after = rest.partition(END)
    sections = [_machine(name, result) for name, result in results.items()]
    (arguments.docs / "speed.md").write_text("\n".join([INTRO, *sections]))
    machines: dict[str, list[dict[str, Any]]] = {}
    for result in results.values():
        machines.setdefault(_where(result), []).extend(result["tables"])
    tables = "\n\n".join(_headline(where, timed) for where, timed in machines.items())
    arguments.readme.write_text(f"{before}{START}\n{LEAD}\n\n{tables}\n{END}{after}")


def _where(result: dict[str, Any]) -> str:
    return f"{result['tables'][0]['device']}, {result['capability']}, {result['threads']} threads"


def _headline(where: str, timed: list[dict[str, Any]]) -> str:
    """Speed-ups of `mergence` on one machine, in one table."""
    cells: dict[tuple[str, str, int], dict[tuple[str, str], str]] = {}
    for table in timed:
        for row in table["rows"]:
            if row["name"].startswith("mergence@"):
                setting = (table["model"], row["dtype"], row["batch"])
                column = (row["mode"], row["name"].split("@")[1])
                cells.setdefault(setting, {})[column] = _plain(row)
    columns = list(dict.fromkeys(column for row in cells.values() for column in row))
    heads = " | ".join(f"{mode}, {budget}" for mode, budget in columns)
    lines = [f"| {where} | {heads} |", "|---" * (len(columns) + 1) + "|"]
    for (model, dtype, batch), row in cells.items():
        texts = " | ".join(row.get(column, "–") for column in columns)
        lines.append(f"| `{model}`, {dtype}, batch {batch} | {texts} |")
    return "\n".join(lines)


def _machine(name: str, result: dict[str, Any]) -> str:
    usual = result["align"]
    others = {
        f" ({table['align']} in {table['rows'][0]['dtype']})"
        for table in result["tables"]
        if table.get("align", usual) != usual
    }
    machine = (
        f"{_where(result)}, torch {result['torch']}, timm {result['timm']}, token counts in "
        f"multiples of {usual}{''.join(sorted(others))}."
    )
    lines = [f"## {name.replace('-', ' ')}", "", machine, ""]
    if "note" in result:
        lines += [result["note"], ""]
    if result["left_out"]:
        lines += [f"Left out: {'; '.join(result['left_out'])}.", ""]
    for table in result["tables"]:
        lines += _table(table)
    return "\n".join(lines)


def _table(table: dict[str, Any]) -> list[str]:
    names = list(dict.fromkeys(row["name"] for row in table["rows"] if row["name"] != "dense"))
    settings: dict[tuple[str, str, int], dict[str, Any]] = {}
    for row in table["rows"]:
        settings.setdefault((row["dtype"], row["mode"], row["batch"]), {})[row["name"]] = row
    profiles: dict[tuple[str, int], dict[str, Any]] = {}
    for one in table["profiles"]:
        profiles.setdefault((one["dtype"], one["batch"]), {})[one["name"]] = one
    lines = [f"### {table['model']}", ""]
    for budget in dict.fromkeys(name.split("@")[1] for name in names):
        at = [name for name in names if name.endswith(f"@{budget}")]
        heads = " | ".join(f"`{name.split('@')[0]}`" for name in at)
        lines += [f"| {budget} of the MACs | dense ms | {heads} |", "|---" * (len(at) + 2) + "|"]
        for (dtype, mode, batch), rows in settings.items():
            timed = [rows[name] for name in at if name in rows]
            cells = [_cell(rows[name], timed) if name in rows else "–" for name in at]
            what = f"{dtype}, {mode}, batch {batch}"
            lines.append(f"| {what} | {rows['dense']['ms']:.1f} | {' | '.join(cells)} |")
        for (dtype, batch), rows in profiles.items():
            costs = " | ".join(_costs(rows[name]) for name in at)
            lines.append(f"| reducing, {dtype}, batch {batch} | | {costs} |")
        lines.append("")
    return lines


def _costs(profile: dict[str, Any]) -> str:
    return " + ".join(f"{100 * profile['share'][part]:.1f}" for part in REDUCING) + " %"


def _plain(row: dict[str, Any]) -> str:
    return f"{row['speedup']:.2f} ({row['of_ideal']:.2f})"


def _cell(row: dict[str, Any], rivals: list[dict[str, Any]]) -> str:
    text = _plain(row)
    fastest = row["speedup"] >= max(rival["speedup"] for rival in rivals)
    return f"**{text}**" if fastest and row["name"].startswith("mergence") else text


if __name__ == "__main__":
    main()
