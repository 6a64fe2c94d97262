"""What a method is, and how it is found by name."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Any, ClassVar, TypeVar

from torch import Tensor, nn

from mergence import plugins
from mergence.arguments import is_number, is_whole
from mergence.declaration import check_declared, full_name
from mergence.errors import OptionError, PluginError, RecipeError, UnknownNameError
from mergence.plan import MergePlan, TokenView
from mergence.schedule import Schedule


class Learned(nn.Module, ABC):
    """A module with parameters that a method puts before the first reduction."""

    @abstractmethod
    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """Prepare the tokens: `x [B, N, C]` in raster order, `grid` its rows and columns."""

    @abstractmethod
    def macs(self, tokens: int) -> int:
        """Multiply-adds for one image of so many patches."""


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """One way to reduce tokens: its options and its rule, in one frozen object.

    A subclass is a frozen dataclass in a file of its own, registered under its name, with one
    method, `plan`. Its fields are its options; they validate themselves in `__post_init__`.

    Attributes:
        size_attention: Factor on log(size), which is added to the attention logits from the first
            reduction on, so that a merged token draws the attention of all the patches that it
            stands for (ToMe, arXiv 2210.09461, section 3.3, there called proportional attention).
            1 or True as in the paper, 0 or False for none; strong reductions gain from less than 1.
        coarse: Share of the image in which, before the first block, four patches each are read as
            one at half the resolution; see `mergence.coarse`. Below half of the MACs this is the
            gentlest part of a reduction. Not all families can do it. None leaves it to the
            schedule: a `Ramp` that begins before the first block reads coarsely where it can.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1
    needs: ClassVar[frozenset[str]] = frozenset()
    """Which of `importance`, `keys` and `received` the rule reads; see `TokenView`."""
    shape: ClassVar[Schedule]
    """The schedule of the method's own paper; its strength is solved for when MACs are given."""

    tunable: ClassVar[Mapping[str, tuple[float, ...]]] = {
        "coarse": (0.08, 0.16, 0.25, 0.35, 0.5),
        "size_attention": (0.7, 0.85, 1.0),
    }
    """Values of options that calibration tries beside those given."""

    size_attention: float = 1.0
    coarse: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.size_attention, bool):
            object.__setattr__(self, "size_attention", float(self.size_attention))
        check_range(self, "size_attention", 0, 2)
        if self.coarse is not None:
            check_range(self, "coarse", 0, 1)

    @abstractmethod
    def plan(self, tokens: TokenView, slots: int) -> MergePlan:
        """Say where each of the N patch tokens goes.

        Args:
            tokens: What may be seen of them.
            slots: How many slots there are afterwards, 1 to N - 1.
        """

    def fewest_slots(self, tokens: int) -> int:
        """The smallest number of slots that the rule can reach from `tokens` in one step."""
        return 1

    def plan_macs(self, tokens: int, slots: int, dim: int, head_dim: int) -> int:
        """Multiply-adds of the rule for one image, without what it declares in `needs`."""
        return 0

    def learned(self, dim: int) -> Learned | None:
        """A module with parameters that prepares the patch tokens for the first reduction.

        It must be the identity until trained.
        """
        return None

    def to_dict(self) -> dict[str, Any]:
        """The method as plain JSON values."""
        return {"method": self.name, "version": self.version, **dataclasses.asdict(self)}

    @classmethod
    def options(cls) -> tuple[str, ...]:
        """The names of the method's options."""
        return tuple(field.name for field in dataclasses.fields(cls))


