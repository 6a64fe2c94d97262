"""WebDataset shards and Hugging Face data sets: each image to exactly one process."""

from __future__ import annotations

import csv
import io
import shutil
import tarfile
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from mergence import demo
from mergence.data import Batch, Lost
from mergence.errors import DataError, OptionError
from mergence.train import Config, fit
from mergence.train.feed import Seat
from mergence.train.shards import open_shards
from mergence.train.stream import StreamFeed, open_stream

pytest.importorskip("webdataset", reason="webdataset is not installed")
datasets = pytest.importorskip("datasets", reason="datasets is not installed")

Build = Callable[..., Config]
SIZES = (14, 3, 9, 11)  # uneven shards, 37 images


def encoded(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "png")
    return file.getvalue()


def write_shard(path: Path, samples: list[tuple[str, bytes, int]]) -> None:
    with tarfile.open(path, "w") as archive:
        for name, image, label in samples:
            for ending, content in (("png", image), ("cls", str(label).encode())):
                entry = tarfile.TarInfo(f"{name}.{ending}")
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))


@pytest.fixture(scope="session")
def samples() -> list[tuple[str, bytes, int]]:
    data = demo.images(demo.load(), limit=sum(SIZES))
    labels = data.labels or []
    return [
        (Path(name).name, encoded(data.source.open(name)), label)
        for name, label in zip(data.names, labels, strict=True)
    ]


@pytest.fixture
def tars(samples: list[tuple[str, bytes, int]], tmp_path: Path) -> Path:
    (tmp_path / "tars").mkdir()
    rest = list(samples)
    for number, size in enumerate(SIZES):
        write_shard(tmp_path / "tars" / f"a-{number:03d}.tar", rest[:size])
        rest = rest[size:]
    return tmp_path / "tars"


@pytest.fixture(scope="session")
def parquet(
    samples: list[tuple[str, bytes, int]], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("parquet")
    names = datasets.ClassLabel(names=demo.load().label_names)
    features = datasets.Features({"picture": datasets.Image(), "kind": names})
    columns = {
        "picture": [{"bytes": image, "path": f"{name}.png"} for name, image, _ in samples],
        "kind": [label for *_, label in samples],
    }
    whole = datasets.Dataset.from_dict(columns, features=features)
    for number in range(3):
        whole.shard(3, number).to_parquet(folder / f"train-{number}.parquet")
    return folder


def noise(image: Image.Image) -> Tensor:
    return torch.cat((torch.tensor([image.getpixel((14, 14))]).float(), torch.rand(2)))


def feed(path: str, **options: Any) -> StreamFeed:
    data = open_stream(path, transform=noise, mode="L", num_classes=10, size=37)
    made = StreamFeed(data, 8, anyone=bool)
    return replace(made, **options)


def epoch(feed: StreamFeed, number: int = 0, start: int = 0) -> list[Batch]:
    return [batch for pieces in feed.epoch(number, start) for batch in pieces]


def tensors(batches: list[Batch]) -> dict[str, Tensor]:
    names = [name for batch in batches for name in batch.names]
    assert max(Counter(names).values()) == 1
    return dict(zip(names, torch.cat([b.images for b in batches if b]), strict=True))


# Two processes share the four shards; seven have more readers than there are shards.
@pytest.mark.parametrize(
    ("world", "workers", "pieces"), [(1, 0, 1), (2, 0, 3), (2, 2, 1), (7, 0, 1)]
)
@pytest.mark.parametrize("kind", ["wds", "hf"])
def test_each_image_is_seen_once_by_one_process(
    tars: Path, parquet: Path, kind: str, world: int, workers: int, pieces: int
) -> None:
    path = f"wds:{tars}/a-*.tar" if kind == "wds" else f"hf:{parquet}"
    alone = feed(path, shuffle=False)
    expected = tensors(epoch(alone))
    assert len(expected) == 37
    assert (alone.steps, alone.piece) == (5, 8)
    found: list[Batch] = []
    for rank in range(world):
        found += epoch(feed(path, seat=Seat(rank, world), workers=workers, pieces=pieces))
    together = tensors(found)
    assert together.keys() == expected.keys()
    # Augmented in the same way, whoever reads it.
    assert all(torch.equal(together[name], expected[name]) for name in expected)


def test_labels_follow_their_images(
    tars: Path, parquet: Path, samples: list[tuple[str, bytes, int]]
) -> None:
    expected = Counter(label for *_, label in samples)
    for path in (f"wds:{tars}/a-{{000..003}}.tar", f"hf:{parquet}@train"):
        labels = [x for batch in epoch(feed(path)) for x in batch.labels.tolist()]  # type: ignore[union-attr]
        assert Counter(labels) == expected
    names = list(reversed(demo.load().label_names or ()))
    data = open_stream(f"hf:{parquet}", transform=noise, mode="L", class_names=tuple(names))
    assert data.classes == list(range(9, -1, -1))


def test_the_order_is_new_each_epoch_and_the_same_each_time(tars: Path) -> None:
    stream = feed(f"wds:{tars}/*.tar", buffer=5)
    orders = [[n for b in epoch(stream, number) for n in b.names] for number in (0, 0, 1)]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) != orders[0]


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_where_it_was_left(tars: Path, workers: int) -> None:
    stream = feed(f"wds:{tars}/*.tar", workers=workers, batch_size=4, pieces=2)
    whole = list(stream.epoch(1))
    for start in (1, 4, len(whole) - 1, len(whole)):
        rest = list(stream.epoch(1, start))
        assert [[b.names for b in s] for s in rest] == [[b.names for b in s] for s in whole[start:]]


