"""Training images in steps: which image comes when, to which process, and how it is augmented."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.utils.data import DataLoader, Dataset

from mergence.data import Batch, ImageData, Sample, Skipped, collate
from mergence.train.seeding import seed_at, seeded
from mergence.train.signals import Readers, outlive_first

Key = tuple[int, int]
"""Epoch and index of an image: how it is augmented depends on both."""


@dataclass(frozen=True)
class Seat:
    """The place of this process among those that train together."""

    rank: int = 0
    world: int = 1


class _Augmented(Dataset[Sample | Skipped]):
    """Images by epoch and index, with random transforms that depend on nothing else."""

    def __init__(self, data: ImageData, seed: int) -> None:
        self.data = data
        self.seed = seed

    def __getitem__(self, key: Key) -> Sample | Skipped:
        with seeded(self.seed, "image", *key):
            return self.data[key[1]]


@dataclass
class _Keys:
    """The batches of the epoch under way, for a loader that outlives it."""

    now: Iterable[list[Key]] = ()

    def __iter__(self) -> Iterator[list[Key]]:
        return iter(self.now)


@dataclass(frozen=True)
class Feed(Readers):
    """A collection in steps of one global batch, of which each process takes its part.

    The order of an epoch depends on the seed and the epoch only. The images of a step are dealt out
    to the processes, so every image is seen exactly once an epoch by exactly one of them: the last
    step is smaller, none is repeated to fill it up and none is left out. All processes get the same
    number of pieces, some of which may be empty, so that they stay in step.

    Attributes:
        data: The images.
        batch_size: Images of one step, over all processes and pieces.
        pieces: How many batches, at most, a process takes for its part of a step.
        shuffle: Draw a new order each epoch.
        seed: Seed of the order and of the transforms.
        seat: Which part is ours.
        workers: Processes that read images.
    """

    data: ImageData
    batch_size: int
    pieces: int = 1
    shuffle: bool = True
    seed: int = 0
    seat: Seat = Seat()
    workers: int = 0

    @property
    def steps(self) -> int:
        """Steps of an epoch."""
        return -(-len(self.data) // self.batch_size)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """The pieces of each step of an epoch, from step `start` on."""
        order = self._order(epoch)
        plan = (self._pieces(order, step) for step in range(start, self.steps))
        self._keys.now = ([(epoch, i) for i in piece] for pieces in plan for piece in pieces)
        batches = iter(self._loader)
        self._readers[:] = [batches]
        for step in range(start, self.steps):
            yield [next(batches) for _ in self._pieces(order, step)]

    @cached_property
    def _keys(self) -> _Keys:
        return _Keys()

    @cached_property
    def _loader(self) -> DataLoader[Sample | Skipped]:
        """What reads for every epoch: starting workers anew would cost short epochs dearly."""
        return DataLoader(
            _Augmented(self.data, self.seed),
            batch_sampler=self._keys,
            num_workers=self.workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=outlive_first,
            persistent_workers=self.workers > 0,
        )

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffle:
            return list(range(len(self.data)))
        generator = torch.Generator().manual_seed(seed_at(self.seed, "order", epoch))
        order: list[int] = torch.randperm(len(self.data), generator=generator).tolist()
        return order

    def _pieces(self, order: list[int], step: int) -> list[list[int]]:
        """The indices of our part of a step, in as many pieces as every other process has."""
        all_ = order[step * self.batch_size : (step + 1) * self.batch_size]
        pieces = min(self.pieces, -(-len(all_) // self.seat.world))
        ours = all_[self.seat.rank :: self.seat.world]
        return [ours[piece::pieces] for piece in range(pieces)]
