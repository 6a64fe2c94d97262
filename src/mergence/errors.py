"""What can go wrong, by kind.

Every message says what was wrong, what was found and what to do. Errors are raised before anything
is changed.
"""

from __future__ import annotations

from collections.abc import Sequence


class MergenceError(RuntimeError):
    """Base of every error that mergence raises on purpose."""


class UnsupportedModelError(MergenceError):
    """The model, or a part of it, is of a kind that no family declares."""


class UnknownNameError(MergenceError):
    """A method, family or model source of that name does not exist."""


class PluginError(MergenceError):
    """An installed plug-in cannot be imported, or is not what its entry point promises."""


class OptionError(MergenceError):
    """An option is unknown, of the wrong type or out of range."""


class ScheduleError(MergenceError):
    """A schedule cannot be carried out on this model."""


class PlanError(MergenceError):
    """A method's plan, or what its learned module gives, is not what was asked for."""


class RecipeError(MergenceError):
    """A recipe file is missing, damaged or of another format."""


class ReducedOutputError(MergenceError):
    """Reduced tokens were used in a way that needs what was lost on the way."""


class DataError(MergenceError):
    """Images or labels cannot be used as given."""


class CheckpointError(MergenceError):
    """Weights are missing, damaged or do not fit the model."""


class ExportError(MergenceError):
    """A model cannot be exported, or the exported one does not do what the model does."""


class TrainingError(MergenceError):
    """A training run cannot go on; what it has reached is kept."""


class MissingExtraError(MergenceError):
    """An optional dependency is needed and not installed."""

    def __init__(self, package: str, extra: str, what: str) -> None:
        super().__init__(
            f"{what} needs the package '{package}', which is not installed. "
            f"Install it, in a checkout of mergence, with: pip install -e '.[{extra}]'"
        )


def few(names: Sequence[str]) -> str:
    """The first of many names, for a message."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
