"""What one forward pass carries from block to block, apart from the tokens themselves.

Blocks hand each other only the token tensor, so the sizes travel beside it: in a run that belongs
to the current thread while a model's forward is under way, and attached to the tensor itself where
tokens outlive a forward (the result of `forward_features`, or a block that gradient checkpointing
runs again during the backward pass, possibly in another thread).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from mergence.plan import compose, spread

_ATTRIBUTE = "_mergence_carry"
_DENSE = "_mergence_dense"

Head = Literal["mean", "prefix", "sized"]


@dataclass(frozen=True)
class Merge:
    """What became of the tokens in one reduction.

    Attributes:
        slot: `[B, N]` the slot of each token, or -1.
        apart: `[B, N, C]` what set each token apart from what its slot became, all of it where it
            was dropped; None where nobody is to ask for it.
        among: `[B, slots, C]` float32 or more, what set the slots apart from their mean; None as
            well.
    """

    slot: Tensor
    apart: Tensor | None = None
    among: Tensor | None = None

    @classmethod
    def of(cls, slot: Tensor, before: Tensor, after: Tensor) -> Merge:
        """The merge of tokens `[B, N, C]` into `[B, slots, C]`."""
        exact = after.to(torch.promote_types(after.dtype, torch.float32))
        return cls(slot, before - spread(after, slot), exact - exact.mean(dim=1, keepdim=True))

    def undone(self, slots: Tensor) -> Tensor:
        """The tokens `[B, N, C]` that the slots `[B, slots, C]` were, as far as is known.

        Each is what its slot is now, and what set it apart is added, in the share in which the
        slots are still apart from each other: by least squares, between 0 and 1. With one slot it
        is all of it.
        """
        full = spread(slots, self.slot)
        if self.apart is None or self.among is None:
            return full
        total = self.among.square().sum(dim=(1, 2), keepdim=True)
        # Those of today need not be centred: products with what is centred sum up to the same.
        share = (slots * self.among).sum(dim=(1, 2), keepdim=True)
        share = share / torch.where(total > 0, total, 1.0)  # a gradient, too, knows no 0 / 0
        # More than all of it is noise where tokens hardly differ.
        share = torch.where(total > 0, share, 1.0).clamp(0, 1)
        return full + self.apart * share.to(full.dtype)


@dataclass(frozen=True)
class Carry:
    """What is known about the tokens at one place in the network.

    Attributes:
        patches: Patches of the image before any reduction.
        grid: Patch rows and columns, or None where unknown.
        size: `[B, N]` float32, how many patches each patch token stands for; None before the first
            reduction.
        bias: `[B, 1, 1, P + N]` log(size) with zeros for the prefix tokens, which size attention
            adds to the logits; None before the first reduction or without size attention.
        position: `[B, N]` int64, the patch whose place each patch token has: the most important
            one in it. Kept only for models whose blocks look at places; None before the first
            reduction.
        merges: The reductions so far. Their maps are kept as they are and composed when asked, so
            that a forward nobody asks pays nothing.
        every_patch: Whether every patch is to have a value again, and so what sets tokens apart is
            kept.
        prefix_alone: Whether nothing but prefix tokens is asked for after the last block.
        unnormed: What tokens that passed a norm after the last block were before it, and the norm;
            None for others. What sets tokens apart is of those before it.
    """

    patches: int
    grid: tuple[int, int] | None = None
    size: Tensor | None = None
    bias: Tensor | None = None
    position: Tensor | None = None
    merges: tuple[Merge, ...] = ()
    every_patch: bool = False
    prefix_alone: bool = False
    unnormed: tuple[Tensor, Callable[[Tensor], Tensor]] | None = None

    def __reduce__(self) -> tuple[type[OrderedDict[str, Any]], tuple[()]]:
        # A file of a tensor holds the tensor alone. Empty, and of a type that torch.load takes.
        return OrderedDict, ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Carry:
        return self

    @property
    def tokens(self) -> int:
        """How many patch tokens there are."""
        return self.patches if self.size is None else self.size.shape[1]

    def until(self, tokens: int) -> list[Merge]:
        """The reductions until so many patch tokens were left.

        Every reduction removes tokens, so their number tells the place.
        """
        return [merge for merge in self.merges if merge.slot.shape[1] > tokens]

    def source(self, tokens: int) -> Tensor | None:
        """The source map at the place where so many patch tokens were left.

        Args:
            tokens: Patch tokens there.

        Returns:
            `[B, patches]` slot of each patch, -1 where dropped; None where none was reduced yet.
        """
        source = None
        for merge in self.until(tokens):
            source = merge.slot if source is None else compose(source, merge.slot)
        return source


class Runs(threading.local):
    """The runs of a program, one in each thread.

    What compiled code assigns to a thread's own attributes is lost without a word (torch 2.14), so
    there is one, and never another is assigned. Copies and pickles are empty: a run belongs to a
    thread and a moment, not to a model.

    Attributes:
        here: The run of this thread.
    """

    def __init__(self) -> None:
        self.here = Run()

    def __reduce__(self) -> tuple[type[Runs], tuple[()]]:
        return Runs, ()


class Run:
    """The forward pass that is under way in a thread, if any.

    Attributes:
        active: Whether a forward is under way.
        carry: What is known about the tokens now; None before the first block that looks.
        last: What the last block so far gave out, where every patch is to have a value again.
        every_patch: Whether it is, in this forward; see `Carry`.
        prefix_alone: Whether nothing else is asked for, in this forward; see `Carry`.
        grid: Patch rows and columns of the images of this forward.
        readings: Where some patches are read coarsely, from the patch embedding until they join:
            the embeddings of the patches, `[B, N, C]`, and those of the regions at half the
            resolution, `[B, rows // 2, columns // 2, C]`, both without positions.
        observer: Receives each reduction while tracing; see `mergence.tracing`.
        clock: Told of the end of each part of a forward while profiling; see `mergence.profiling`.
        disabled: Run the model as if nothing were applied: whether a block of `disabled` is open.
        head: What a head outside of the tower makes of its tokens; see `under`.
    """

    def __init__(self) -> None:
        # Class attributes would do, but compiled code would then be guarded by their absence from
        # the instance, which ends with the first forward.
        self.active: bool = False
        self.carry: Carry | None = None
        self.last: Tensor | None = None
        self.every_patch: bool = False
        self.prefix_alone: bool = False
        self.grid: tuple[int, int] | None = None
        self.readings: tuple[Tensor, Tensor] | None = None
        self.observer: Any = None
        self.clock: Callable[[str], None] | None = None
        self.disabled: bool = False
        # Apart from it, because compiled code is guarded by what it looks at, and would be made
        # again for each depth.
        self._open: int = 0
        self.head: Head | None = None

    @contextmanager
    def forward(
        self, grid: tuple[int, int], *, every_patch: bool = False, prefix_alone: bool = False
    ) -> Iterator[Run]:
        """Mark a model's forward; inner calls join the outer one, and begin anew with their image.

        The run is reset on entry and on exit, so that nothing of an earlier forward, also of one
        that failed, can reach a later one. What the outer call asks for goes for inner ones.

        Args:
            grid: Patch rows and columns.
            every_patch: Whether what it gives out may be asked for a value for every patch.
            prefix_alone: Whether what it gives out is made of the prefix tokens alone.
        """
        joins = self.active
        self.active, self.carry, self.grid = True, None, grid
        self.readings, self.last = None, None
        if joins:
            yield self  # and leaves what is known of its tokens to the head
            return
        self.every_patch = every_patch
        self.prefix_alone = prefix_alone and self.observer is None
        if self.observer is not None:
            self.observer.grid = grid
        try:
            yield self
        finally:
            self.active, self.carry, self.grid, self.readings = False, None, None, None
            self.every_patch, self.prefix_alone, self.last = False, False, None

    @contextmanager
    def under(self, head: Head) -> Iterator[None]:
        """Mark the forward of a model whose head is outside of its tower.

        Args:
            head: `mean` takes the plain mean of the patch tokens; the tower then hands its tokens
                out times their sizes, so that this mean is by size. `prefix` reads prefix tokens.
                `sized` reads the tokens as they are, each as often as its size.
        """
        self.head = head
        try:
            yield
        finally:
            self.head = None

    def disable(self) -> None:
        """Open a block of `disabled`."""
        self._open += 1
        self.disabled = True

    def enable(self) -> None:
        """Close one, whichever: coroutines and generators close them in any order."""
        self._open -= 1
        self.disabled = self._open > 0

    def lap(self, part: str) -> None:
        """Say that all since the last lap was this part of the forward; see `profiling.PARTS`."""
        if self.clock is not None:
            self.clock(part)

    def known(self) -> Carry | None:
        """What is known about the tokens now; before any reduction, that they are all there."""
        if self.carry is None and self.grid is not None:
            patches = self.grid[0] * self.grid[1]
            return Carry(
                patches,
                self.grid,
                every_patch=self.every_patch,
                prefix_alone=self.prefix_alone,
            )
        return self.carry

    def known_after(self, norm: Callable[[Tensor], Tensor] | None) -> Carry | None:
        """What is known about tokens that passed a norm after the last block."""
        known = self.known()
        if known is None or not known.merges or self.last is None or norm is None:
            return known
        return replace(known, unnormed=(self.last, norm))


def attach(x: Tensor, carry: Carry | None) -> None:
    """Let a tensor remember its carry. Compiled code keeps to the run and does nothing here."""
    if carry is not None and not torch.compiler.is_compiling():
        setattr(x, _ATTRIBUTE, carry)


def attach_dense(x: Tensor) -> None:
    """Let a tensor of `disabled` remember that it is whole."""
    if not torch.compiler.is_compiling():
        setattr(x, _DENSE, True)


def attached_dense(x: Tensor) -> bool:
    """Whether a tensor is whole, as one of `disabled`."""
    return hasattr(x, _DENSE)


def attached(x: Tensor) -> Carry | None:
    """The carry that a tensor remembers; one from a file remembers none."""
    return getattr(x, _ATTRIBUTE, None) or None
