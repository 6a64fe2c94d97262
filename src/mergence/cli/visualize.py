"""mergence visualize."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mergence.cli import options as o
from mergence.cli.output import check_json, console, skipped, write_json
from mergence.errors import DataError, OptionError


def visualize(
    model: o.Model,
    image: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
    out: Annotated[Path, typer.Option(help="The picture to write: .png, .pdf or .svg.")],
    method: o.OneMethod = None,
    recipe: o.OneRecipe = None,
    macs: o.Macs = None,
    keep_rate: o.KeepRate = None,
    set_: o.Set = None,
    checkpoint: o.Checkpoint = None,
    json: o.Json = None,
) -> None:
    """Draw which tokens stay and what is merged into what, block by block."""
    check_json(json, out, *recipe or ())
    if out.resolve() in [path.resolve() for path in image]:
        raise OptionError(f"--out {out}: that is an image to draw. Name another file.")
    from mergence import visualize
    from mergence.data import image_files, loader

    visualize.check_path(out)
    plan = o.recipe_of(method, recipe, macs, keep_rate, set_, o.saved_in(model, checkpoint))
    loaded = o.load(model, checkpoint)
    files = image_files(image, transform=loaded.transform, mode=loaded.mode)
    (batch,) = loader(files, batch_size=len(files))
    if not batch:
        skipped(batch.skipped)
        raise DataError(f"None of the {len(image)} images could be read.")
    titles = [Path(name).name for name in batch.names]
    visualize.save(visualize.explain(loaded, batch.images, plan, titles), out)
    write_json(json, {"model": model, "images": batch.names, "recipe": plan.to_dict()})
    console.print(f"Wrote {out}", highlight=False)
    skipped(batch.skipped)
