"""How many patch tokens are left after each block: numbers only, no tensors.

A schedule is resolved once, when a method is applied, for the model's number of patches; counts are
then plain integers, so shapes stay static.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from mergence.arguments import is_number, is_whole
from mergence.errors import RecipeError, ScheduleError
from mergence.setting import Setting, aligned, check, multiple_on


@dataclass(frozen=True, kw_only=True)
class Schedule(ABC):
    """How many patch tokens are left after each block."""

    kind: ClassVar[str]

    @abstractmethod
    def raw(self, setting: Setting) -> tuple[int, ...]:
        """The counts as the schedule wants them, before alignment and checks."""

    def start(self, setting: Setting) -> int:
        """How many patch tokens the schedule wants to enter the first block."""
        return setting.tokens

    def wanted(self, setting: Setting) -> tuple[int, ...]:
        """What `tokens` returns, before it is checked."""
        setting = dataclasses.replace(setting, tokens=self.start(setting), fewer=())
        return setting.tokens, *aligned(self.raw(setting), setting)

    def tokens(self, setting: Setting) -> tuple[int, ...]:
        """Patch tokens that enter the first block, and those left after each.

        Raises:
            ScheduleError: The schedule cannot be carried out.
        """
        return check(self.wanted(setting), setting)

    def strongest(self, setting: Setting) -> tuple[int, ...]:
        """What comes closest to `tokens` where that is out of reach.

        Raises:
            ScheduleError: Nothing does.
        """
        return self.tokens(setting)

    def align_on(self, device: str, dtype: torch.dtype) -> int:
        """The multiple that counts keep to on a type of device where nobody asks for another.

        Counts that a schedule states are followed as they are.
        """
        return 1

    def with_strength(self, strength: float, setting: Setting) -> Self:
        """The same shape, reducing nothing at strength 0 and as much as it can at 1."""
        raise ScheduleError(
            f"The schedule '{self.kind}' is fixed and cannot be fitted to a share of the MACs. "
            "Give it as the schedule itself, or a shape that can be fitted, such as KeepRate(), "
            "Constant() or Ramp()."
        )

    def to_dict(self) -> dict[str, Any]:
        """The schedule as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"kind": self.kind} | {
            key: value.to_dict() if isinstance(value, Schedule) else value
            for key, value in values.items()
            if value is not None
        }


