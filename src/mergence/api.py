"""apply, remove and what stands around them: the public face of the library."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from mergence import family as families
from mergence import surgery
from mergence.errors import MergenceError, OptionError, UnsupportedModelError
from mergence.family import ModelSpec
from mergence.method import Learned, Method
from mergence.program import Program, program_of, runs_in
from mergence.recipe import Recipe, make
from mergence.report import Description
from mergence.schedule import Schedule
from mergence.step import BlockStep

ModelT = TypeVar("ModelT", bound=nn.Module)


def apply(
    model: ModelT,
    method: str | Path | Method | Recipe = "mergence",
    *,
    macs: float | None = None,
    keep_rate: float | None = None,
    r: float | None = None,
    schedule: Schedule | list[int] | tuple[int, ...] | None = None,
    align: int | None = None,
    **options: Any,
) -> ModelT:
    """Make a model reduce its tokens, in place.

    The object, its `forward`, its parameters and its `state_dict` keys stay the same; only a method
    that learns something adds keys, below the name `mergence` in one block. Applying again replaces
    what was applied before. Everything is checked before anything is changed. No forward may be
    under way in another thread.

    Example:
        >>> mergence.apply(model, macs=0.67)
        >>> mergence.apply(model, "tome", r=13)
        >>> mergence.apply(model, Mergence(alpha=0.25), schedule=[196] * 6 + [128] * 6)
        >>> mergence.apply(model, "recipe.json")

    Args:
        model: A model of a known family; `mergence list families` shows them.
        method: A method's name, a method, a recipe, or the path of a recipe file.
        macs: Share of the dense model's multiply-adds to keep, above 0 and at most 1.
        keep_rate: Share of the tokens to keep at blocks 4, 7 and 10 of 12.
        r: Tokens to remove after each block.
        schedule: A schedule, or the list of patch tokens left after each block.
        align: Round token counts, prefix included, to multiples of this. Left out, and where `macs`
            is given, it is what the attention of the device is fast at: 8 on CUDA, 16 in bfloat16
            on CPUs with AMX, and otherwise 1. So move a model to its device and type before this.
        **options: The options of the method, when it is given by name.

    Returns:
        The same model.

    Raises:
        UnsupportedModelError: No family covers the model.
        UnknownNameError: There is no such method.
        OptionError: An option is unknown, contradictory or out of range.
        ScheduleError: The schedule cannot be carried out on this model.
        RecipeError: The recipe cannot be read.
    """
    recipe = make(
        method, macs=macs, keep_rate=keep_rate, r=r, schedule=schedule, align=align, **options
    )
    _check_type(model)
    spec = families.spec_of(model)
    learned = recipe.method.learned(spec.cost.dim)
    _check_places(recipe.method, spec, learned)
    reference = next(spec.blocks[0].parameters())
    program = Program(
        method=recipe.method,
        schedule=recipe.schedule,
        align=recipe.align,
        device=reference.device.type,
        dtype=reference.dtype,
        cost=spec.cost,
        patches=spec.patches,
        class_token=spec.class_token and spec.cost.prefix > 0,
        coarse=spec.coarse and learned is None,
        learned=None if learned is None else learned.macs,
        notes=recipe.notes,
    )
    first = program.first_reduction()
    if learned is not None and first is not None:
        _prepare(learned, spec, first)
    back = surgery.bookmark(model)
    try:
        surgery.restore(model)
        # All blocks: at another image size another one may be the first that reduces.
        for index, block in enumerate(spec.blocks):
            module = learned if index == first else None
            surgery.swap(block, spec.block_mixin, BlockStep(program, index), module)
        for part, mixin in spec.parts:
            surgery.swap(part, mixin, program)
    except BaseException:
        back()
        raise
    return model


def _prepare(learned: nn.Module, spec: ModelSpec, first: int) -> None:
    """Put a learned module where its block is, with what an earlier one of its kind has learned."""
    reference = next(spec.blocks[first].parameters())
    learned.to(device=reference.device, dtype=reference.dtype)
    learned.train(spec.blocks[first].training)
    for block in spec.blocks:
        earlier = surgery.learned_module(block)
        if earlier is not None and _shapes(earlier) == _shapes(learned):
            learned.load_state_dict(earlier.state_dict())


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in module.state_dict().items()}


def remove(model: ModelT) -> ModelT:
    """Give the original model back: classes, attributes and outputs, bit for bit.

    A learned module is taken out with its weights. A model that was not reduced is left alone.

    Returns:
        The same model.
    """
    surgery.restore(model)
    return model


@contextmanager
def applied(
    model: ModelT,
    method: str | Path | Method | Recipe = "mergence",
    **arguments: Any,
) -> Iterator[ModelT]:
    """Reduce a model for the length of a `with` block, then go back to what was applied before.

    Like `apply` it changes the model, for all threads: no forward may be under way in another one.
    Blocks must be closed in the opposite order of opening, for each goes back to what it found. So
    do not `await` or `yield` inside of one, where another block or `apply` could come between.

    Args:
        model: See `apply`.
        method: See `apply`.
        **arguments: See `apply`.
    """
    back = surgery.bookmark(model)
    apply(model, method, **arguments)
    try:
        yield model
    finally:
        back()


@contextmanager
def disabled(model: ModelT) -> Iterator[ModelT]:
    """Run a reduced model as its dense original for the length of a `with` block.

    Only the current thread is affected, and all of it: coroutines of one thread share the block. So
    do not `await` or `yield` inside of it: until it is closed, the forwards of others run dense.

    What is reduced inside of another module (a wrapper, a tower of a larger model) runs dense, too;
    what is not reduced runs as it is.
    """
    runs = runs_in(model)
    for run in runs:
        run.disable()
    try:
        yield model
    finally:
        for run in runs:
            run.enable()


def recipe_of(model: nn.Module) -> Recipe:
    """The recipe that is applied to a model.

    Raises:
        MergenceError: The model is not reduced.
    """
    program = program_of(model)
    return Recipe(program.method, program.schedule, program.align, program.notes)


def describe(model: nn.Module) -> Description:
    """Say what is applied to a model: tokens after each block, MACs before and after.

    At the image size that the model is configured for.

    Raises:
        MergenceError: The model is not reduced, or was changed since and is to be reduced anew.
    """
    program = program_of(model)
    _check_unchanged(model, program)
    return Description(
        model=surgery.original_class(model).__name__,
        family=families.find(model).name,
        method=program.method,
        schedule=program.schedule,
        patches=program.patches,
        start=program.tokens()[0],
        prefix=program.prefix,
        prefix_alone=program.cost.prefix_alone and program.reduces,
        align=program.multiple,
        counts=program.counts(),
        dense=program.macs(dense=True),
        reduced=program.macs(),
    )


_READ = "patch tokens", "the class token alone"
_AGAIN = "Apply again: mergence.apply(model, mergence.recipe_of(model))."

_WRAPPERS = "torch.distributed.", "torch._dynamo.", "torch.nn.utils.parametrize.", "peft."


def _is_wrapped(model: nn.Module) -> bool:
    """Whether others put something around parts of a model that is still the one inside."""
    return any(
        hasattr(module, "_hf_hook")  # accelerate's, which covers forwards
        or any(name.startswith(_WRAPPERS) for name in families.qualified_names(type(module)))
        for module in model.modules()
    )


def _check_unchanged(model: nn.Module, program: Program) -> None:
    this = surgery.original_class(model).__name__
    try:
        _check_counts(families.spec_of(model), program, this)
    except UnsupportedModelError as error:
        if not _is_wrapped(model):
            raise MergenceError(
                f"This {this} was changed since it was reduced, and is not one that can be any "
                f"more: {error}"
            ) from error
    own = [
        step.index
        for step in map(surgery.attachment, model.modules())
        if isinstance(step, BlockStep) and step.program is program
    ]
    for index in range(program.depth):
        if own[index : index + 1] != [index]:
            raise MergenceError(
                f"Block {index + 1} of this {this} is not the one that was reduced with it: it was "
                f"exchanged since, or reduced or restored through another model. {_AGAIN}"
            )


def _check_counts(spec: ModelSpec, program: Program, this: str) -> None:
    alone, then_alone = spec.cost.prefix_alone, program.cost.prefix_alone
    # A tower by itself has no head, and its tokens were for that of the model around it.
    reads = alone if spec.classes else then_alone
    for now, then, what in (
        (spec.patches, program.patches, "patches"),
        (len(spec.blocks), program.depth, "blocks"),
        (_READ[reads], _READ[then_alone], "for its head to read"),
    ):
        if now != then:
            raise MergenceError(
                f"This {this} has {now} {what} and had {then} when it was reduced. {_AGAIN}"
            )
    cost = program.cost
    if not spec.classes:
        cost = replace(cost, head=spec.cost.head, head_per_token=spec.cost.head_per_token)
    if replace(spec.cost, prefix_alone=then_alone) != cost:
        raise MergenceError(
            f"A layer of this {this}, such as its head, has another size than when it was reduced, "
            f"and its MACs are counted for that. {_AGAIN}"
        )


def _check_places(method: Method, spec: ModelSpec, learned: nn.Module | None) -> None:
    if learned is not None and not isinstance(learned, Learned):
        raise OptionError(
            f"What '{method.name}' learns is a {type(learned).__name__}; make it a subclass of "
            "mergence.method.Learned, which says what it is called with and what it costs."
        )
    if method.coarse and not spec.coarse:
        raise OptionError(
            f"coarse={method.coarse}: mergence cannot read patches of this model coarsely, because "
            "its family does not say that it can (docs/extending/add-a-family.md). One can where "
            "one convolution embeds patches of an image that do not overlap and positions are "
            "added to them before the first block. Leave coarse out."
        )
    if method.coarse and learned is not None:
        raise OptionError(
            f"coarse={method.coarse} beside a learned module, which needs all patches in their "
            "rows. Give only one of them."
        )
    if learned is not None and not spec.raster:
        raise OptionError(
            f"What '{method.name}' learns reads patches in their rows, and this model takes them "
            "in another order. Give the method without it (mstm: fusion=False)."
        )


def _check_type(model: object) -> None:
    if isinstance(model, torch._dynamo.OptimizedModule):
        raise UnsupportedModelError(
            "The model is already wrapped by torch.compile. Apply to the model first and compile "
            "it then, or apply to its `_orig_mod`."
        )
    if not isinstance(model, nn.Module):
        raise UnsupportedModelError(
            f"The model is a {type(model).__name__}, not a torch.nn.Module. Pass the model itself."
        )
