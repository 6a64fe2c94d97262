"""The only file that changes foreign modules: class swap, and its exact undo.

A module is given a subclass of its own class that mixes in what mergence adds. The object stays the
same, `isinstance` holds, parameters keep their names, and undoing it is setting the class back. The
subclass keeps the name of its base (transformers writes class names into configs) and pickles
by naming base and mixin, because it cannot be imported itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, update_wrapper
from inspect import signature, unwrap
from types import FunctionType
from typing import Any

from torch import nn

from mergence.errors import MergenceError, UnsupportedModelError

ATTACHMENT = "_mergence"
LEARNED = "mergence"
"""The reserved name of a method's learned module, below the block that uses it."""

_UNWRAP = (
    "accelerate's remove_hook_from_submodules(model) or, after Accelerator.prepare and Trainer, "
    "accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
)


@cache
def _reduced_class(base: type, mixin: type) -> type:
    def reduce_ex(self: nn.Module, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (base, mixin), self.__getstate__()  # type: ignore[no-untyped-call]

    def new(cls: type, *args: Any, **options: Any) -> Any:
        # Others make new modules of the class that they find (peft does); those are the library's.
        # Without arguments it is a replica, whose attributes are set by whoever asks.
        return base(*args, **options) if args or options else object.__new__(cls)

    namespace = {
        "__new__": new,
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": reduce_ex,
        "_mergence_base": base,
        "_mergence_mixin": mixin,
    }
    if _defines_forward(mixin):
        namespace["forward"] = _with_signature_of(mixin.forward, base)  # type: ignore[attr-defined]
    return type(base.__name__, (mixin, base), namespace)


def _defines_forward(mixin: type) -> bool:
    return isinstance(getattr(mixin, "forward", None), FunctionType)


def is_covered(module: nn.Module) -> bool:
    """Whether a call of the module calls something else than its class's forward."""
    found = module.__dict__.get("forward")
    function = getattr(found, "__func__", None)
    return found is not None and function is not type(module).forward


def _covered_methods(module: nn.Module) -> Iterator[str]:
    """What is mixed into a module and was covered on it since, by something that calls it."""
    mixin = vars(type(module))["_mergence_mixin"]
    if _defines_forward(mixin) and is_covered(module):
        yield "forward"
    for name, found in vars(module).items():
        method = getattr(mixin, name, None)
        # One that was set before mergence was applied calls the library's.
        if name != "forward" and method and getattr(unwrap(found), "__func__", None) is method:
            yield name


def covered_error(what: str) -> UnsupportedModelError:
    """The error for a module whose own forward is not the one that mergence knows."""
    return UnsupportedModelError(
        f"The forward of {what} was covered on the module itself, as accelerate's hooks "
        "(device_map, cpu_offload), mixed precision and torch.compile(model.forward) do, and "
        "mergence would not call what it does. Apply before that (load on one device, "
        f"mergence.apply, accelerate.dispatch_model), or after {_UNWRAP}. To compile, call "
        "model.compile() instead, or torch.compile(model) after mergence.apply."
    )


def _uncover(module: nn.Module) -> None:
    """Take away the class's own forward, bound to the module; the next class has another one.

    transformers 4 leaves it behind when it has recorded hidden states.
    """
    if not is_covered(module):
        module.__dict__.pop("forward", None)


def _with_signature_of(forward: FunctionType, base: type) -> FunctionType:
    """A copy of a mixin's forward with the base's signature and docstring.

    Others read them: transformers' Trainer drops the columns of a data set that forward does not
    name, and torch.export names inputs by it.
    """
    twin = FunctionType(
        forward.__code__,
        forward.__globals__,
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    twin.__kwdefaults__ = forward.__kwdefaults__
    update_wrapper(twin, base.forward)  # type: ignore[attr-defined]
    # In place of a way back: accelerate follows it when it takes its mixed precision off a model,
    # and would leave the library's forward on it.
    del twin.__wrapped__  # type: ignore[attr-defined]
    twin.__signature__ = signature(base.forward)  # type: ignore[attr-defined]
    return twin


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
) -> None:
    """Mix a class into a module and attach an object to it; `restore` undoes it exactly.

    Raises:
        UnsupportedModelError: The mixed-in forward would not be called.
    """
    base: type = type(module)
    if _defines_forward(mixin) and is_covered(module):
        raise covered_error(f"a {base.__name__}")
    _uncover(module)
    module.__class__ = _reduced_class(base, mixin)
    module.__dict__[ATTACHMENT] = attachment
    if learned is not None:
        module.add_module(LEARNED, learned)


def reattach(module: nn.Module, attachment: object) -> None:
    """Exchange what `swap` attached to a module."""
    module.__dict__[ATTACHMENT] = attachment


def restore(model: nn.Module) -> None:
    """Undo `swap` in a model and everything in it; what was never swapped is left alone.

    Raises:
        MergenceError: Somebody else changed the class of a module after mergence did, or covered
            its forward.
    """
    for module in _swapped(model):
        _uncover(module)
        module.__class__ = original_class(module)
        del module.__dict__[ATTACHMENT]
        module._modules.pop(LEARNED, None)


def _swapped(model: nn.Module) -> list[nn.Module]:
    """The modules that mergence changed, all of them as it left them."""
    found = {name: module for name, module in model.named_modules() if is_swapped(module)}
    for name, module in found.items():
        what = f"'{name}'" if name else "The model"
        if "_mergence_base" not in vars(type(module)):
            raise MergenceError(
                f"{what} is a {type(module).__name__} now: its "
                "class was changed after mergence was applied, as fully_shard and torch's "
                "parametrizations do, and cannot be set back. Undo that before, or begin with "
                "mergence; mergence.disabled(model) still runs the dense model."
            )
        for method in _covered_methods(module):
            raise MergenceError(
                f"The {method} of {what}, a {type(module).__name__}, was covered after mergence "
                "was applied, as accelerate's hooks, mixed precision and torch.compile of a method "
                f"do, and would call what mergence takes away. Undo that before, by {_UNWRAP}, or "
                f"by `del` of its {method}; mergence.disabled(model) still runs the dense model."
            )
    return list(found.values())


def bookmark(model: nn.Module) -> Callable[[], None]:
    """Remember what is swapped in a model, learned modules with their weights included.

    Returns:
        A function that brings the model back to this state.

    Raises:
        MergenceError: See `restore`.
    """
    swapped = [
        (module, vars(type(module))["_mergence_mixin"], attachment(module), learned_module(module))
        for module in _swapped(model)
    ]

    def back() -> None:
        restore(model)
        for state in swapped:
            swap(*state)

    return back
