"""Which reduction is applied at which step: one answer, whatever it depends on."""

from __future__ import annotations

import dataclasses
import math
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from mergence import surgery
from mergence.api import apply
from mergence.coarse import share_of, tokens_left
from mergence.errors import OptionError, ScheduleError, UnsupportedModelError
from mergence.program import Program, program_of
from mergence.recipe import Recipe
from mergence.schedule import Counts, Schedule
from mergence.step import BlockStep
from mergence.train.seeding import seed_at


@dataclass(frozen=True)
class Choice:
    """What is applied: a recipe by name, and how much of what it removes is removed.

    Attributes:
        recipe: The recipe's name.
        strength: 1 for the recipe as it is, 0 for the dense model, between them less tokens removed
            at the same blocks.
    """

    recipe: str
    strength: float


@dataclass(frozen=True)
class Timetable:
    """Which choice each step of a run gets; it depends on the step's place in the run alone.

    Three things that the literature found to matter, in one answer:

    * Several recipes take turns at random, so that one set of weights serves several budgets
      (LengthDrop of Kim and Cho, *Length-Adaptive Transformer*, arXiv 2010.07003; MCTF, arXiv
      2403.10030, draws r in its second path).
    * Keep-rate warm-up: the first reduced epochs start dense and remove more from step to step,
      along a cosine (EViT, arXiv 2202.07800; there over 100 epochs from the 10th).
    * Reduction on in some epochs and off in others, for instance off in the last ones (as FLIP,
      arXiv 2212.00794, tunes unmasked at the end).

    Attributes:
        recipes: Names of the recipes.
        steps: Steps of an epoch.
        warmup: Epochs from dense to the full strength, from the first reduced epoch on.
        epochs: Epochs with reduction: "all", "none", or numbers and ranges as in "1-8,10,12-".
        seed: Seed of the draw between the recipes.

    Raises:
        OptionError: `epochs` cannot be read.
    """

    recipes: tuple[str, ...]
    steps: int
    warmup: float = 0.0
    epochs: str = "all"
    seed: int = 0

    def __post_init__(self) -> None:
        _ranges(self.epochs)

    def at(self, place: int, update: int | None = None) -> Choice:
        """The choice of a step.

        Args:
            place: The step by the plan, counted from 0 over the whole run.
            update: The step as it is, where a stream does not keep to the plan; a recipe is drawn
                for each.
        """
        update = place if update is None else update
        drawn = random.Random(seed_at(self.seed, "recipe", update)).choice(self.recipes)
        epoch = place // self.steps + 1
        ranges = _ranges(self.epochs)
        if not any(low <= epoch <= high for low, high in ranges):
            return Choice(drawn, 0.0)
        ramp = self.warmup * self.steps
        done = place - (min(low for low, _ in ranges) - 1) * self.steps
        share = 1.0 if done >= ramp else done / ramp
        return Choice(drawn, 0.5 - 0.5 * math.cos(math.pi * share))


def _ranges(text: str) -> list[tuple[float, float]]:
    """Epochs counted from 1, as first and last of each range."""
    if text in ("all", "none"):
        return [(1, math.inf)] if text == "all" else []
    found: list[tuple[float, float]] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:(-)\s*(\d*)\s*)?", part)
        low = int(match[1]) if match else 0
        high = math.inf
        if match and not match[2]:
            high = low
        elif match and match[3]:
            high = int(match[3])
        if match is None or not 1 <= low <= high:
            raise OptionError(
                f"reduce_epochs is '{text}'. Write all, none, or epochs counted from 1 as in "
                "'1-8,10,12-'."
            )
        found.append((low, high))
    return found


class Reducer:
    """A reduced model that changes its reduction from step to step without being rebuilt.

    The first recipe is applied for good: classes are swapped and a learned module is put in once,
    before the optimiser sees the parameters and before DDP or FSDP wrap the model. A choice then
    only exchanges the program that its blocks follow. The dense model is a program that removes
    nothing.

    Args:
        model: The model; it is changed in place.
        recipes: What can be chosen, by name; at least one.

    Raises:
        MergenceError: A recipe does not fit the model, or they cannot share a learned module.
    """

    def __init__(self, model: nn.Module, recipes: Mapping[str, Recipe]) -> None:
        home = {}
        for name, recipe in reversed(list(recipes.items())):  # the first one stays applied
            apply(model, recipe)
            home[name] = _learned_at(program_of(model))
        if len(set(home.values())) > 1:
            raise ScheduleError(
                "The recipes put their learned module before different blocks: "
                + ", ".join(f"{name} {at or 'nowhere'}" for name, at in home.items())
                + ". Give recipes that start to reduce at the same block and all learn."
            )
        self._base = program_of(model)
        self.programs = {
            name: self._program(recipe, recipe.schedule) for name, recipe in recipes.items()
        }
        self._weaker: dict[tuple[str, int, tuple[int, ...]], Program] = {}
        self._modules = [m for m in model.modules() if surgery.is_swapped(m)]
        for module in self._modules:
            if not isinstance(surgery.attachment(module), BlockStep | Program):
                raise UnsupportedModelError(
                    f"The reduced {type(module).__name__} holds more than its program, so it "
                    "cannot change its reduction while it is trained."
                )

    def select(self, choice: Choice) -> Program:
        """Let the model follow a choice from now on; returns the program that it follows."""
        program = self.program(choice)
        for module in self._modules:
            held = surgery.attachment(module)
            step = isinstance(held, BlockStep)
            surgery.reattach(module, BlockStep(program, held.index) if step else program)
        return program

    def program(self, choice: Choice) -> Program:
        """The program of a choice."""
        full = self.programs[choice.recipe]
        if choice.strength == 1:
            return full
        # Rounded up: whatever the strength, the first block that reduces stays the same one.
        coarse = choice.strength * share_of(full.tokens()[0], full.patches)
        method = dataclasses.replace(full.method, coarse=coarse)
        start = tokens_left(coarse, full.patches)
        counts = tuple(
            min(full.patches - math.ceil(choice.strength * (full.patches - count)), start)
            for count in full.counts()
        )
        key = choice.recipe, start, counts
        if key not in self._weaker:
            recipe = Recipe(method, full.schedule, full.align)
            self._weaker[key] = self._program(recipe, Counts(after=counts))
        return self._weaker[key]

    def _program(self, recipe: Recipe, schedule: Schedule) -> Program:
        return dataclasses.replace(
            self._base, method=recipe.method, schedule=schedule, align=recipe.align, _tokens={}
        )


def _learned_at(program: Program) -> int | None:
    """The block, counted from 1, that a learned module is put before."""
    first = program.first_reduction()
    return None if program.learned is None or first is None else first + 1
