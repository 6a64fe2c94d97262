"""mergence eval."""

from __future__ import annotations

from typing import Annotated

import typer

from mergence.cli import options as o
from mergence.cli.output import check_json, evaluation_table, progress, write_json


def evaluate(
    model: o.Model,
    data: Annotated[
        str, typer.Option(metavar="DIR", help="An image folder, a .zip of one, or demo.")
    ],
    method: o.Methods = None,
    recipe: o.Recipes = None,
    macs: o.ManyMacs = None,
    keep_rate: o.KeepRate = None,
    set_: o.Set = None,
    checkpoint: o.Checkpoint = None,
    device: o.Device = "auto",
    dtype: o.Dtype = "float32",
    batch_size: o.BatchSize = 32,
    limit: o.Limit = None,
    seed: o.Seed = 0,
    workers: o.Workers = 0,
    json: o.Json = None,
) -> None:
    """Measure accuracy, MACs and closeness to the dense model, for any number of methods."""
    check_json(json, *recipe or ())
    recipes = o.recipes_of(method, recipe, macs, keep_rate, set_, o.saved_in(model, checkpoint))
    type_, place = o.dtype_of(dtype), o.device_of(device)
    from mergence import evaluation, family
    from mergence.data import loader, open_images
    from mergence.distances import check_classes

    loaded = o.load(model, checkpoint)
    classes = family.spec_of(loaded.model).classes
    check_classes(classes)  # before the folders are found to be of more classes
    images = open_images(
        data,
        transform=loaded.transform,
        mode=loaded.mode,
        class_names=loaded.label_names,
        num_classes=classes or None,
        limit=limit,
        seed=seed,
    )
    with progress("evaluating", len(images)) as advance:
        result = evaluation.evaluate(
            loaded.model.to(device=place, dtype=type_),
            loader(images, batch_size=batch_size, workers=workers),
            recipes,
            model_name=model,
            data_name=data,
            progress=advance,
        )
    try:  # first, because printing may fail as well
        write_json(json, result.to_dict())
    finally:
        evaluation_table(result)
