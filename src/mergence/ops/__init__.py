"""The operators behind every plan: which tokens stay and what they resemble, and the merge itself.

Around them the attention that knows how many patches a token stands for, and one row of it.

Each has three implementations that agree: `cpu`; `fused`, Triton kernels for CUDA; and `dense`,
without scatter, for exported graphs and for other devices. Nobody outside of this package knows
which one runs.
"""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from mergence.ops import cpu, dense, fused
from mergence.plan import MergePlan

__all__ = [
    "Cosines",
    "attend",
    "attention_of_row",
    "cosines",
    "merge",
    "most_important",
    "norms",
    "split",
]

Cosines = dense.Cosines | cpu.Cosines | fused.Cosines

_TRITON = find_spec("triton") is not None


def merge(x: Tensor, size: Tensor, plan: MergePlan, prefix: int = 0) -> tuple[Tensor, Tensor]:
    """Merge tokens into the slots of a plan.

    Args:
        x: `[B, P + N, C]` prefix and patch tokens.
        size: `[B, N]` float32, how many patches each patch token stands for.
        plan: A plan for these N patch tokens.
        prefix: P, the number of tokens in front that pass unchanged.

    Returns:
        `[B, P + slots, C]` in the type of `x`: the prefix, and the weighted mean of each slot. And
        the sum of the sizes in each slot, `[B, slots]` float32. A slot whose weights are all zero
        yields zeros. With `plan.keep_norm` the mean is scaled to the largest norm of the slot's
        tokens of positive weight.
    """
    merged: tuple[Tensor, Tensor] = _implementation(x).merge(x, size, plan, prefix)
    return merged


def cosines(x: Tensor) -> Cosines:
    """The cosines between all tokens of an image, to be asked for the nearest ones.

    They are rounded to the type of `x`, so that what counts as a tie does not depend on the order
    in which an implementation sums.

    Args:
        x: `[B, N, C]` tokens. No gradient flows from the answers.
    """
    found: Cosines = _implementation(x).Cosines(x)
    return found


def norms(x: Tensor) -> Tensor:
    """The norm of each token, as something to divide by: never zero.

    Args:
        x: `[..., C]`.

    Returns:
        `[...]`, at least as exact as numbers of the type of `x`.
    """
    norm: Tensor = _implementation(x).norms(x)
    return norm


def split(score: Tensor, kept: int) -> tuple[Tensor, Tensor]:
    """Split tokens by score.

    Args:
        score: `[B, N]`. NaN counts as the lowest; among equals the first stay. No gradient flows.
        kept: How many stay, 0 to N: those of the highest score.

    Returns:
        Two permutations, `[B, N]` int64: the positions of the tokens that stay and then of those
        that leave, both in raster order; and its inverse, the place of each token among these.
    """
    parts: tuple[Tensor, Tensor] = _implementation(score).split(score, kept)
    return parts


def most_important(plan: MergePlan, importance: Tensor) -> Tensor:
    """The index of the most important token of each slot, `[B, slots]`; the first among equals.

    Args:
        plan: Where each token goes. Every slot has a token.
        importance: `[B, N]`. No gradient flows.
    """
    index: Tensor = _implementation(importance).most_important(plan, importance)
    return index


def attention_of_row(q: Tensor, k: Tensor, scale: float, bias: Tensor | None = None) -> Tensor:
    """Attention of one query to all keys: one row of the map, never the map.

    Args:
        q: `[B, H, 1, D]`.
        k: `[B, H, N, D]`.
        scale: Factor on the logits, usually `D ** -0.5`.
        bias: Added to the logits, `[B, 1, 1, N]` or what else is broadcast to `[B, H, 1, N]`.

    Returns:
        `[B, H, N]` float32; each row sums to 1.
    """
    row: Tensor = _implementation(k).attention_of_row(q, k, scale, bias)
    return row


def attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """`F.scaled_dot_product_attention` with a bias on the logits.

    Torch's kernels for CUDA read a mask of a number for each pair of tokens, even where all rows of
    it are the same; the one here takes a number for each key.

    Args:
        q: `[B, H, N, D]`.
        k: The same shape.
        v: The same shape.
        bias: Added to the logits, `[B, 1, 1, N]` or what else is broadcast to `[B, H, N, N]`.
        dropout: Probability that a weight is left out.

    Returns:
        `[B, H, N, D]`.
    """
    y: Tensor = _implementation(q).attend(q, k, v, bias, dropout)
    return y


def _implementation(x: Tensor) -> ModuleType:
    if _without_scatter():
        return dense
    if _TRITON and x.is_cuda and x.dtype in fused.DTYPES:
        return fused
    return cpu if x.device.type == "cpu" else dense


def _without_scatter() -> bool:
    """Whether a graph is recorded for elsewhere, where there is no mergence and no Triton.

    Or torch.func maps a function over images, which cannot scatter into what is not mapped. Or
    derivatives are carried forward, which neither kernels nor sums of rows that are looked up do.
    """
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    mapping = torch._C._functorch.peek_interpreter_stack() is not None
    forward = forward_ad._current_level >= 0
    return tracing or mapping or forward or torch.compiler.is_exporting()


# Asked once, while a graph is made, and not compiled: torch 2.11 tells what it compiles that it is
# exported. `torch.compiler.assume_constant_result` does this too, and imports all of torch._dynamo.
_without_scatter._dynamo_marked_constant = True  # type: ignore[attr-defined]
