"""What the class of a method declares, checked when it is registered."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from mergence.arguments import is_number
from mergence.errors import OptionError
from mergence.schedule import Schedule

NEEDS = frozenset({"importance", "keys", "received"})
"""What a rule may read beside the tokens; see `TokenView`."""

_DATACLASS = "Put @dataclass(frozen=True, kw_only=True) above the class and annotate it"


def full_name(cls: type) -> str:
    """The name of a class and its module."""
    return f"{cls.__module__}.{cls.__qualname__}"


def check_declared(cls: type, base: type) -> None:
    """Check what a method's class declares.

    Args:
        cls: The class.
        base: The class of all methods.

    Raises:
        OptionError: Something is declared so that it would have no effect, or fail when it is used.
    """
    _check_options(cls, base)
    _check_needs(cls)
    _check_tunable(cls)
    shape = getattr(cls, "shape", None)
    if shape is not None and not isinstance(shape, Schedule):
        raise OptionError(
            f"{full_name(cls)}.shape is {shape!r}; give a schedule such as mergence.KeepRate()."
        )


def _fields(cls: Any) -> dict[str, dataclasses.Field[Any]]:
    return {field.name: field for field in dataclasses.fields(cls)}


def _check_options(cls: Any, base: Any) -> None:
    fields = _fields(cls)
    # `to_dict` writes the method's name under "method".
    taken = {*dir(base), *base.__dataclass_fields__, "method"} - _fields(base).keys()
    for name in fields:
        if name in taken:
            raise OptionError(
                f"{full_name(cls)} makes an option of '{name}', which means something else in a "
                f"method. If it is to be that, write {name}: ClassVar[...] = ...; if not, rename "
                "the option."
            )
    for name, field in fields.items():
        for part in cls.__mro__:
            if "__dataclass_fields__" in vars(part) and name in inspect.get_annotations(part):
                break  # a dataclass says so, and its __init__ knows
            if name in vars(part) and (value := vars(part)[name]) is not field.default:
                kind = getattr(field.type, "__name__", field.type)
                raise OptionError(
                    f"{full_name(cls)}.{name} = {value!r} would have no effect: the option "
                    f"'{name}' keeps its default. {_DATACLASS}: {name}: {kind} = {value!r}."
                )
    for part in cls.__mro__:
        if not issubclass(part, base) or "__dataclass_fields__" in vars(part):
            continue
        for name, kind in inspect.get_annotations(part).items():
            if name not in fields and "ClassVar" not in str(kind):
                raise OptionError(
                    f"{full_name(cls)}.{name} is annotated and is no option. {_DATACLASS}; if it "
                    "is to be none, annotate it as a ClassVar."
                )


def _check_needs(cls: Any) -> None:
    needs: Any = cls.needs
    if not isinstance(needs, set | frozenset) or not needs <= NEEDS:
        raise OptionError(
            f"{full_name(cls)}.needs is {needs!r}; give a frozenset of {', '.join(sorted(NEEDS))}."
        )


def _check_tunable(cls: Any) -> None:
    tunable: Any = cls.tunable
    if not isinstance(tunable, Mapping):
        raise OptionError(
            f"{full_name(cls)}.tunable is {tunable!r}; give a mapping from options to values."
        )
    for name, values in tunable.items():
        if name not in _fields(cls):
            raise OptionError(
                f"{full_name(cls)}.tunable names '{name}', which is no option of it. Its options: "
                f"{', '.join(_fields(cls))}."
            )
        # Calibration tries larger values, then smaller ones, so they need an order.
        several = isinstance(values, Sequence) and not isinstance(values, str)
        if not several or not all(is_number(v) or isinstance(v, bool) for v in values):
            raise OptionError(
                f"{full_name(cls)}.tunable holds {values!r} for '{name}'; give numbers, such as "
                f"{{'{name}': (0.1, 0.2)}}. Values without an order, such as texts, are not tried."
            )
