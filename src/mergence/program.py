"""What is applied to a model, and how it begins: the schedule, its MACs, and coarse patches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mergence import coarse, ops, surgery
from mergence.arguments import is_number
from mergence.errors import MergenceError, OptionError, ReducedOutputError, ScheduleError
from mergence.macs import Macs, ModelCost, ReductionCost, count
from mergence.method import Method
from mergence.plan import MergePlan
from mergence.schedule import Schedule
from mergence.setting import Setting
from mergence.state import Carry, Merge, Run, Runs


@dataclass(frozen=True)
class Program:
    """Everything the blocks of one model need to know: fixed when a method is applied.

    Attributes:
        method: The method.
        schedule: How many tokens stay.
        align: Multiple that token counts are rounded to; None leaves it to the device.
        device: Type of the device that the model was on when the method was applied.
        dtype: The type that its weights had then.
        cost: What the model's MACs depend on.
        patches: Patches at the model's own input size.
        class_token: Whether a class token says what matters; where not, the mean of all queries.
        coarse: Whether the schedule may read some of them coarsely where the method leaves it open.
        learned: MACs of the method's learned module as a function of tokens, or None.
        notes: What the recipe says of itself.
        runs: The state of the forward that is under way, in each thread.
    """

    method: Method
    schedule: Schedule
    align: int | None
    device: str
    dtype: torch.dtype
    cost: ModelCost
    patches: int
    class_token: bool
    coarse: bool = False
    learned: Callable[[int], int] | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)
    runs: Runs = field(default_factory=Runs)
    _tokens: dict[int, tuple[int, ...]] = field(default_factory=dict)

    @property
    def run(self) -> Run:
        """The state of the forward that is under way in this thread."""
        return self.runs.here

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.cost.blocks)

    @property
    def prefix(self) -> int:
        """Number of prefix tokens."""
        return self.cost.prefix

    @property
    def multiple(self) -> int:
        """The multiple that token counts are rounded to."""
        return self.align or self.schedule.align_on(self.device, self.dtype)

    def tokens(self, patches: int | None = None) -> tuple[int, ...]:
        """Patch tokens that enter the first block and those left after each.

        Args:
            patches: Patches of the image; None is the model's own input size.

        Raises:
            ScheduleError: The schedule cannot be carried out at this number of patches.
        """
        # Sizes are tensors while torch.jit traces.
        patches = self.patches if patches is None else int(patches)
        if patches not in self._tokens:
            tokens = self._resolved(patches)
            if patches != self.patches:
                self._check_learned(patches, tokens)
            self._tokens[patches] = tokens
        return self._tokens[patches]

    def _resolved(self, patches: int) -> tuple[int, ...]:
        setting = self.setting(patches)
        try:
            return self.schedule.tokens(setting)
        except ScheduleError:
            if patches == self.patches:
                raise
        if self.align is None and self.multiple > 1:
            # An image so small that what the device is fast at leaves no choice of counts.
            return replace(self, align=1)._resolved(patches)
        # Or that no schedule meets a budget, which is no reason to fail in the midst of others.
        return self.schedule.strongest(setting)

    def counts(self, patches: int | None = None) -> tuple[int, ...]:
        """Patch tokens after each block; see `tokens`."""
        return self.tokens(patches)[1:]

    @property
    def reduces(self) -> bool:
        """Whether any token leaves at the model's own input size."""
        return min(self.tokens()) < self.patches

    def setting(self, patches: int) -> Setting:
        """What schedules are resolved for, for images of so many patches."""
        dense = self.macs(patches, dense=True).total
        share = self.method.coarse
        return Setting(
            tokens=coarse.tokens_left(share or 0.0, patches),
            patches=patches,
            own=self.patches,
            fewer=self._fewer(patches) if self.coarse and share is None else (),
            depth=self.depth,
            prefix=self.prefix,
            align=self.multiple,
            fewest=self.method.fewest_slots,
            share=lambda tokens: self._macs_at(patches, tokens).total / dense,
        )

    def _fewer(self, patches: int) -> tuple[int, ...]:
        """With how many tokens the first block can start when up to half of an image is coarse."""
        tokens = coarse.tokens_left(0.5, patches)
        starts = range(patches - (coarse.SIDE**2 - 1), tokens - 1, 1 - coarse.SIDE**2)
        return tuple(n for n in starts if (n + self.prefix) % self.multiple == 0)

    @property
    def needs(self) -> frozenset[str]:
        """What a reduction computes for its method, and for the places of merged tokens."""
        return self.method.needs | ({"importance"} if self.cost.placed else set())

    @property
    def reduction(self) -> ReductionCost:
        """What each reduction costs."""

        def plan(tokens: int, slots: int) -> int:
            sizes = self.cost.dim, self.cost.head_dim
            return self._counted("plan_macs", self.method.plan_macs, tokens, slots, *sizes)

        learned = self.learned and partial(self._counted, "learned(dim).macs", self.learned)
        return ReductionCost(self.needs, plan, learned)

    def _counted(self, name: str, count: Callable[..., int], *given: int) -> int:
        """What a method counts, on which schedules rely."""
        macs = count(*given)
        if not is_number(macs) or macs < 0:
            raise OptionError(
                f"{type(self.method).__name__}.{name}({', '.join(map(str, given))}) gives "
                f"{macs!r}; give the multiply-adds for one image, a number of at least 0."
            )
        return macs

    def macs(self, patches: int | None = None, *, dense: bool = False) -> Macs:
        """MACs of one image, of the reduced or of the dense model."""
        patches = self.patches if patches is None else patches
        return count(self.cost, patches) if dense else self._macs_at(patches, self.tokens(patches))

    def share(self, patches: int) -> float:
        """MACs of one image of so many patches as a share of the dense model's."""
        return self.macs(patches).total / self.macs(patches, dense=True).total

    def _macs_at(self, patches: int, tokens: tuple[int, ...]) -> Macs:
        return count(self.cost, patches, tokens, self.reduction)

    def _check_learned(self, patches: int, tokens: tuple[int, ...]) -> None:
        """A learned module sits in one block and must meet the first reduction there."""
        first, home = _first_reduction(tokens), self.first_reduction()
        if self.learned is not None and first is not None and first != home:
            raise ScheduleError(
                f"For images of {patches} patches the first reduction is in block {first + 1}, and "
                "the method's learned module was put elsewhere for the model's own "
                f"{self.patches} patches. Give a schedule with fixed blocks, such as KeepRate."
            )

    def first_reduction(self) -> int | None:
        """Index of the first block that reduces at the model's own input size, or None."""
        return _first_reduction(self.tokens())

    def merged(
        self, x: Tensor, size: Tensor, carry: Carry, plan: MergePlan
    ) -> tuple[Tensor, Carry]:
        """Carry out a plan and keep the books.

        Args:
            x: `[B, P + N, C]` prefix and patch tokens.
            size: `[B, N]` float32, how many patches each patch token stands for.
            carry: What else is known about them.
            plan: The plan.

        Returns:
            `[B, P + slots, C]` and what is known about these tokens.
        """
        merged, size = ops.merge(x, size, plan, self.prefix)
        merge = Merge(plan.slot)
        if carry.every_patch:
            merge = Merge.of(plan.slot, x[:, self.prefix :], merged[:, self.prefix :])
        factor = self.method.size_attention
        bias = _size_bias(size, self.prefix, x.dtype, factor) if factor else None
        return merged, replace(carry, size=size, bias=bias, merges=(*carry.merges, merge))

    def read(
        self,
        image: Tensor,
        fine: Tensor,
        embed: Callable[[Tensor], Tensor],
        patch: tuple[int, int],
    ) -> None:
        """Embed an image at half its resolution as well, where some patches are read coarsely.

        Args:
            image: `[B, C, H, W]` what the patch embedding was given.
            fine: `[B, C, rows, columns]` what it made of it.
            embed: From an image to such embeddings.
            patch: Height and width of a patch in pixels.

        Raises:
            ScheduleError: The image has fewer regions of four patches than are to be coarse.
        """
        grid = int(fine.shape[-2]), int(fine.shape[-1])
        regions = self._coarse_regions(grid[0] * grid[1])
        if not regions:
            return
        there = grid[0] // coarse.SIDE * (grid[1] // coarse.SIDE)
        if regions > there:
            raise ScheduleError(
                f"{regions} regions of 2 x 2 patches are to be read coarsely, and {grid[0]} x "
                f"{grid[1]} patches hold {there}. Give a smaller share, or 0, as coarse."
            )
        half = embed(coarse.halved(image, grid, patch)).permute(0, 2, 3, 1)
        # Channels last in memory, so that what compares the two goes along it.
        self.run.readings = fine.flatten(2).transpose(1, 2).contiguous(), half.contiguous()

    def coarsened(
        self,
        x: Tensor,
        norm: Callable[[Tensor], Tensor] | None = None,
        stem: nn.Module | None = None,
    ) -> Tensor:
        """Join the patches that are read coarsely, before the first block.

        Args:
            x: `[B, P + N, C]` prefix and patch tokens, with positions.
            norm: What the model does to the embedding of a patch before it adds its position.
            stem: What embeds its patches now, to check that it is still the module that `read`.

        Returns:
            `[B, P + n, C]`: tokens of one patch or of four. Their books are in the run.

        Raises:
            ReducedOutputError: The images did not pass the patch embedding that `read` them.
        """
        run, regions = self.run, self._coarse_regions(x.shape[1] - self.prefix)
        if not regions:
            return x
        known = run.known()
        same = stem is None or surgery.is_swapped(stem)
        if run.readings is None or run.grid is None or known is None or not same:
            raise ReducedOutputError(
                "Some patches are to be read coarsely, and what embeds the images is not the patch "
                "embedding that the model had when mergence was applied. If adapters were put "
                "around it or the model's was exchanged since, apply again."
            )
        fine, half = run.readings if norm is None else map(norm, run.readings)
        run.readings = None
        with without_autocast(x):
            change = coarse.difference(fine, half, run.grid)
            plan, chosen, loss = coarse.plan(change, run.grid, regions)
            # Each patch of a chosen region takes its embedding; their mean has the mean position.
            patches = x[:, self.prefix :] + change * chosen.unsqueeze(2).to(x.dtype)
            x = torch.cat((x[:, : self.prefix], patches), dim=1)
            x, run.carry = self.merged(x, plan.weight, known, plan)
        if run.observer is not None:
            run.observer.reduced(0, run.carry, plan, coarse.spread(loss, run.grid).exp())
        return x

    def _coarse_regions(self, patches: int) -> int:
        """How many regions the forward that is under way reads coarsely."""
        reads = self.run.active and not self.run.disabled
        return coarse.regions_in(self.tokens(patches)[0], patches) if reads else 0


