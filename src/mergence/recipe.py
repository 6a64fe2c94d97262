"""Recipes: method, schedule and options as JSON that travels."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from mergence import method as methods
from mergence import schedule as schedules
from mergence._version import __version__
from mergence.arguments import is_whole
from mergence.errors import OptionError, RecipeError, ScheduleError
from mergence.files import check_target, read_json, write_text
from mergence.method import Method
from mergence.schedule import Constant, Counts, KeepRate, Macs, Schedule

_FORMAT = 1
_KEYS = {"mergence_recipe", "method", "schedule", "align", "written_by", "notes"}


@dataclass(frozen=True)
class Recipe:
    """How to reduce a model: everything that `apply` needs besides the model.

    Attributes:
        method: The method with its options.
        schedule: How many tokens stay after each block.
        align: Token counts, prefix included, are rounded to multiples of this. 1 rounds nothing.
            None leaves it to the device: see `on`.
        notes: Free JSON values: where the recipe comes from, what it was measured at.
    """

    method: Method
    schedule: Schedule
    align: int | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        parts: Any = (
            ("method is", self.method, Method, "a method such as ToMe()"),
            ("schedule is", self.schedule, Schedule, "a schedule such as Counts(after=(36, 30))"),
            ("notes are", self.notes, Mapping, "a mapping, or leave them out"),
        )
        for part, value, kind, wanted in parts:
            if not isinstance(value, kind):
                raise OptionError(f"A recipe's {part} {value!r}; give {wanted}.")
        methods.check_recordable(self.method)
        align = self.align
        if align is not None and (not is_whole(align) or align < 1):
            raise OptionError(
                f"align is {self.align!r}; give a whole number of at least 1, or leave it out."
            )

    def on(self, device: str, dtype: torch.dtype = torch.float32) -> Recipe:
        """The recipe with `align` filled in for a type of device, `cpu` or `cuda`.

        Where the schedule is a share of the MACs, counts become multiples of 8 on CUDA, and of 16
        in bfloat16 on CPUs with AMX. Schedules that state the counts, or how they are made, are
        followed as they are.

        Args:
            device: Type of the device.
            dtype: The type in which the model computes there.
        """
        if self.align is not None:
            return self
        return dataclasses.replace(self, align=self.schedule.align_on(device, dtype))

    def to_dict(self) -> dict[str, Any]:
        """The recipe as plain JSON values."""
        return {
            "mergence_recipe": _FORMAT,
            "written_by": f"mergence {__version__}",
            "method": self.method.to_dict(),
            "schedule": self.schedule.to_dict(),
            "align": self.align,
            "notes": dict(self.notes),
        }

    def to_json(self) -> str:
        """The text of a recipe file."""
        return json.dumps(self.to_dict(), indent=2) + "\n"

    def save(self, path: str | Path) -> None:
        """Write the recipe as JSON; the file is there whole or not at all.

        Raises:
            OptionError: There is no such folder, or the file cannot be written there.
        """
        check_target(Path(path), "The recipe")
        write_text(Path(path), self.to_json())

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Make a recipe from what `to_dict` wrote; unknown keys are warned about.

        Raises:
            RecipeError: The data is no recipe, or of a newer format.
        """
        given: Any = data  # may come from JSON
        if not isinstance(given, Mapping):
            raise RecipeError(
                f"This is no mergence recipe, but a {type(given).__name__}; give an object."
            )
        found = data.get("mergence_recipe")
        writer = data.get("written_by", "an unknown program")
        if found is None or not isinstance(data.get("method"), Mapping):
            raise RecipeError(
                'This is no mergence recipe: the keys "mergence_recipe" and "method" are missing. '
                f"Found: {', '.join(map(str, data)) or 'nothing'}."
            )
        if not is_whole(found) or found > _FORMAT:
            raise RecipeError(
                f"The recipe has format {found!r} (written by {writer}), and mergence "
                f"{__version__} reads formats up to {_FORMAT}. Upgrade mergence."
            )
        notes = data.get("notes", {})
        if not isinstance(notes, Mapping):
            raise RecipeError(f"The recipe's notes are {notes!r}; give an object, or leave it out.")
        unknown = sorted(set(data) - _KEYS)
        if unknown:
            warnings.warn(
                f"The recipe was written by {writer} and has keys that mergence {__version__} does "
                f"not know; they are ignored: {', '.join(unknown)}.",
                stacklevel=2,
            )
        return cls(
            method=methods.from_dict(data["method"]),
            schedule=schedules.from_dict(data.get("schedule", {})),
            align=data.get("align"),
            notes=notes,
        )

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe file.

        Raises:
            RecipeError: The file is missing, is no JSON or no recipe.
        """
        try:
            data = read_json(Path(path))
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"The recipe '{path}' cannot be read: {error}.") from error
        except ValueError as error:
            raise RecipeError(f"The recipe '{path}' is not valid JSON: {error}.") from error
        if not isinstance(data, Mapping):
            raise RecipeError(f"The recipe '{path}' holds a {type(data).__name__}, not an object.")
        return cls.from_dict(data)


def make(
    method: Any = "mergence",
    *,
    macs: float | None = None,
    keep_rate: float | None = None,
    r: float | None = None,
    schedule: Schedule | list[int] | tuple[int, ...] | None = None,
    align: int | None = None,
    **options: Any,
) -> Recipe:
    """Make a recipe from what a user says; see `mergence.apply` for the arguments.

    Raises:
        OptionError: Arguments contradict each other.
        ScheduleError: A number is out of range.
    """
    if isinstance(method, Path) or (isinstance(method, str) and method.endswith(".json")):
        method = Recipe.load(method)
    given = {"macs": macs, "keep_rate": keep_rate, "r": r, "schedule": schedule}
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        raise OptionError(
            f"{' and '.join(given)} each say how much to reduce. Give only one of them."
        )
    if isinstance(method, Recipe):
        if given or options:
            raise OptionError(
                f"A recipe already says everything; {', '.join([*given, *options])} cannot be "
                "given with it. Edit the recipe, or name the method instead."
            )
        return method if align is None else dataclasses.replace(method, align=align)
    if isinstance(method, str):
        method = methods.build(method, options)
    elif not isinstance(method, Method):
        raise OptionError(
            f"The method is {method!r}. Give the name of one ({', '.join(methods.names())}), a "
            "method such as ToMe(), a recipe, or the path of a recipe file."
        )
    elif options:
        raise OptionError(
            f"{type(method).__name__}(...) holds its own options; {', '.join(options)} cannot be "
            f"given beside it. Write {type(method).__name__}({next(iter(options))}=...)."
        )
    return Recipe(method, _schedule(method, given), align)


def _schedule(method: Method, given: dict[str, Any]) -> Schedule:
    match given:
        case {"macs": macs}:
            if not hasattr(method, "shape"):
                raise OptionError(
                    f"Method '{method.name}' has no schedule of its own that macs could fit. Give "
                    "its class one as `shape`, for example mergence.KeepRate(), or give schedule."
                )
            return Macs(macs=_number("macs", macs), shape=method.shape)
        case {"keep_rate": keep_rate}:
            return KeepRate(keep_rate=_number("keep_rate", keep_rate))
        case {"r": r}:
            return Constant(r=_number("r", r))
        case {"schedule": Schedule() as schedule}:
            return schedule
        case {"schedule": list() | tuple() as counts}:
            return Counts(after=tuple(counts))
        case {"schedule": other}:
            raise ScheduleError(
                f"schedule is a {type(other).__name__}; give a mergence schedule such as "
                "KeepRate(...) or a list of patch tokens left after each block."
            )
    raise OptionError(
        "Nothing says how much to reduce. Give macs=0.67 for two thirds of the work, or keep_rate, "
        "r, schedule, or a recipe file."
    )


def _number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise OptionError(f"{name} is {value!r}, a {type(value).__name__}; give a number.")
    return value