@dataclass(frozen=True, kw_only=True)
class KeepRate(Schedule):
    """Keep a share of the tokens at chosen blocks, rounded up (EViT, arXiv 2202.07800).

    Attributes:
        keep_rate: The share kept at each of the blocks, above 0 and at most 1.
        blocks: Blocks counted from 1. None means after each quarter of the depth, which is blocks
            4, 7 and 10 of 12, as in the paper.
        every: Blocks from one reduction to the next, in place of `blocks`; 1 is every block, at
            whatever depth.
    """

    kind: ClassVar[str] = "keep_rate"

    keep_rate: float = 1.0
    blocks: tuple[int, ...] | None = None
    every: int | None = None

    def __post_init__(self) -> None:
        if not is_number(self.keep_rate) or not 0 < self.keep_rate <= 1:
            raise ScheduleError(
                f"keep_rate is {self.keep_rate!r}; give a number above 0 and at most 1."
            )
        blocks: Any = self.blocks
        if blocks is not None and not isinstance(blocks, tuple | list):
            raise ScheduleError(f"blocks is {blocks!r}; give a list of blocks, counted from 1.")
        if self.every is not None and (not _positive(self.every) or self.blocks is not None):
            raise ScheduleError(f"{self}: give either blocks, or every as 1 or more blocks.")

    def raw(self, setting: Setting) -> tuple[int, ...]:
        chosen = self.blocks
        if self.every is not None:
            chosen = tuple(range(self.every, setting.depth + 1, self.every))
        elif chosen is None:
            chosen = tuple(setting.depth * quarter // 4 + 1 for quarter in (1, 2, 3))
        _check_blocks(chosen, setting.depth)
        left, counts = setting.tokens, []
        for block in range(1, setting.depth + 1):
            if block in chosen:
                # The tiny subtraction keeps 0.7 * 10 = 7.000000000000001 from becoming 8.
                left = math.ceil(self.keep_rate * left - 1e-9)
            counts.append(left)
        return tuple(counts)

    def with_strength(self, strength: float, setting: Setting) -> Self:
        least = min(setting.fewest(setting.tokens), setting.tokens) / setting.tokens
        return dataclasses.replace(self, keep_rate=max(1 - strength, least))


@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """Remove the same number of tokens after each block (ToMe, arXiv 2210.09461).

    Attributes:
        r: Tokens removed per block. A fraction is honoured on average over the blocks. Where the
            method cannot remove so many at once, as many as it can are removed.
        first: The first block that removes tokens, counted from 1.
    """

    kind: ClassVar[str] = "constant"

    r: float = 0.0
    first: int = 1

    def __post_init__(self) -> None:
        if not is_number(self.r) or self.r < 0:
            raise ScheduleError(f"r is {self.r!r}; give the number of tokens to remove per block.")

    def raw(self, setting: Setting) -> tuple[int, ...]:
        _check_blocks((self.first,), setting.depth)
        left, counts = setting.tokens, []
        for block in range(1, setting.depth + 1):
            if block >= self.first:
                gone = min(self.r * (block - self.first + 1), setting.tokens)
                wanted = setting.tokens - round(gone)
                left = max(min(wanted, left), setting.fewest(left), 1)
            counts.append(left)
        return tuple(counts)

    def with_strength(self, strength: float, setting: Setting) -> Self:
        return dataclasses.replace(self, r=strength * setting.tokens)


@dataclass(frozen=True, kw_only=True)
class Ramp(Schedule):
    """Let the tokens fall linearly towards the end of the network, in a few steps.

    Searched per-block counts look like this (docs/methods/mergence.md): nothing leaves early, and
    then about the same number per block. A smaller budget starts the ramp earlier, and the smallest
    before the first block: what has to be gone there is read as coarse patches (docs/coarse.md)
    where the model can do that, and leaves at the first step where it cannot.

    Attributes:
        span: The length of the ramp in blocks, counted from the end of the network. It may be
            longer than the network.
        end: The share of the tokens that the ramp arrives at.
        every: Blocks between two steps. None means a sixth of the depth, two blocks of 12, or a
            quarter where some patches are read coarsely, after which fewer steps do as well. Each
            step costs time. The last block never reduces.
    """

    kind: ClassVar[str] = "ramp"

    span: float = 0.0
    end: float = 0.02
    every: int | None = None

    def __post_init__(self) -> None:
        if (
            not (is_number(self.span) and self.span >= 0)
            or not (is_number(self.end) and 0 < self.end <= 1)
            or (self.every is not None and not _positive(self.every))
        ):
            raise ScheduleError(
                f"{self}: give a span of at least 0, an end above 0 and at most 1, and every as 1 "
                "or more blocks."
            )

    def start(self, setting: Setting) -> int:
        wanted = self._height(setting.depth, setting)
        return min((setting.tokens, *setting.fewer), key=lambda tokens: abs(tokens - wanted))

    def raw(self, setting: Setting) -> tuple[int, ...]:
        steps = 4 if setting.tokens < setting.patches else 6
        every = self.every or max(setting.depth // steps, 1)
        left, counts = setting.tokens, []
        for block in range(1, setting.depth):
            if block % every == 0:
                left = min(left, max(round(self._height(setting.depth - block, setting)), 1))
            counts.append(left)
        return *counts, left

    def _height(self, to_go: int, setting: Setting) -> float:
        """The tokens that the ramp is at, so many blocks from the end."""
        share = min(to_go / self.span, 1.0) if self.span else 1.0
        return setting.patches * (self.end + (1 - self.end) * share)

    def with_strength(self, strength: float, setting: Setting) -> Self:
        return dataclasses.replace(self, span=setting.depth * strength / max(1 - strength, 1e-9))


@dataclass(frozen=True, kw_only=True)
class Counts(Schedule):
    """The counts themselves.

    Attributes:
        after: Patch tokens after each block, one number a block.
        of: The number of patches that the counts were made for, None for that of the model's own
            input size. At another number of patches, another resolution, they are scaled, and
            where the method cannot remove so many at once, as many as it can are removed.
    """

    kind: ClassVar[str] = "counts"

    after: tuple[int, ...]
    of: int | None = None

    def __post_init__(self) -> None:
        after: Any = self.after  # lists come from users and from JSON
        if not isinstance(after, Sequence) or isinstance(after, str):
            raise ScheduleError(
                f"after is {after!r}; give a list of the patch tokens left after each block."
            )
        for block, count in enumerate(after, start=1):
            if not is_whole(count):
                raise ScheduleError(
                    f"For block {block}, Counts.after holds {count!r}; give the whole number of "
                    "patch tokens that are left after it."
                )
        if self.of is not None and not _positive(self.of):
            raise ScheduleError(
                f"Counts.of is {self.of!r}; give the number of patches that the counts are for, or "
                "leave it out."
            )

    def raw(self, setting: Setting) -> tuple[int, ...]:
        if len(self.after) != setting.depth:
            raise ScheduleError(
                f"The schedule lists {len(self.after)} counts and the model has {setting.depth} "
                "blocks. Give one count a block: the patch tokens left after it."
            )
        of = self.of or setting.own
        if of == setting.patches:
            return self.after
        left, counts = setting.tokens, []
        for count in self.after:
            scaled = min(max(round(count * setting.patches / of), 1), setting.tokens)
            # Rounded by itself each, a count can fall below the half of the one before.
            left = max(scaled, min(setting.fewest(left), left))
            counts.append(left)
        return tuple(counts)


@dataclass(frozen=True, kw_only=True)
class Macs(Schedule):
    """The gentlest schedule of a shape that needs at most a share of the dense MACs.

    An image of another size than the model's own may be too small for any to meet that; it has the
    strongest there is.

    Attributes:
        macs: The share, above 0 and at most 1. What is counted: see `mergence.macs`.
        shape: The shape to fit.
    """

    kind: ClassVar[str] = "macs"

    macs: float
    shape: Schedule

    def __post_init__(self) -> None:
        shape: Any = self.shape
        if not isinstance(shape, Schedule):
            raise ScheduleError(f"shape is {shape!r}; give a schedule, for example KeepRate().")
        if not is_number(self.macs) or not 0 < self.macs <= 1:
            raise ScheduleError(
                f"macs is {self.macs!r}; give the share of the dense model's multiply-adds to "
                "keep, above 0 and at most 1, for example 0.67."
            )

    def strongest(self, setting: Setting) -> tuple[int, ...]:
        return self.shape.with_strength(1.0, setting).tokens(setting)

    def align_on(self, device: str, dtype: torch.dtype) -> int:
        return multiple_on(device, dtype)

    def start(self, setting: Setting) -> int:
        return self._fitted(setting).start(setting)

    def raw(self, setting: Setting) -> tuple[int, ...]:
        # Fitted once more now that it is known how many enter: that moves by whole regions, and
        # what a region leaves of the budget goes to the blocks.
        return self._fitted(setting).raw(setting)

    def _fitted(self, setting: Setting) -> Schedule:
        def share(strength: float) -> float:
            return setting.share(self.shape.with_strength(strength, setting).wanted(setting))

        if share(1.0) > self.macs:
            raise ScheduleError(
                f"macs={self.macs} is out of reach: the schedule '{self.shape.kind}' needs at "
                f"least {share(1.0):.2f} of the dense MACs on this model. Ask for more, or give a "
                "schedule that starts earlier."
            )
        if share(0.0) <= self.macs:
            return self.shape.with_strength(0.0, setting)
        gentle, strong = 0.0, 1.0
        for _ in range(40):
            middle = (gentle + strong) / 2
            if share(middle) > self.macs:
                gentle = middle
            else:
                strong = middle
        return self.shape.with_strength(strong, setting)


def _positive(value: Any) -> bool:
    return is_whole(value) and value >= 1


def _check_blocks(blocks: tuple[int, ...], depth: int) -> None:
    for block in blocks:
        if not is_whole(block) or not 1 <= block <= depth:
            raise ScheduleError(
                f"The schedule names block {block!r}; the model has blocks 1 to {depth}."
            )


_KINDS: dict[str, type[Schedule]] = {c.kind: c for c in (KeepRate, Constant, Ramp, Counts, Macs)}


def from_dict(data: Any) -> Schedule:
    """Make a schedule from what `Schedule.to_dict` wrote.

    Raises:
        RecipeError: The kind is unknown, or a value is missing, superfluous or out of range.
    """
    if not isinstance(data, Mapping):
        raise RecipeError(f"The recipe's schedule is {data!r}; give an object with a 'kind'.")
    values = dict(data)
    kind = values.pop("kind", None)
    if not isinstance(kind, str) or kind not in _KINDS:
        raise RecipeError(
            f"The recipe's schedule is of kind {kind!r}; known kinds: {', '.join(_KINDS)}."
        )
    for key, value in values.items():
        if isinstance(value, list):
            values[key] = tuple(value)
        elif isinstance(value, Mapping):
            values[key] = from_dict(value)
    try:
        return _KINDS[kind](**values)
    except TypeError as error:
        raise RecipeError(
            f"The recipe's schedule '{kind}' is not complete, or holds more: {error}."
        ) from error
    except ScheduleError as error:
        raise RecipeError(f"The recipe's schedule '{kind}' is damaged: {error}") from error
