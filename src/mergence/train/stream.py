"""Streams in steps: shards dealt out to processes and workers, each image to exactly one."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mergence.classes import match_classes
from mergence.data import Batch, Sample, Skipped, collate, open_image
from mergence.errors import DataError
from mergence.sources import decode
from mergence.train.feed import Seat
from mergence.train.seeding import seed_at, seeded
from mergence.train.shards import Encoded, Shards, open_shards
from mergence.train.signals import Readers, outlive_first

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class StreamData:
    """A stream with what becomes of its images.

    Attributes:
        shards: Where encoded images come from.
        size: Images of one pass; 0 where nobody knows.
        class_names: What the class indices stand for.
        classes: The class index of each label of the stream.
        transform: Turns a PIL image into the tensor the model takes.
        mode: PIL mode to convert to.
    """

    shards: Shards
    size: int
    class_names: tuple[str, ...]
    classes: list[int]
    transform: Callable[[Image], Tensor]
    mode: str

    @property
    def labels(self) -> list[int]:
        """The classes: a stream always has labels."""
        return self.classes

    def __len__(self) -> int:
        return self.size

    def sample(self, item: Encoded | Skipped, seed: int, epoch: int) -> Sample | Skipped:
        """Decode and transform one image, in a way that depends on its name and the epoch."""
        if isinstance(item, Skipped):
            return item
        image = open_image(item.name, lambda: decode(item.image), self.mode)
        if isinstance(image, Skipped):
            return image
        if not 0 <= item.label < len(self.classes):
            raise DataError(
                f"'{item.name}' of '{self.shards.name}' has the label {item.label}, and there are "
                f"{len(self.classes)} classes. Use the data that the model was made for."
            )
        with seeded(seed, "image", epoch, item.name):
            return Sample(self.transform(image), self.classes[item.label], item.name)


def open_stream(
    path: str,
    *,
    transform: Callable[[Image], Tensor],
    mode: str,
    class_names: tuple[str, ...] | None = None,
    num_classes: int | None = None,
    size: int | None = None,
) -> StreamData:
    """Open a stream and check it against the model's classes.

    Args:
        path: See `mergence.train.shards.open_shards`.
        transform: Turns a PIL image into the tensor the model takes.
        mode: PIL mode to convert to.
        class_names: The model's label names.
        num_classes: Its number of classes, where it has no names.
        size: Images of one pass, where the stream does not know.

    Raises:
        DataError: The stream cannot be opened or its classes do not fit.
    """
    shards = open_shards(path)
    size = size or shards.size or 0
    if shards.class_names is not None:
        names, order = match_classes(shards.class_names, class_names, num_classes, path)
        return StreamData(shards, size, tuple(names), list(order), transform, mode)
    if class_names is None and num_classes is None:
        raise DataError(f"'{path}' does not name its classes, so it cannot make a new head.")
    names = class_names or tuple(map(str, range(num_classes or 0)))
    return StreamData(shards, size, tuple(names), list(range(len(names))), transform, mode)


@dataclass(frozen=True)
class _Reader(IterableDataset[Batch | DataError]):
    """What one worker of one process reads, in batches; the last one may be smaller.

    Shards are dealt out to all workers of all processes where there are enough of them; otherwise
    each reads all and keeps every so manieth image.

    Attributes:
        feed: What is read.
        epoch: The epoch, which decides on order and transforms.
        start: Batches of this process that need not be decoded any more.
    """

    feed: StreamFeed
    epoch: int
    start: int

    def __iter__(self) -> Iterator[Batch | DataError]:
        feed, info = self.feed, get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        reader, readers = feed.seat.rank * workers + worker, feed.seat.world * workers
        items = self._shuffled(self._mine(reader, readers), reader)
        # Batches come from the workers in turns, so of each at least so many are behind us.
        behind = self.start // workers
        held: list[Encoded | Skipped] = []
        for item in items:
            held.append(item)
            if len(held) == feed.piece:
                yield self._batch(held, decoded=behind <= 0)
                behind -= 1
                held = []
        if held:
            yield self._batch(held, decoded=True)

    def _batch(self, items: list[Encoded | Skipped], *, decoded: bool) -> Batch | DataError:
        if not decoded:
            return collate([])
        data, seed = self.feed.data, self.feed.seed
        try:
            return collate([data.sample(item, seed, self.epoch) for item in items])
        except DataError as error:  # raised here, it would come with a worker's whole traceback
            return error

    def _mine(self, reader: int, readers: int) -> Iterator[Encoded | Skipped]:
        shards, feed = self.feed.data.shards, self.feed
        order = list(range(len(shards)))
        if feed.shuffle:
            random.Random(seed_at(feed.seed, "shards", self.epoch)).shuffle(order)
        if len(order) >= readers:
            for shard in order[reader::readers]:
                yield from shards.read(shard)
            return
        everything = (item for shard in order for item in shards.read(shard))
        yield from (item for number, item in enumerate(everything) if number % readers == reader)

    def _shuffled(
        self, items: Iterator[Encoded | Skipped], reader: int
    ) -> Iterator[Encoded | Skipped]:
        if not self.feed.shuffle:
            yield from items
            return
        draw = random.Random(seed_at(self.feed.seed, "buffer", self.epoch, reader))
        buffer: list[Encoded | Skipped] = []
        for item in items:
            buffer.append(item)
            if len(buffer) > self.feed.buffer:
                place = draw.randrange(len(buffer))
                buffer[place], buffer[-1] = buffer[-1], buffer[place]
                yield buffer.pop()
        draw.shuffle(buffer)
        yield from buffer


@dataclass(frozen=True)
class StreamFeed(Readers):
    """A stream in steps; see `mergence.train.feed.Feed` for what every process can rely on.

    Shards need not be of one size: a process that has read all of its own goes on with empty
    batches until every process has, so an epoch is one pass over everything. It may be of another
    number of steps than was planned.

    Attributes:
        data: The stream.
        batch_size: Images of one step, over all processes and pieces.
        anyone: Whether what is asked is true in any process; every process must ask.
        pieces: Batches that a process takes for its part of a step.
        shuffle: Draw a new order of the shards, and mix images within a buffer.
        seed: Seed of the order and of the transforms.
        seat: Which part is ours.
        workers: Processes that read images. Their number changes the order.
        buffer: Images, still encoded, among which each worker draws the next one.
    """

    data: StreamData
    batch_size: int
    anyone: Callable[[bool], bool]
    pieces: int = 1
    shuffle: bool = True
    seed: int = 0
    seat: Seat = field(default_factory=Seat)
    workers: int = 0
    buffer: int = 1000

    @property
    def steps(self) -> int:
        """Steps of an epoch, by the number of images that the stream was said to have."""
        return -(-self.data.size // self.batch_size)

    @property
    def piece(self) -> int:
        """Images of one batch of one process."""
        return max(self.batch_size // (self.seat.world * self.pieces), 1)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[list[Batch]]:
        """The pieces of each step of an epoch, from step `start` on."""
        # Workers may be sent what they read, and cannot be sent what ties the processes together.
        reader = _Reader(replace(self, anyone=bool), epoch, start * self.pieces)
        loader: Iterable[Batch | DataError] = DataLoader(
            reader, batch_size=None, num_workers=self.workers, worker_init_fn=outlive_first
        )
        self._readers[:] = [iter(loader)]
        batches = self._whole(self._readers[0])
        step = 0
        while True:
            pieces = list(islice(batches, self.pieces))
            if not self.anyone(bool(pieces)):
                return
            pieces += [collate([]) for _ in range(self.pieces - len(pieces))]
            step += 1
            if step > start:
                yield pieces

    def _whole(self, batches: Iterable[Batch | DataError]) -> Iterator[Batch]:
        """The same, with what each worker has left over made into whole batches at the end."""
        rest: list[Sample | Skipped] = []
        for batch in batches:
            if isinstance(batch, DataError):
                raise batch
            if 0 < len(batch) + len(batch.skipped) < self.piece:  # none is of a batch behind us
                labels = [] if batch.labels is None else batch.labels.tolist()
                rest += map(Sample, batch.images, labels, batch.names)
                rest += batch.skipped
            else:
                yield batch
        for start in range(0, len(rest), self.piece):
            yield collate(rest[start : start + self.piece])
