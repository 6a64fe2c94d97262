"""Accuracy of every method: with the schedule of its own paper, and with our calibrated one.

    python benchmarks/accuracy/run.py MODEL --data VAL --calibrate-on TRAIN --out results/NAME.json

MODEL is what `mergence eval` takes. Recipes are calibrated first (or taken from --recipes), then
the dense model, `mergence` and every other method run over the same images, batch by batch. A
method that cannot remove as many tokens in one step as the calibrated schedule wants removes as
many as it can there; its MACs say so. `render.py` turns the results into tables and a plot.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
from pathlib import Path

import timm
import torch
from rich.progress import Progress

import mergence
from mergence import method as methods
from mergence.calibration import calibrate
from mergence.coarse import tokens_left
from mergence.data import loader, open_images
from mergence.errors import ScheduleError
from mergence.models import LoadedModel, load_model
from mergence.recipe import make
from mergence.schedule import Counts


def main() -> None:
    """Calibrate, evaluate, write the JSON."""
    arguments = _arguments()
    loaded = _loaded(arguments)
    recipes = _calibrated(loaded, arguments)
    runs: dict[str, mergence.Recipe] = {}
    for budget, recipe in recipes.items():
        runs[f"mergence@{budget:g} calibrated"] = recipe
        with mergence.applied(loaded.model, recipe):
            share = mergence.describe(loaded.model).macs_ratio
        for name in arguments.methods:
            own = make(name, macs=share, align=1)  # on any device the same counts
            if _possible(loaded, own):
                runs[f"{name}@{budget:g} own"] = own
            if name != "mergence":
                runs[f"{name}@{budget:g} calibrated"] = _same_counts(name, recipe)
    data = open_images(
        arguments.data,
        transform=loaded.transform,
        mode=loaded.mode,
        class_names=loaded.label_names,
        num_classes=getattr(loaded.model, "num_classes", None),
        limit=arguments.limit,
        seed=arguments.seed,
    )
    with Progress() as bar:
        task = bar.add_task("evaluating", total=len(data))
        result = mergence.evaluate(
            loaded.model,
            loader(data, batch_size=arguments.batch_size),
            runs,
            dtype=getattr(torch, arguments.dtype),
            model_name=Path(arguments.model).name,
            data_name=Path(arguments.data).name,
            progress=lambda images: bar.advance(task, images),
        )
    machine = {
        "machine": platform.machine(),
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "mergence": mergence.__version__,
        "seed": arguments.seed,
        "dtype": arguments.dtype,
        "calibrated_on": _source(arguments, recipes),
    }
    arguments.out.write_text(json.dumps({**machine, **result.to_dict()}, indent=1) + "\n")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True, help="validation images, a folder or a .zip")
    parser.add_argument("--calibrate-on", help="images to calibrate on; labels are not looked at")
    parser.add_argument("--recipes", type=Path, help="a folder of calibrated recipes instead")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.67, 0.6, 0.5, 0.4])
    parser.add_argument("--methods", nargs="*", default=methods.names())
    parser.add_argument("--points", type=int, default=4)
    parser.add_argument("--images", type=int, default=512, help="images to calibrate on")
    parser.add_argument("--limit", type=int, help="validation images, spread over the classes")
    parser.add_argument("--input-size", type=int, help="side of the images, if not the model's own")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--dtype", default="float32", help="of the evaluation, say bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def _loaded(arguments: argparse.Namespace) -> LoadedModel:
    loaded = load_model(arguments.model)
    if arguments.input_size is None:
        return loaded
    side = arguments.input_size
    loaded.model.set_input_size((side, side))
    config = timm.data.resolve_model_data_config(loaded.model) | {"input_size": (3, side, side)}
    return dataclasses.replace(loaded, transform=timm.data.create_transform(**config))


def _calibrated(loaded: LoadedModel, arguments: argparse.Namespace) -> dict[float, mergence.Recipe]:
    """The calibrated recipe of each budget."""
    if arguments.recipes is not None:
        return {
            budget: mergence.Recipe.load(arguments.recipes / f"recipe-{budget:g}.json")
            for budget in arguments.budgets
        }
    data = open_images(
        arguments.calibrate_on,
        transform=loaded.transform,
        mode=loaded.mode,
        limit=arguments.images,
        seed=arguments.seed,
    )
    with Progress() as bar:
        task = bar.add_task("calibrating", total=1.0)
        result = calibrate(
            loaded.model,
            loader(data, batch_size=arguments.batch_size),
            budgets=arguments.budgets,
            points=arguments.points,
            images=arguments.images,
            progress=lambda share: bar.update(task, completed=share),
        )
    return {found.budget: found.recipe for found in result.found}


def _source(arguments: argparse.Namespace, recipes: dict[float, mergence.Recipe]) -> str:
    """What the recipes were calibrated on."""
    if arguments.calibrate_on is not None:
        return f"{arguments.images} images of {Path(arguments.calibrate_on).name}"
    return " and ".join(
        sorted(
            {
                f"{r.notes['calibration']['images']} images of {r.notes['data']}"
                for r in recipes.values()
            }
        )
    )


def _possible(loaded: LoadedModel, recipe: mergence.Recipe) -> bool:
    try:
        with mergence.applied(loaded.model, recipe):
            return True
    except ScheduleError:
        return False


def _same_counts(name: str, recipe: mergence.Recipe) -> mergence.Recipe:
    """A method with the counts of another's recipe, as far as it can follow them.

    Coarse patches are a part of the schedule here: they are the same for all.
    """
    share, schedule = recipe.method.coarse or 0.0, recipe.schedule.to_dict()
    method = methods.build(name, {"coarse": share})
    left, counts = tokens_left(share, schedule["of"]), []
    for wanted in schedule["after"]:
        left = wanted if wanted >= left else max(wanted, method.fewest_slots(left))
        counts.append(left)
    return mergence.Recipe(method, Counts(after=tuple(counts), of=schedule["of"]))


if __name__ == "__main__":
    main()
