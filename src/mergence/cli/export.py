"""mergence export."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mergence.cli import options as o
from mergence.cli.output import check_json, console, errors, skipped, table_of, timed, write_json
from mergence.errors import DataError

if TYPE_CHECKING:
    from mergence.benchmark import Row
    from mergence.exporting import Export


def export(
    model: o.Model,
    out: Annotated[Path, typer.Option(help="The file to write: .onnx or .pt2.")],
    to: Annotated[
        str | None,
        typer.Option(
            help="onnx, pt2 (torch.export) or aoti (AOTInductor). By the suffix if unset."
        ),
    ] = None,
    method: o.OneMethod = None,
    recipe: o.OneRecipe = None,
    macs: o.Macs = None,
    keep_rate: o.KeepRate = None,
    set_: o.Set = None,
    checkpoint: o.Checkpoint = None,
    data: Annotated[
        str, typer.Option(metavar="DIR", help="Images to check with: a folder, a .zip, or demo.")
    ] = "demo",
    images: Annotated[int, typer.Option(min=2, help="Check with so many images.")] = 32,
    opset: Annotated[int, typer.Option(help="ONNX opset, 18 or later.")] = 18,
    speed: Annotated[
        bool, typer.Option(help="Time an ONNX graph against the dense one in onnxruntime.")
    ] = True,
    batch_size: Annotated[int, typer.Option(min=1, help="Images in a batch, for the speed.")] = 8,
    seconds: Annotated[float, typer.Option(min=0, help="Seconds to time for.")] = 5.0,
    seed: o.Seed = 0,
    json: o.Json = None,
) -> None:
    """Write a reduced model as ONNX, torch.export or AOTInductor, checked before it is kept."""
    check_json(json, out, *recipe or ())
    chosen = o.recipe_of(method, recipe, macs, keep_rate, set_, o.saved_in(model, checkpoint))
    from mergence.api import apply
    from mergence.data import loader, open_images
    from mergence.exporting import checked
    from mergence.exporting import speed as timing

    kind, _ = checked.format_of(out, to)
    loaded = o.load(model, checkpoint)
    apply(loaded.model, chosen)
    source = open_images(
        data, transform=loaded.transform, mode=loaded.mode, limit=images, seed=seed
    )
    (batch,) = loader(source, batch_size=images)
    if len(batch) < 2:
        skipped(batch.skipped)
        raise DataError(f"'{data}' has {len(batch)} readable images; the check needs at least 2.")
    with errors.status("exporting and checking"):
        done = checked.export(loaded.model, out, batch.images, to=kind, opset=opset)
    rows: tuple[Row, ...] = ()
    if kind == "onnx" and speed:
        copies = -(-batch_size // len(batch))
        with errors.status("timing"):
            timed = batch.images.repeat(copies, 1, 1, 1)[:batch_size]
            rows = timing.compare(loaded.model, out, timed, opset=opset, seconds=seconds)
    try:  # first, because printing may fail as well
        write_json(
            json,
            {
                "model": model,
                "data": data,
                "recipe": chosen.to_dict(),
                "export": done.to_dict(),
                "speed": [vars(row) for row in rows],
            },
        )
    finally:
        _report(done, data)
        if rows:
            _table(rows)
        skipped(batch.skipped)


def _report(done: Export, data: str) -> None:
    found = done.agreement
    kind = f"ONNX, opset {done.opset}" if done.opset else done.to
    size = "x".join(map(str, done.image))
    console.print(f"Wrote {done.path} ({kind}; images of {size}, any batch)", highlight=False)
    console.print(
        f"{found.images} images of {data} through it and through the model: largest difference "
        f"{found.worst:.1e} of the largest value (tolerance {found.tolerance:g}, beyond it "
        f"{found.off}), same answer on {found.same_answer}.",
        highlight=False,
    )


def _table(rows: tuple[Row, ...]) -> None:
    title = f"onnxruntime on the CPU, batch {rows[0].batch}"
    table = table_of(title)
    table.add_column("graph")
    for heading in ("ms", "speed-up", "MACs", "of ideal"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for row in rows:
        table.add_row(row.name, *timed(row), row.verdict)
    console.print(table)
