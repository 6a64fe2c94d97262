"""What a family is: how the blocks of one library look, and how a model is recognised."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

from torch import nn
from torch.torch_version import TorchVersion

from mergence import plugins
from mergence.arguments import is_whole
from mergence.errors import PluginError, UnsupportedModelError
from mergence.macs import ModelCost, count


@dataclass(frozen=True)
class ModelSpec:
    """What mergence needs to know about one model.

    Attributes:
        blocks: Its transformer blocks, in order.
        patches: Patches at its own input size.
        cost: What its MACs depend on.
        block_mixin: Mixed into each block: reduces between attention and MLP.
        parts: Other modules with what is mixed into each: the model itself (marks forwards), the
            tower inside it, heads that pool by size.
        classes: How many class scores it gives; 0 where it answers with an embedding, tokens or
            maps.
        coarse: Whether it can read some patches coarsely; see `mergence.coarse`.
        raster: Whether its patches are in raster order, as learned modules take them.
        class_token: Whether the first prefix token, if there is any, is a class token, whose
            attention says what matters; registers alone do not.
    """

    blocks: tuple[nn.Module, ...]
    patches: int
    cost: ModelCost
    block_mixin: type
    parts: tuple[tuple[nn.Module, type], ...]
    classes: int
    coarse: bool = False
    raster: bool = True
    class_token: bool = True


class Family(ABC):
    """The models of one library that share a kind of block.

    A subclass lives in a file of its own and is instantiated there as `FAMILY`. It never imports
    its library: classes are recognised by qualified name.

    Attributes:
        name: The family's name, unique.
        models: Qualified names of the model classes that it knows.
        supported: What it covers, for people to read.
        refused: Qualified names of classes that people may take for covered ones, and why not.
        oldest: The oldest release of the library that it reads rightly; "" for any.
    """

    name: ClassVar[str]
    models: ClassVar[tuple[str, ...]]
    supported: ClassVar[str]
    refused: ClassVar[Mapping[str, str]] = {}
    oldest: ClassVar[str] = ""

    @abstractmethod
    def inspect(self, model: nn.Module) -> ModelSpec:
        """Read a model's structure.

        Raises:
            UnsupportedModelError: A part of it is of a kind that the family does not cover.
        """

    @abstractmethod
    def tiny(self) -> Mapping[str, Callable[[], nn.Module]]:
        """Builders of tiny random models, one for each kind covered, for the contract tests."""

    def input_shape(self, model: nn.Module) -> tuple[int, ...]:
        """The shape of one input of a tiny model, for the contract tests.

        Colour images of 96 x 96 pixels, unless a family says otherwise.
        """
        return 3, 96, 96


def qualified_names(cls: type) -> list[str]:
    """The qualified names of a class and its bases."""
    return [f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__]


@cache
def registry() -> Mapping[str, Family]:
    """All known families by name: those of the package and those of installed plug-ins.

    Raises:
        PluginError: A plug-in cannot be imported, or its entry point names no family.
        UnsupportedModelError: A plug-in wants the name of another family.
    """
    import mergence.families as package

    modules = [m.name for m in pkgutil.iter_modules(package.__path__) if m.name[0] != "_"]
    found: list[Family] = [
        importlib.import_module(f"{package.__name__}.{name}").FAMILY for name in modules
    ]
    for place, family in plugins.load("mergence.families"):
        if not isinstance(family, Family):
            raise PluginError(
                f"{place} names {family!r}. It must name an instance of a subclass of "
                "mergence.family.Family, usually `FAMILY`."
            )
        found.append(family)
    families: dict[str, Family] = {}
    for family in found:
        if families.setdefault(family.name, family) is not family:
            raise UnsupportedModelError(
                f"Two families are called '{family.name}'. Uninstall one, or rename the plug-in's."
            )
    return families


def find(model: nn.Module) -> Family:
    """The family of a model.

    Raises:
        UnsupportedModelError: No family knows the model's class, or its library is too old.
    """
    family = _match(model)
    if family is not None:
        _require_release(family, model)
        return family
    known = "; ".join(f"{f.name} ({f.supported})" for f in registry().values())
    for one in registry().values():
        for name in qualified_names(type(model)):
            if name in one.refused:
                raise UnsupportedModelError(
                    f"A {name} cannot be reduced: {one.refused[name]}. Known: {known}."
                )
    inner = next(((name, m) for name, m in model.named_modules() if name and knows(m)), None)
    hint = (
        f"It contains a supported model at '.{inner[0]}': apply to that module instead."
        if inner
        else f"Known: {known}."
    )
    raise UnsupportedModelError(
        f"No family knows the model class {qualified_names(type(model))[0]}; windowed, "
        f"hierarchical and convolutional models have no sequence of tokens to reduce. {hint}"
    )


def spec_of(model: nn.Module) -> ModelSpec:
    """What a model's family reads of it.

    Raises:
        UnsupportedModelError: No family covers the model, or what it says of it cannot be.
    """
    family, name = find(model), type(model).__name__
    spec = family.inspect(model)
    if wrong := _wrong(spec):
        raise UnsupportedModelError(f"The family '{family.name}' misreads this {name}: {wrong}.")
    places = [(f"block {i}", block) for i, block in enumerate(spec.blocks, start=1)]
    seen: dict[nn.Module, str] = {}
    for place, module in [*places, *((f"the {type(m).__name__}", m) for m, _ in spec.parts)]:
        if (first := seen.setdefault(module, place)) is not place:
            raise UnsupportedModelError(
                f"This {name} has one module for {first} and {place}, and mergence has to tell "
                "them apart. Make one of them a copy, by copy.deepcopy."
            )
    return spec


def _wrong(spec: Any) -> str | None:
    """What cannot be so in a spec, which somebody's own family may have made."""
    if not isinstance(spec, ModelSpec):
        return f"it gives {spec!r} in place of a ModelSpec"
    mixins = spec.block_mixin, *(mixin for _, mixin in spec.parts)
    if not all(isinstance(mixin, type) for mixin in mixins):
        return f"what is mixed in is {mixins}, and must be classes"
    if not spec.blocks or len(spec.blocks) != len(spec.cost.blocks):
        return f"it gives {len(spec.blocks)} blocks and the costs of {len(spec.cost.blocks)}"
    for what, number, least in (("patches", spec.patches, 1), ("prefix", spec.cost.prefix, 0)):
        if not is_whole(number) or number < least:
            return f"{what} is {number!r}, and must be a whole number of at least {least}"
    if count(spec.cost, spec.patches).total <= 0:
        return f"its costs add up to no multiply-adds: {spec.cost}"
    return None


def knows(model: nn.Module) -> bool:
    """Whether a family knows the model's class."""
    return _match(model) is not None


def release(library: str) -> str | None:
    """The release of a library that is imported, None where it is not or does not say."""
    return getattr(sys.modules.get(library), "__version__", None)


def is_older(library: str, oldest: str) -> bool:
    """Whether a library that is imported is of a release before another."""
    found = release(library)
    return found is not None and TorchVersion(found) < oldest


def _require_release(family: Family, model: nn.Module) -> None:
    """Refuse a model of an older release, whose classes of the same names are built otherwise."""
    known = next(name for name in qualified_names(type(model)) if name in family.models)
    library = known.partition(".")[0]
    if family.oldest and is_older(library, family.oldest):
        raise UnsupportedModelError(
            f"This {known.rpartition('.')[2]} is of {library} {release(library)}, and mergence "
            f"reads models of {library} {family.oldest} and newer. Upgrade it: pip install -U "
            f"'{library}>={family.oldest}'."
        )


def _match(model: nn.Module) -> Family | None:
    names = set(qualified_names(type(model)))
    return next((f for f in registry().values() if names.intersection(f.models)), None)
