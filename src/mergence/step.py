"""One reduction: ask the method, merge, and keep the books."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from mergence import ops
from mergence.errors import PlanError, ReducedOutputError
from mergence.importance import attention_from, attention_received
from mergence.macs import without_unread
from mergence.plan import MergePlan, TokenView
from mergence.program import Program, without_autocast
from mergence.state import Carry, attach, attach_dense, attached, attached_dense


@dataclass(frozen=True)
class BlockStep:
    """The part of a program that one block carries out.

    Attributes:
        program: The program.
        index: The block's place, counted from 0.
    """

    program: Program
    index: int
    _slots: dict[tuple[int, bool], int | None] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        self.slots(Carry(self.program.patches))
        self.slots(Carry(self.program.patches, prefix_alone=True))

    def disabled(self, x: Tensor) -> bool:
        """Whether the block runs as the library's own: in `mergence.disabled`.

        Gradient checkpointing may call it again when that is over, with the same tokens, in the
        middle of a backward.
        """
        run = self.program.run
        if run.disabled:
            attach_dense(x)
            return True
        return not run.active and attached_dense(x) and torch._C._current_graph_task_id() != -1

    def enter(self, x: Tensor) -> Carry:
        """What is known about the tokens that enter the block.

        Raises:
            ReducedOutputError: The block was called by itself with tokens that cannot be placed,
                or no patch was read coarsely where some were to be.
        """
        run = self.program.run
        known = run.known() or attached(x)
        if known is None:
            program = self.program
            if program.tokens()[self.index] < program.patches:
                raise ReducedOutputError(
                    f"Block {self.index + 1} of a reduced model was called by itself, and the "
                    "sizes of its tokens are not known. Call the model's forward or "
                    "forward_features, or use mergence.disabled(model) to run single blocks. "
                    "Gradient checkpointing must be that with use_reentrant=False."
                )
            known = Carry(patches=x.shape[1] - self.program.prefix)
        if known.size is None:
            patches = int(known.patches)  # sizes are tensors while torch.jit traces
            if (tokens := self.program.tokens(patches)[0]) < patches:
                raise ReducedOutputError(
                    f"{tokens} tokens of {patches} patches were to enter the first block, and none "
                    "was read coarsely. If the model's patch embedding or what follows it was "
                    "exchanged since mergence was applied, apply again. A family that says "
                    "coarse=True must call program.read and program.coarsened: see "
                    "docs/extending/add-a-family.md."
                )
        # Gradient checkpointing may call this block again when the run is long over, and libraries
        # hand out the tokens between blocks.
        attach(x, known)
        return known

    def slots(self, carry: Carry) -> int | None:
        """How many patch tokens the block leaves, or None where it removes none.

        0 in the last block, where nobody reads them.
        """
        patches = int(carry.patches)  # sizes are tensors while torch.jit traces
        # Kept, so that blocks that are compiled one by one share what was compiled: code that looks
        # at the index would be made for each.
        key = patches, carry.prefix_alone
        if key not in self._slots:
            tokens: Sequence[int] = self.program.tokens(patches)
            if carry.prefix_alone:
                tokens = without_unread(tokens, patches)
            before, after = tokens[self.index :][:2]
            self._slots[key] = after if after < before else None
        return self._slots[key]

    def leave(self, x: Tensor, carry: Carry) -> None:
        """Hand the books to the next block."""
        run = self.program.run
        if run.active:
            run.carry = carry
            run.last = x if carry.every_patch else None
        attach(x, carry)

    def reduce(
        self,
        x: Tensor,
        q: Tensor,
        k: Tensor,
        scale: float,
        carry: Carry,
        slots: int,
        learned: nn.Module | None = None,
        pairs: Tensor | None = None,
    ) -> tuple[Tensor, Carry]:
        """Reduce the tokens between attention and MLP.

        Args:
            x: `[B, P + N, C]` prefix and patch tokens.
            q: `[B, H, P + N, D]` the queries that the block's attention used.
            k: `[B, H, P + N, D]` its keys.
            scale: The factor on its logits.
            carry: What is known about the tokens.
            slots: How many patch tokens to leave. For none there is nothing to plan.
            learned: The method's learned module, at the first reduction.
            pairs: What the attention added to its logits besides the sizes, `[H, P + N, P + N]`
                or one for each image, or None.

        Returns:
            `[B, P + slots, C]` and what is known about these tokens.
        """
        method, prefix, run = self.program.method, self.program.prefix, self.program.run
        class_token = self.program.class_token
        if not slots:
            return x[:, :prefix], carry
        if x.shape[1] != prefix + carry.tokens:
            raise ReducedOutputError(
                f"Block {self.index + 1} has {x.shape[1]} tokens where {prefix} prefix tokens and "
                f"{carry.tokens} of patches are known. If the model puts others beside them, such "
                "as learned prompts, its number of prefix tokens must count them, and they come "
                "first."
            )
        if learned is not None:
            if carry.grid is None:
                raise ReducedOutputError(
                    f"Block {self.index + 1} was called by itself, and its learned module needs "
                    "the patch grid. Call the model's forward or forward_features."
                )
            prepared = _prepared(learned(x[:, prefix:], carry.grid), x[:, prefix:], method.name)
            x = torch.cat((x[:, :prefix], prepared), dim=1)
            run.lap("learned")
        patches, size = x[:, prefix:], carry.size
        if size is None:
            size = torch.ones(patches.shape[:2], dtype=torch.float32, device=x.device)
        # Autocast would turn the merge's output, and so the residual stream, to half precision.
        with without_autocast(x):
            importance = keys = received = None
            added = row = carry.bias
            if pairs is not None:
                added = pairs if carry.bias is None else pairs + carry.bias
                row = added[..., :1, :] if class_token else added.mean(dim=-2, keepdim=True)
            if "importance" in self.program.needs or run.observer is not None:
                query = q[:, :, :1] if class_token else q.mean(dim=2, keepdim=True)
                importance = attention_from(query, k, scale, row)[:, prefix:]
            if "keys" in method.needs:
                keys = k[:, :, prefix:].mean(dim=1)
            if "received" in method.needs:
                received = attention_received(q, k, scale, added)[:, prefix:]
            run.lap("scoring")
            block, depth = self.index + 1, self.program.depth
            view = TokenView(patches, size, block, depth, importance, keys, received)
            versions = _versions(view)
            plan = _checked(method.plan(view, slots), view, slots, method.name)
            if _versions(view) != versions:
                raise PlanError(
                    f"Method '{method.name}' changed the tokens or their sizes in place while it "
                    "planned, and so the model. Work on copies: x.sub(y) or x.clone().sub_(y), not "
                    "x.sub_(y)."
                )
            run.lap("planning")
            # In one graph values cannot be looked at.
            if run.observer is not None and not torch.compiler.is_compiling():
                run.observer.planned(block, plan)
            merged, after = self.program.merged(x, size, carry, plan)
            if self.program.cost.placed and importance is not None:
                position = ops.most_important(plan, importance)
                if carry.position is not None:
                    position = carry.position.gather(1, position)
                after = replace(after, position=position)
        run.lap("merging")
        if run.observer is not None:
            run.observer.reduced(self.index + 1, after, plan, importance)
        return merged, after


def _prepared(y: Any, x: Tensor, method: str) -> Tensor:
    """What a learned module made of the tokens, which the model goes on with."""
    # Under autocast it may be of half precision; beside the prefix tokens it is not any more.
    if (
        isinstance(y, Tensor)
        and y.shape == x.shape
        and torch.promote_types(y.dtype, x.dtype) == x.dtype
    ):
        return y
    found = f"{list(y.shape)} of {y.dtype}" if isinstance(y, Tensor) else type(y).__name__
    raise PlanError(
        f"The learned module of method '{method}' gives {found}; it must give tokens such as it "
        f"takes, {list(x.shape)} of {x.dtype}."
    )


def _versions(view: TokenView) -> list[int]:
    """How often the tokens and sizes were changed in place, as far as torch counts that."""
    if torch.compiler.is_compiling():
        return []
    return [x._version for x in (view.x, view.size) if not x.is_inference()]


def _checked(plan: Any, view: TokenView, slots: int, method: str) -> MergePlan:
    """A method's plan, of whose shapes everything else is made."""
    if not isinstance(plan, MergePlan):
        raise PlanError(f"Method '{method}' made a {type(plan).__name__} in place of a MergePlan.")
    if plan.slots != slots:
        raise PlanError(f"Method '{method}' made {plan.slots} slots where {slots} were asked for.")
    parts: tuple[tuple[str, Any], ...] = (("slot", plan.slot), ("weight", plan.weight))
    for name, value in parts:
        if not isinstance(value, Tensor):
            raise PlanError(
                f"Method '{method}' made a plan whose {name} is a {type(value).__name__}; give a "
                "tensor."
            )
        if value.shape != view.size.shape:
            raise PlanError(
                f"Method '{method}' made a plan whose {name} is {list(value.shape)}; it must be "
                f"{list(view.size.shape)}, one number for each token of each image."
            )
    if plan.slot.dtype != torch.int64:
        raise PlanError(f"Method '{method}' made slots of {plan.slot.dtype}; give int64.")
    if not plan.weight.is_floating_point():
        raise PlanError(f"Method '{method}' made weights of {plan.weight.dtype}; give floats.")
    return plan