@pytest.fixture
def nines(samples: list[tuple[str, bytes, int]], tmp_path: Path) -> str:
    """Four shards of nine images."""
    (tmp_path / "nines").mkdir()
    for number in range(4):
        write_shard(tmp_path / "nines" / f"{number}.tar", samples[9 * number : 9 * number + 9])
    return f"wds:{tmp_path}/nines/*.tar"


@pytest.mark.parametrize(("workers", "pieces"), [(0, 1), (2, 1), (2, 2)])
def test_only_the_last_step_is_smaller(nines: str, workers: int, pieces: int) -> None:
    """What the workers have left over makes whole steps together."""
    stream = feed(nines, workers=workers, pieces=pieces)
    whole = list(stream.epoch(0))
    assert [sum(map(len, step)) for step in whole] == [8, 8, 8, 8, 4]
    assert len(tensors([batch for step in whole for batch in step])) == 36
    for start in (2, 4):
        rest = list(stream.epoch(0, start))
        assert [[b.names for b in s] for s in rest] == [[b.names for b in s] for s in whole[start:]]


def test_what_is_left_over_and_cannot_be_used_is_named(nines: str, tmp_path: Path) -> None:
    write_shard(tmp_path / "nines" / "0.tar", [("bad", b"no image", 1)])
    batches = epoch(feed(nines, workers=2))
    assert [item.name for batch in batches for item in batch.skipped] == ["0.tar/bad"]
    assert len(tensors(batches)) == 27


def test_all_processes_make_as_many_steps(tars: Path) -> None:
    """The one that is through first goes on with empty batches while another asks for more."""
    asked: list[bool] = []

    def others_go_on(here: bool) -> bool:
        asked.append(here)
        return len(asked) < 9

    steps = list(feed(f"wds:{tars}/a-001.tar", anyone=others_go_on, pieces=2).epoch(0))
    assert [len(pieces) for pieces in steps] == [2] * 8
    assert [len(batch) for pieces in steps for batch in pieces] == [3] + [0] * 15


