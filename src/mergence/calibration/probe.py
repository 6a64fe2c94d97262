"""Measuring how far a reduced model's answers are from the dense model's, on fixed images."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mergence import family
from mergence.api import applied
from mergence.distances import Distance, compared
from mergence.evaluation import patches_in
from mergence.method import Method
from mergence.outputs import answer
from mergence.recipe import Recipe
from mergence.schedule import Counts


class Probe:
    """A dense model's answers to some images, and what each of its blocks gave out.

    Blocks before the first reduction see the same tokens whatever follows, so that work is done
    once: a measurement starts at the block that reduces first.

    Attributes:
        patches: Patches of an image.
        images: How many images there are.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Tensor], *, memory: int = 2 << 30
    ) -> None:
        """Run the dense model.

        Args:
            model: A model without a reduction, in evaluation mode.
            batches: Images on the model's device and in its type, all of one size.
            memory: Bytes to spend on remembered tokens. Batches that find no room any more are
                measured from the first block on.
        """
        self._model, self._batches = model, batches
        self._blocks = family.spec_of(model).blocks
        self._dense: list[Tensor] = []
        self._outputs: list[list[Any]] = []
        self.images = sum(map(len, batches))
        self.patches = patches_in(model, batches[0])
        for batch in batches:
            dense, outputs = self._run_dense(batch)
            memory -= sum(x.numel() * x.element_size() for x in map(answer, outputs))
            self._dense.append(dense)
            self._outputs.append(outputs if memory >= 0 else [])

    def mean(
        self,
        distance: Distance,
        method: Method,
        counts: Sequence[int],
        images: int | None = None,
    ) -> float:
        """Mean distance over the first images.

        Args:
            distance: What to measure.
            method: The method.
            counts: Patch tokens after each block.
            images: How many images to measure, rounded up to whole batches; None takes all.
        """
        first = 0
        if not method.coarse:
            first = next((i for i, n in enumerate(counts) if n < self.patches), len(counts))
        # Images of another size than the model's own have counts of their own, too.
        schedule = Counts(after=tuple(counts), of=self.patches)
        recipe, done, total = Recipe(method, schedule), 0, 0.0
        whose = f"The model with the method '{method.name}'"
        with torch.inference_mode(), applied(self._model, recipe):
            for batch, dense, outputs in zip(
                self._batches, self._dense, self._outputs, strict=True
            ):
                if images is not None and done >= images:
                    break
                with _resumed(self._blocks, outputs, first):
                    reduced = compared(self._model(batch), whose)
                total += float(distance(dense, reduced).sum())
                done += len(batch)
        return total / done

    @torch.inference_mode()
    def _run_dense(self, batch: Tensor) -> tuple[Tensor, list[Any]]:
        outputs: list[Any] = []

        def remember(block: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            outputs.append(output)

        with ExitStack() as hooks:
            for block in self._blocks:
                hooks.enter_context(_removed(block.register_forward_hook(remember)))
            return compared(self._model(batch), "The dense model"), outputs


@contextmanager
def _removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _resumed(blocks: Sequence[nn.Module], outputs: Sequence[Any], first: int) -> Iterator[None]:
    """Let the blocks before `first` hand on what the dense model's blocks did, without computing.

    Their `forward` is covered on the instance, which every library's way of calling blocks honours.
    """
    skipped = list(zip(blocks[:first], outputs, strict=False))  # outputs may not be remembered
    try:
        for block, output in skipped:
            block.__dict__["forward"] = lambda *_, _output=output, **__: _output
        yield
    finally:
        for block, _ in skipped:
            block.__dict__.pop("forward", None)
