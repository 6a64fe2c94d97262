"""What arguments are: numbers, and several values, which parts of all layers ask alike."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Real
from typing import Any

from mergence.errors import OptionError


def is_number(value: Any) -> bool:
    """Whether an option, which may come from JSON, is a finite number; True and False are none."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that is larger than any other
        return False


def is_whole(value: Any) -> bool:
    """Whether an option is a whole number; True and False are none."""
    return isinstance(value, int) and is_number(value)


def check_several(**given: object) -> None:
    """Check that arguments which take several values were not given a single one.

    Raises:
        OptionError: One was.
    """
    for name, values in given.items():
        if isinstance(values, str) or not isinstance(values, Iterable):
            raise OptionError(f"{name} is {values!r}; give a list, for example [{values!r}].")