def without_autocast(x: Tensor) -> AbstractContextManager[object]:
    """A context in which what is made of a tensor keeps its type.

    The meta device, on which tools find out shapes, knows no autocast.
    """
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def _first_reduction(tokens: tuple[int, ...]) -> int | None:
    return next((i for i, n in enumerate(tokens[1:]) if n < tokens[0]), None)


def program_of(model: nn.Module) -> Program:
    """The program that is applied to a model.

    Raises:
        MergenceError: The model is not reduced.
    """
    program = surgery.attachment(model)
    if not isinstance(program, Program):
        inside = [n for n, m in model.named_modules() if isinstance(surgery.attachment(m), Program)]
        hint = (
            f"Its part '.{inside[0]}' is: pass that, or apply to the whole."
            if inside
            else "Apply first: mergence.apply(model, macs=0.67)."
        )
        raise MergenceError(f"This {type(model).__name__} is not reduced. {hint}")
    return program


def require_own(program: Program, parent: nn.Module) -> None:
    """Check that what is reduced directly in a module is reduced by this program.

    Raises:
        ReducedOutputError: It is by another, whose run would know nothing of this one's.
    """
    if program.run.disabled:
        return
    for name, part in parent._modules.items():
        held = getattr(part, surgery.ATTACHMENT, None)
        if held is not None and getattr(held, "program", held) is not program:
            raise ReducedOutputError(
                f"The '{name}' of this {surgery.original_class(parent).__name__} is reduced, but "
                "not together with the model around it: it was copied by itself, as peft's "
                "modules_to_save does, or it is shared and was reduced since through another "
                "model. Apply to this model again: "
                "mergence.apply(model, mergence.recipe_of(model))."
            )


def require_images_alone(model: nn.Module) -> None:
    """Refuse a model whose forward takes something else before images, such as text.

    Raises:
        MergenceError: It does; with images alone it would take them for that.
    """
    first, *others = [*inspect.signature(model.forward).parameters, ""]
    if "pixel_values" not in others:
        return
    held = [name for name, part in model.named_modules() if name and surgery.attachment(part)]
    tower = f"model.{held[0]}, which is reduced with it" if held else "its image tower"
    raise MergenceError(
        f"A {surgery.original_class(model).__name__} takes {first} before images, and would be "
        f"called with images alone here. Give {tower}."
    )


def runs_in(model: nn.Module) -> set[Run]:
    """The runs in this thread of all programs in a model."""
    held = map(surgery.attachment, model.modules())
    programs = (getattr(one, "program", one) for one in held)  # that of a block's step, or one
    return {program.run for program in programs if isinstance(program, Program)}


def _size_bias(size: Tensor, prefix: int, dtype: torch.dtype, factor: float) -> Tensor:
    bias = nn.functional.pad(size, (prefix, 0), value=1.0).log()
    bias = bias if factor == 1 else factor * bias
    return bias.to(dtype)[:, None, None, :]
