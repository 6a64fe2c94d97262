"""Make a trained Vision Transformer do less work per image and keep its answer.

    import mergence
    mergence.apply(model, macs=0.67)

Public names are imported at first use, so that `import mergence` and the command line start fast.
"""

from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from mergence._version import __version__ as __version__

if TYPE_CHECKING:
    from mergence.api import applied, apply, describe, disabled, recipe_of, remove
    from mergence.benchmark import bench
    from mergence.calibration import calibrate
    from mergence.errors import MergenceError
    from mergence.evaluation import evaluate
    from mergence.exporting import export
    from mergence.method import Method, register
    from mergence.plan import MergePlan, TokenView
    from mergence.recipe import Recipe
    from mergence.restoring import restore
    from mergence.saving import load, save
    from mergence.schedule import Constant, Counts, KeepRate, Macs, Ramp
    from mergence.tracing import trace

_HOME = {
    "api": ("apply", "applied", "describe", "disabled", "recipe_of", "remove"),
    "benchmark": ("bench",),
    "calibration": ("calibrate",),
    "errors": ("MergenceError",),
    "evaluation": ("evaluate",),
    "exporting": ("export",),
    "method": ("Method", "register"),
    "plan": ("MergePlan", "TokenView"),
    "recipe": ("Recipe",),
    "restoring": ("restore",),
    "saving": ("load", "save"),
    "schedule": ("Constant", "Counts", "KeepRate", "Macs", "Ramp"),
    "tracing": ("trace",),
}

__all__ = [
    "Constant",
    "Counts",
    "KeepRate",
    "Macs",
    "MergePlan",
    "MergenceError",
    "Method",
    "Ramp",
    "Recipe",
    "TokenView",
    "__version__",
    "applied",
    "apply",
    "bench",
    "calibrate",
    "describe",
    "disabled",
    "evaluate",
    "export",
    "load",
    "recipe_of",
    "register",
    "remove",
    "restore",
    "save",
    "trace",
]


def __getattr__(name: str) -> Any:
    for module, names in _HOME.items():
        if name in names:
            value = getattr(import_module(f"mergence.{module}"), name)
            globals()[name] = value
            return value
    if find_spec(f"mergence.{name}") is not None:
        return import_module(f"mergence.{name}")
    raise AttributeError(f"module 'mergence' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted(__all__)
