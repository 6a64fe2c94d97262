"""The only file that changes foreign modules: class swap, and its exact undo.

A module is given a subclass of its own class that mixes in what mergence adds. The object stays the
same, `isinstance` holds, parameters keep their names, and undoing it is setting the class back. The
subclass keeps the name of its base (transformers writes class names into configs) and pickles
by naming base and mixin, because it cannot be imported itself.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn

ATTACHMENT = "_mergence"
LEARNED = "mergence"
"""The reserved name of a method's learned module, below the block that uses it."""


@cache
def _reduced_class(base: type, mixin: type) -> type:
    def reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (base, mixin), self.__dict__.copy()

    return type(
        base.__name__,
        (mixin, base),
        {
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
            "__reduce_ex__": reduce_ex,
            "_mergence_base": base,
        },
    )


def _rebuild(base: type, mixin: type) -> object:
    return object.__new__(_reduced_class(base, mixin))


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's class, without what mergence mixed in."""
    base: type[nn.Module] = getattr(type(module), "_mergence_base", type(module))
    return base


def is_swapped(module: nn.Module) -> bool:
    """Whether mergence changed this very module."""
    return hasattr(type(module), "_mergence_base")


def attachment(module: nn.Module) -> Any:
    """What `swap` attached to the module, or None."""
    return module.__dict__.get(ATTACHMENT)


def learned_module(module: nn.Module) -> nn.Module | None:
    """The learned module that `swap` added, or None."""
    return module._modules.get(LEARNED)


def swap(
    module: nn.Module, mixin: type, attachment: object, learned: nn.Module | None = None
) -> Callable[[], None]:
    """Mix a class into a module and attach an object to it.

    Returns:
        A function that undoes it exactly.
    """
    base: type = type(module)
    module.__class__ = _reduced_class(base, mixin)
    module.__dict__[ATTACHMENT] = attachment
    if learned is not None:
        module.add_module(LEARNED, learned)
    return lambda: restore(module)


def restore(module: nn.Module) -> None:
    """Undo `swap`; a module that was never swapped is left alone."""
    if is_swapped(module):
        module.__class__ = original_class(module)
        module.__dict__.pop(ATTACHMENT, None)
        module._modules.pop(LEARNED, None)
