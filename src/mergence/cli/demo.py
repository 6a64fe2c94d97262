"""mergence demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergence.cli import options as o
from mergence.cli.output import check_json, console, evaluation_table, progress, write_json


def demo(
    out: Annotated[Path, typer.Option(help="Where to write the picture.")] = Path("demo.png"),
    limit: o.Limit = 500,
    seed: o.Seed = 0,
    json: o.Json = None,
) -> None:
    """Compare methods on the embedded model and images, and draw what merging does."""
    check_json(json, out)
    from mergence import demo, visualize

    visualize.check_path(out)
    loaded = demo.load()
    data = demo.images(loaded, limit, seed)
    with progress("comparing", len(data)) as advance:
        result = demo.compare(loaded, data, advance)
    visualize.save(demo.picture(loaded, data), out)
    write_json(json, result.to_dict())
    evaluation_table(result)
    console.print(
        f"Wrote {out}: what the default method keeps and merges at half of the MACs.\n"
        "Next: mergence eval MODEL --data DIR --macs 0.67, or in Python "
        "mergence.apply(model, macs=0.67).",
        highlight=False,
    )
