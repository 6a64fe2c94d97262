"""What several families share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mergence.errors import ReducedOutputError, UnsupportedModelError
from mergence.family import qualified_names
from mergence.macs import BlockCost
from mergence.state import Carry
from mergence.step import BlockStep
from mergence.surgery import ATTACHMENT, LEARNED, covered_error, is_covered, original_class

ModelT = TypeVar("ModelT", bound=nn.Module)

_MASKED = (
    "A reduced model was given an attention mask. The mask speaks of the original tokens, "
    "which are merged on the way. Call without a mask, or use mergence.disabled(model)."
)


_READERS = "_forward_hooks", "_backward_hooks", "_backward_pre_hooks"


class ReducedContainer:
    """Mixed into models around a tower whose own forward need not know of it."""


def reduced_forward(
    block: Any,
    x: Tensor,
    dense: Callable[[Tensor], Tensor],
    attend: Callable[[Tensor, Carry], Sequence[Any]],
    mlp: Callable[[Tensor], Tensor],
    scale: float,
) -> Tensor:
    """A block's forward, with fewer tokens after it where the schedule says so.

    Args:
        block: The block, with its `BlockStep` attached.
        x: `[B, P + N, C]` prefix and patch tokens.
        dense: The library's forward. It runs where the block removes no tokens and nothing is known
            about those it gets that it has no way in for, no bias of their sizes and no places.
        attend: Its first half restated, from tokens and what is known about them: the tokens after
            the attention, then its queries and keys `[B, H, P + N, D]`, and where it adds a bias
            for every pair of tokens that, `[B, H, P + N, P + N]` or None.
        mlp: Its second half, from those tokens that stayed.
        scale: The factor on the attention's logits.
    """
    step: BlockStep = block._mergence
    run = step.program.run
    run.lap("rest")
    carry = step.enter(x)
    slots = step.slots(carry)
    # Only the restated forward has a place between attention and MLP for the clock.
    watched = run.clock is not None
    if slots is None and carry.bias is None and carry.position is None and not watched:
        y = dense(x)
        step.leave(y, carry)
        return y
    x, q, k, *pairs = attend(x, carry)
    run.lap("attention")
    if slots is not None:
        learned = getattr(block, LEARNED, None)
        x, carry = step.reduce(x, q, k, scale, carry, slots, learned, *pairs)
    del q, k, pairs  # else they would be in memory while the MLP runs
    y = mlp(x)
    run.lap("mlp")
    step.leave(y, carry)
    return y


def refuse_mask(*masks: object) -> None:
    """Refuse an attention mask.

    Args:
        *masks: What was given for masks: None or False is none.

    Raises:
        ReducedOutputError: There is one.
    """
    if any(mask is not None and mask is not False for mask in masks):
        raise ReducedOutputError(_MASKED)


def refuse_padding(mask: Tensor | None) -> None:
    """Refuse a mask that hides patches; one that hides none is as good as none.

    Compiled and exported graphs ask when they run: there the library writes out a mask always, and
    blocks cannot tell.

    Raises:
        ReducedOutputError: There is one.
    """
    if mask is None:
        return
    if torch.compiler.is_compiling():
        torch._assert_async(mask.all(), _MASKED)
    elif not mask.all():
        refuse_mask(mask)


def require_class(
    module: nn.Module, allowed: str | tuple[str, ...], what: str, supported: str
) -> None:
    """Check that a part of a model is the one whose forward is restated.

    Raises:
        UnsupportedModelError: It is another one, or its forward was covered on the module itself.
    """
    found, *bases = qualified_names(original_class(module))
    allowed = (allowed,) if isinstance(allowed, str) else allowed
    if found not in allowed:
        compiled = isinstance(module, torch._dynamo.OptimizedModule)
        hint = " Apply before torch.compile." if compiled else ""
        if set(bases) & set(allowed):
            hint = " If fully_shard or a parametrization made it one, apply before that."
        raise UnsupportedModelError(
            f"{what} is a {found}; mergence restates the forward of {' or '.join(allowed)} and "
            f"would compute something else.{hint} Known: {supported}."
        )
    if is_covered(module):
        raise covered_error(f"{what}, a {found},")


def require_blocks(
    tower: nn.Module,
    blocks: Sequence[Any],
    block: str,
    attention: tuple[str, str],
    supported: str,
    first: int = 1,
) -> None:
    """Check that the blocks of a tower are those whose forward is restated.

    Args:
        tower: The tower.
        blocks: Its blocks.
        block: The class that they are to be.
        attention: The name of their attention, and the class that it is to be.
        supported: What is covered.
        first: The number of the first of them.

    Raises:
        UnsupportedModelError: One is another.
    """
    name, cls = attention
    for index, one in enumerate(blocks, start=first):
        where = f"{index} of this {type(tower).__name__}"
        require_class(one, block, f"Block {where}", supported)
        attn = getattr(one, name, one)
        require_class(attn, cls, f"The attention of block {where}", supported)


def block_costs(
    blocks: Sequence[nn.Module], attention: str, mlp: Sequence[str], width: int
) -> tuple[BlockCost, ...]:
    """What blocks cost, from the names of their attention and of the parts of their MLP."""
    return tuple(
        BlockCost(
            attention=linear_macs(getattr(block, attention)),
            mlp=sum(linear_macs(getattr(block, name)) for name in mlp),
            width=width,
        )
        for block in blocks
    )


def pooling_costs(pool: nn.Module, width: int) -> tuple[int, int]:
    """What an attention pooling with one query costs: whatever the tokens, and for each."""
    projections = 2 * width**2  # the keys and values
    return linear_macs(pool) - projections, projections + 2 * width


def same_library(model: nn.Module, block: nn.Module) -> bool:
    """Whether a model's class is of the library of its blocks, not somebody's subclass of it."""
    first, second = (original_class(m).__module__.partition(".")[0] for m in (model, block))
    return first == second


def unwatched(blocks: Any, *after: nn.Module) -> bool:
    """Whether the last block is the one that was reduced as that, and no hook reads its tokens.

    Neither in it nor behind it. Those before a part of the block do not count: pruning and weight
    norms set weights there.

    Args:
        blocks: The blocks, in their container.
        *after: What the tokens pass then, before the head.
    """
    step = getattr(blocks[-1], ATTACHMENT, None)
    if not isinstance(step, BlockStep) or step.index + 1 != step.program.depth:
        return False  # another was put behind it
    modules = (blocks, *blocks[-1].modules(), *after)
    hooks = [getattr(module, readers) for module in modules for readers in _READERS]
    return not any([*hooks, *(module._forward_pre_hooks for module in after)])


def linear_macs(module: Any) -> int:
    """Multiply-adds of a module's linear layers for one token.

    A linear layer has one for each weight, also where quantization has packed its weights or a
    parametrization has split them into something else than a parameter of that shape, and without
    the adapters around it, which are merged into it later. `nn.MultiheadAttention` keeps the
    weights of three in one parameter of its own.
    """
    for name in ("base_layer", "original_module"):  # as peft calls what it is around
        if hasattr(module, name):
            return linear_macs(getattr(module, name))
    if hasattr(module, "in_features") and hasattr(module, "out_features"):
        return int(module.in_features * module.out_features)
    macs: int = sum(p.numel() for p in module.parameters(recurse=False) if p.ndim == 2)
    return macs + sum(map(linear_macs, module.children()))


def mean_by_size(x: Tensor, size: Tensor) -> Tensor:
    """The mean over tokens `[B, N, C]` in which each counts `size [B, N]` times."""
    share = (size / size.sum(dim=1, keepdim=True)).to(x.dtype)
    # Not a matrix product: autocast would take that to half precision, unlike the dense mean.
    return (share.unsqueeze(2) * x).sum(dim=1)


def randomised(model: ModelT) -> ModelT:
    """Add noise to every parameter, the same each time.

    Libraries initialise so small that tokens hardly differ; tests need tokens that do.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.5 / parameter.shape[-1] ** 0.5 if parameter.ndim > 1 else 0.1
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(noise * scale)
    return model
