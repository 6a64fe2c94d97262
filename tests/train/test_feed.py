"""Every image exactly once an epoch, the same whoever reads it."""

from __future__ import annotations

import multiprocessing
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from mergence.data import Batch, ImageData, open_images
from mergence.train.feed import Feed, Seat


class Noise:
    """A transform that draws from all three generators, as timm's do."""

    def __call__(self, image: object) -> Tensor:
        return torch.tensor([random.random(), np.random.rand(), float(torch.rand(1))])  # noqa: NPY002


@pytest.fixture
def data() -> ImageData:
    return open_images("demo", transform=Noise(), mode="L", limit=50)


def everything(batches: list[Batch]) -> dict[str, Tensor]:
    names = [name for batch in batches for name in batch.names]
    assert max(Counter(names).values()) == 1
    return dict(zip(names, torch.cat([b.images for b in batches if b]), strict=True))


def epoch(feed: Feed, number: int = 0, start: int = 0) -> list[Batch]:
    return [batch for pieces in feed.epoch(number, start) for batch in pieces]


@pytest.mark.parametrize(("world", "pieces"), [(1, 1), (1, 3), (2, 1), (3, 2), (4, 5), (7, 1)])
def test_each_image_is_seen_once_by_one_process(data: ImageData, world: int, pieces: int) -> None:
    alone = Feed(data, 16)
    seats = [replace(alone, seat=Seat(rank, world), pieces=pieces) for rank in range(world)]
    parts = [list(feed.epoch(3)) for feed in seats]
    assert alone.steps == 4
    assert all(len(part) == 4 for part in parts)
    for step, together in zip(alone.epoch(3), zip(*parts, strict=True), strict=True):
        # In step: as many pieces everywhere, of one size but for the remainder.
        assert len({len(part) for part in together}) == 1
        dealt = [batch for part in together for batch in part]
        assert sorted(n for b in dealt for n in b.names) == sorted(step[0].names)
        for part in together:
            assert abs(sum(map(len, part)) - len(step[0]) / world) < 1
    all_ = everything([batch for part in parts for pieces_ in part for batch in pieces_])
    assert sorted(all_) == sorted(data.names)
    expected = everything(epoch(alone, 3))
    assert all(torch.equal(all_[name], expected[name]) for name in expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_is_augmented_by_its_epoch_and_place_alone(data: ImageData, workers: int) -> None:
    feed = Feed(data, 16, workers=workers)
    first = everything(epoch(feed))
    random.seed(1)
    torch.manual_seed(1)
    again = everything(epoch(feed))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert list(first) == list(again)
    other = everything(epoch(feed, 1))
    assert list(first) != list(other)
    assert not any(torch.equal(first[name], other[name]) for name in first)
    assert all(len(set(draws.tolist())) == 3 for draws in first.values())


def test_processes_that_read_outlive_an_epoch(data: ImageData) -> None:
    feed = Feed(data, 16, workers=2)
    seen = []
    for number in range(3):
        everything(epoch(feed, number))
        seen.append({process.pid for process in multiprocessing.active_children()})
    assert len(seen[0]) == 2
    assert seen == [seen[0]] * 3
    broken_off = feed.epoch(3)
    next(broken_off)
    broken_off.close()
    expected = everything(epoch(Feed(data, 16), 4))
    found = everything(epoch(feed, 4))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_reading_leaves_the_generators_alone(data: ImageData) -> None:
    def draw() -> tuple[float, ...]:
        return random.random(), np.random.rand(), float(torch.rand(1))  # noqa: NPY002

    def seed() -> None:
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
        torch.manual_seed(5)

    seed()
    expected = draw()
    seed()
    with torch.random.fork_rng(devices=[]):  # the loader itself draws a seed for its workers
        epoch(Feed(data, 16))
        random.seed(5)
        np.random.seed(5)  # noqa: NPY002
    assert draw() == expected


def test_an_epoch_goes_on_where_it_was_left(data: ImageData) -> None:
    feed = Feed(data, 16, pieces=2)
    names = [batch.names for batch in epoch(feed, 2)]
    assert [batch.names for batch in epoch(feed, 2, start=3)] == names[6:]
    assert epoch(feed, 2, start=4) == []


def test_without_shuffling_the_order_is_that_of_the_collection(data: ImageData) -> None:
    assert list(everything(epoch(Feed(data, 16, shuffle=False)))) == data.names


def test_the_seed_changes_order_and_augmentation(
    data: ImageData, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, other = (everything(epoch(Feed(data, 50, seed=seed))) for seed in (0, 1))
    assert list(first) != list(other)
    assert not any(torch.equal(first[name], other[name]) for name in first)