def test_what_cannot_be_used_is_named(tars: Path) -> None:
    write_shard(
        tars / "a-004.tar",
        [("bad", b"no image", 1), ("good", encoded(Image.new("L", (28, 28))), 2)],
    )
    with tarfile.open(tars / "a-005.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("lonely.txt"))
    content = (tars / "a-000.tar").read_bytes()
    (tars / "a-000.tar").write_bytes(content[: len(content) // 2 + 100])
    batches = epoch(feed(f"wds:{tars}/*.tar"))
    skipped = {item.name.rpartition("/")[2]: item.reason for b in batches for item in b.skipped}
    assert "cannot identify" in skipped["bad"]
    assert "no image, or no class" in skipped["lonely"]
    assert "breaks off" in skipped["a-000.tar"]
    assert 23 + 1 < len(tensors(batches)) < 37


def test_a_shard_that_cannot_be_opened_is_lost(tars: Path, parquet: Path, tmp_path: Path) -> None:
    """One that is damaged is not: it is the same in every run."""
    (tars / "a-000.tar").write_bytes(b"no tar")
    shutil.copytree(parquet, tmp_path / "rows")
    streams = [open_shards(f"wds:{tars}/*.tar"), open_shards(f"hf:{tmp_path}/rows")]
    (damaged,) = streams[0].read(0)
    (tars / "a-000.tar").unlink()
    shutil.rmtree(tmp_path / "rows")
    found = [damaged, *(item for shards in streams for item in shards.read(0))]
    assert [isinstance(item, Lost) for item in found] == [False, True, True]


@pytest.mark.slow
def test_a_run_learns_from_a_stream_and_goes_on_bit_for_bit(
    config: Build, tars: Path, parquet: Path
) -> None:
    class Crash(Exception):
        pass

    def crash(status: Any) -> None:
        if status.update == 4:
            raise Crash

    fields: dict[str, Any] = {
        "data": f"wds:{tars}/*.tar", "val": f"hf:{parquet}", "limit": None, "epoch_images": 37,
        "save_every": 1, "shuffle_buffer": 10,
    }  # fmt: skip
    whole = fit(config(**fields))
    assert [row["update"] for row in whole.history] == [0, 3, 6]
    settings = config(**fields, out=config().out + "2")
    with pytest.raises(Crash):
        fit(settings, report=crash)
    again = fit(settings, resume=True)
    assert again.history == whole.history
    weights = [(s.model / "model.safetensors").read_bytes() for s in (whole, again)]
    assert weights[0] == weights[1]


def test_a_stream_that_is_longer_than_was_said_keeps_to_the_plan(config: Build, tars: Path) -> None:
    """Three steps an epoch were planned, and five come."""

    class Crash(Exception):
        pass

    def report(status: Any) -> None:
        seen.append(status)
        if status.update == 5 and len(seen) == 5:
            raise Crash

    seen: list[Any] = []
    settings = config(
        data=f"wds:{tars}/*.tar", limit=None, epoch_images=20, batch_size=8, reduce_epochs="1",
        min_lr=0, save_every=1, log_every=1,
    )  # fmt: skip
    with pytest.raises(Crash):
        fit(settings, report=report)
    fit(settings, resume=True, report=report)
    # The fourth step, after the last planned one, is saved like any other.
    assert [status.update for status in seen] == [1, 2, 3, 4, 5, *range(5, 11)]
    assert all(status.seconds_left >= 0 for status in seen)
    assert [status.updates for status in seen[-6:]] == [8, 8, 8, 8, 9, 10]
    with (Path(settings.out) / "steps.csv").open() as file:
        steps = list(csv.DictReader(file))
    assert [float(row["strength"]) for row in steps] == [1.0] * 5 + [0.0] * 5
    rates = [float(row["lr"]) for row in steps]
    assert rates[2] == rates[3] == rates[4]
    assert rates[5] == pytest.approx(1e-3)
    assert rates[7] == rates[9] > 0


@pytest.mark.slow
def test_a_new_head_takes_its_classes_from_the_stream(
    config: Build, tars: Path, parquet: Path
) -> None:
    fields: dict[str, Any] = {"limit": None, "epoch_images": 37, "new_head": True, "epochs": 1}
    summary = fit(config(data=f"hf:{parquet}", **fields))
    assert summary.history[-1]["epoch"] == 1
    with pytest.raises(DataError, match="does not name its classes"):
        fit(config(data=f"wds:{tars}/*.tar", out=config().out + "2", **fields))


def test_what_is_wrong_with_a_stream_is_said_first(
    config: Build, tars: Path, tmp_path: Path
) -> None:
    def attempt(data: str, **fields: Any) -> None:
        fit(config(data=data, **{"limit": None, "epoch_images": 37} | fields))

    with pytest.raises(DataError, match=r"names 3 shards, of which 1 do not exist"):
        attempt(f"wds:{tars}/a-{{002..004}}.tar")
    with pytest.raises(DataError, match="names 0 shards"):
        attempt(f"wds:{tars}/*.zip")
    with pytest.raises(DataError, match=r"cannot be opened.*hf:NAME@SPLIT"):
        attempt(f"hf:{tmp_path}/nowhere")
    with pytest.raises(OptionError, match="epoch_images"):
        attempt(f"wds:{tars}/*.tar", epoch_images=None)
    with pytest.raises(OptionError, match=r"batch_size 16 over 3 .* leaves 1 over.* 15 or 18"):
        attempt(f"wds:{tars}/*.tar", accumulate=3)
    with pytest.raises(OptionError, match=r"batch_size 16 over 20 .* Give batch_size 20,"):
        attempt(f"wds:{tars}/*.tar", accumulate=20)
    with pytest.raises(OptionError, match="Leave out limits"):
        attempt(f"wds:{tars}/*.tar", limit=5)
    datasets.Dataset.from_dict({"a": [1]}).save_to_disk(tmp_path / "saved")
    with pytest.raises(DataError, match=r"save_to_disk, write it again with to_parquet"):
        attempt(f"hf:{tmp_path}/saved")
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.csv").write_text("a,b\n1,2\n")
    with pytest.raises(DataError, match="no image column with a class label"):
        attempt(f"hf:{tmp_path}/text")
    write_shard(tars / "a-000.tar", [("x", encoded(Image.new("L", (28, 28))), 10)])
    for workers in (0, 1):
        with pytest.raises(DataError, match=r"^'a-000.*has the label 10, and there are 10 classes"):
            attempt(f"wds:{tars}/a-000.tar", workers=workers)
    assert not (tmp_path / "run" / "model").exists()
