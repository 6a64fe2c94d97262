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

`python benchmarks/speed/render.py` makes this page from the files in `benchmarks/speed/results`.
Unless something else is said, one command on one device made each of those:

```sh
python benchmarks/speed/run.py --out benchmarks/speed/results/NAME.json
```

Each cell says how many times faster a model is than the dense model in the same setting. In
brackets is that number times the share of the MACs: 1 where the time fell as much as the MACs.

- Dense and reduced models take turns; times are medians. Compare the cells of one row, not the
  times of two runs.
- The dense model runs torch's fused attention. Reduced models run what is fastest with sizes
  ([which](benchmarking.md#what-a-device-allows)).
- Each method has the schedule that it has without calibration.
- Bold: `mergence` is the fastest of the row at that budget.

Below the speeds is what reducing costs: scoring, planning and merging together, in per cent of the
dense forward, in eager mode ([what they are](benchmarking.md#where-the-time-goes)).
"""
LEAD = (
    "Each cell says how many times faster `mergence` is than the dense model, at 0.67 and at 0.5 "
    "of the MACs, not calibrated; 1.49 and 2.00 is what the MACs promise. Of the types and modes "
    "that were timed on a machine (eager, compiled, CUDA graphs), it is the one in which the dense "
    "model is fastest. Every setting, other methods, and where the time goes: "
    "[docs/speed.md](docs/speed.md)."
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
    headline = _headline(list(results.values()))
    arguments.readme.write_text(f"{before}{START}\n{LEAD}\n\n{headline}\n{END}{after}")


def _where(result: dict[str, Any]) -> str:
    return f"{result['tables'][0]['device']}, {result['capability']}, {result['threads']} threads"


def _headline(results: list[dict[str, Any]]) -> str:
    """Speed-ups of `mergence` in one table: a column for each machine."""
    # Model and batch, then machine, then budget: the time of the dense model, and the speed-up.
    best: dict[tuple[str, int], dict[str, dict[str, tuple[float, float]]]] = {}
    for result in results:
        for table in result["tables"]:
            dense = {_setting(row): row["ms"] for row in table["rows"] if row["name"] == "dense"}
            for row in table["rows"]:
                method, _, budget = row["name"].partition("@")
                if method == "mergence":
                    cell = best.setdefault((table["model"], row["batch"]), {})
                    timed = (dense[_setting(row)], row["speedup"])
                    at = cell.setdefault(_where(result), {})
                    at[budget] = min(timed, at.get(budget, timed))
    machines = list(dict.fromkeys(_where(result) for result in results))
    lines = [f"| | {' | '.join(machines)} |", "|---" * (len(machines) + 1) + "|"]
    for (model, batch), cell in sorted(best.items()):
        texts = [" / ".join(f"{s:.2f}" for _, s in cell.get(at, {}).values()) for at in machines]
        lines.append(f"| `{model}`, batch {batch} | {' | '.join(text or '–' for text in texts)} |")
    return "\n".join(lines)


def _setting(row: dict[str, Any]) -> tuple[str, str, int]:
    return row["dtype"], row["mode"], row["batch"]


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
        settings.setdefault(_setting(row), {})[row["name"]] = row
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