class BipartiteMethod(Method):
    """A method that pairs tokens of two alternating sets, as ToMe does (arXiv 2210.09461)."""

    def fewest_slots(self, tokens: int) -> int:
        """A pair needs one of each set, so at most half can leave."""
        return tokens - tokens // 2

    def plan_macs(self, tokens: int, slots: int, dim: int, head_dim: int) -> int:
        """Similarity of the keys between the two halves."""
        return (tokens // 2) * (tokens - tokens // 2) * head_dim


M = TypeVar("M", bound=type[Method])
_REGISTRY: dict[str, type[Method]] = {}


def register(name: str) -> Callable[[M], M]:
    """Class decorator: make a method known under `name`.

    Raises:
        UnknownNameError: Another method has the name already.
        OptionError: The name can be none, the class is no method, or what it declares would have no
            effect.
    """
    given: Any = name
    if not isinstance(given, str) or not name or name.endswith(".json") or "/" in name:
        raise OptionError(
            f"A method's name is {given!r}; give a text that cannot be taken for the path of a "
            'recipe: @mergence.register("name").'
        )

    def add(cls: M) -> M:
        found: Any = cls
        if not isinstance(found, type) or not issubclass(found, Method):
            raise OptionError(f"{cls!r} is registered as a method, and is no subclass of Method.")
        check_declared(cls, Method)
        if not cls.__module__.startswith("mergence.methods."):
            _discover_own()  # or the name of one of them could be taken from it
        taken = _REGISTRY.get(name)
        if taken is not None and full_name(taken) != full_name(cls):
            raise UnknownNameError(
                f"The method name '{name}' is taken by {full_name(taken)}. "
                f"Choose another name for {full_name(cls)}."
            )
        cls.name = name
        _REGISTRY[name] = cls
        return cls

    return add


@cache
def _discover_own() -> None:
    import mergence.methods as package

    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        importlib.import_module(module.name)


@cache
def _discover() -> None:
    _discover_own()
    for place, found in plugins.load("mergence.methods"):
        # A module that registers several is as good.
        if isinstance(found, type) and found not in _REGISTRY.values():
            raise PluginError(
                f"{place} names {found!r}, which is not registered. It must name a method: a "
                'subclass of mergence.method.Method under @register("name").'
            )


def registry() -> Mapping[str, type[Method]]:
    """All known methods by name: those of the package and those of installed plug-ins.

    Raises:
        PluginError: A plug-in cannot be imported, or its entry point names no method.
    """
    _discover()
    return dict(sorted(_REGISTRY.items()))


def check_recordable(method: Method) -> None:
    """Check that a recipe can hold a method, so that it is the same when it is read again.

    Raises:
        OptionError: Its class has no name, or that of the class it is made from; or JSON cannot
            hold the value of an option.
    """
    cls = type(method)
    found = registry().get(getattr(cls, "name", ""))
    if found is None or full_name(found) != full_name(cls):
        raise OptionError(
            f"{full_name(cls)} has no name of its own, by which a recipe could name it. Put "
            '@mergence.register("name") above the class.'
        )
    for name in cls.options():
        value = getattr(method, name)
        try:
            same = _plain(json.loads(json.dumps(value))) == value
        except (TypeError, ValueError):
            same = False
        if not same:
            raise OptionError(
                f"{cls.__name__}.{name} is {value!r}, which a recipe cannot hold; give a number, "
                "True, False, None, a text or a tuple of these."
            )


def _plain(value: Any) -> Any:
    """A value with tuples in place of lists and Python's numbers in place of numpy's."""
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return tuple(map(_plain, value))
    if isinstance(value, bool | int | float) or not isinstance(value, Real):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def names() -> list[str]:
    """The names of all known methods."""
    return list(registry())


def build(name: str, options: Mapping[str, Any]) -> Method:
    """Make a method from its name and options.

    Raises:
        UnknownNameError: No method has that name.
        OptionError: An option is unknown or missing, or its value is out of range.
    """
    known = registry()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        raise UnknownNameError(
            f"There is no method '{name}'.{hint} Known methods: {', '.join(known)}."
        )
    cls = known[name]
    unknown = [key for key in options if key not in cls.options()]
    if unknown:
        raise OptionError(
            f"Method '{name}' has no option '{unknown[0]}'. "
            f"Its options: {', '.join(cls.options())}."
        )
    fields = (field for field in dataclasses.fields(cls) if field.name not in options)
    for field in fields:
        if field.default is field.default_factory is dataclasses.MISSING:
            raise OptionError(
                f"Method '{name}' needs a value for its option '{field.name}'. Give one "
                f"({field.name}=...), or give the option a default in its class."
            )
    return cls(**{key: _plain(value) for key, value in options.items()})


def from_dict(data: Mapping[str, Any]) -> Method:
    """Make a method from what `Method.to_dict` wrote.

    Raises:
        RecipeError: The entry is damaged, or was written by a newer version of the method.
    """
    options = dict(data)
    name, version = options.pop("method", None), options.pop("version", 1)
    if not isinstance(name, str) or not is_whole(version):
        raise RecipeError(
            f"The recipe's method is {dict(data)}; it needs a name under 'method' and a whole "
            "number under 'version'."
        )
    known = registry().get(name)
    if known is not None and version > known.version:
        raise RecipeError(
            f"The recipe holds version {version} of method '{name}', and this mergence knows "
            f"version {known.version}. Upgrade mergence to use it."
        )
    return build(name, options)


def check_flag(method: Method, field: str) -> None:
    """Check that an option is True or False.

    Raises:
        OptionError: It is not.
    """
    value = getattr(method, field)
    if not isinstance(value, bool):
        raise OptionError(f"{type(method).__name__}.{field} is {value!r}; give True or False.")


def check_range(
    method: Method, field: str, low: float, high: float = float("inf"), *, integer: bool = False
) -> None:
    """Check that an option is a finite number within bounds.

    Raises:
        OptionError: It is not.
    """
    value = getattr(method, field)
    fits = is_whole(value) if integer else is_number(value)
    if not fits or not low <= value <= high:
        what = "a whole number" if integer else "a number"
        bounds = f"from {low:g} to {high:g}"
        if high == float("inf"):
            bounds = f"at least {low:g} and finite"
        raise OptionError(f"{type(method).__name__}.{field} is {value!r}; give {what} {bounds}.")
