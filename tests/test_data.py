"""Folders, archives and the embedded images give the same, checked, labelled batches."""

from __future__ import annotations

import pickle
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

from mergence.data import Batch, ImageData, Lost, Skipped, join, loader, open_images
from mergence.errors import DataError, OptionError
from mergence.sources import ASSETS


def to_tensor(image: Image.Image) -> Tensor:
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(*image.size, -1).permute(2, 0, 1)


def opened(path: str | Path, **options: object) -> ImageData:
    return open_images(path, transform=to_tensor, **options)  # type: ignore[arg-type]


def write(root: Path, *names: str) -> Path:
    """Save a small image of its own colour under each name."""
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (40 * i % 256, 7 * i, 99)).save(root / name)
    return root


def zipped(root: Path, top: str = "") -> Path:
    file = root.with_name(f"{root.name}{top.replace('/', '_')}.zip")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(root.rglob("*")):
            if path.is_file():
                archive.write(path, top + path.relative_to(root).as_posix())
    return file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write(tmp_path / "set", *(f"{c}/{i}.png" for c in ("bee", "ant", "cat") for i in "0123"))


def everything(data: ImageData, batch_size: int = 5, workers: int = 0) -> list[Batch]:
    return list(loader(data, batch_size=batch_size, workers=workers))


@pytest.mark.parametrize("top", ["", "val/", "archive/val/"])
def test_folder_and_zip_agree(folder: Path, top: str) -> None:
    a, b = opened(folder), opened(zipped(folder, top))
    assert a.class_names == b.class_names == ("ant", "bee", "cat")
    assert a.labels == b.labels == [0] * 4 + [1] * 4 + [2] * 4
    assert [top + name for name in a.names] == b.names
    for x, y in zip(everything(a), everything(b), strict=True):
        assert torch.equal(x.images, y.images)
        assert x.labels is not None
        assert torch.equal(x.labels, y.labels)  # type: ignore[arg-type]


@pytest.mark.parametrize("written", ["./{}/{}", "{}\\{}", ".\\{}\\{}"])
def test_members_may_be_written_in_other_ways(folder: Path, written: str) -> None:
    file = folder.with_name("other.zip")
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("./", b"")
        for path in folder.glob("*/*.png"):
            archive.writestr(written.format(path.parent.name, path.name), path.read_bytes())
    a, b = opened(folder), opened(file)
    assert (a.names, a.labels, a.class_names) == (b.names, b.labels, b.class_names)
    for x, y in zip(everything(a), everything(b), strict=True):
        assert torch.equal(x.images, y.images)


def test_a_folder_around_the_class_folders_is_passed_over(folder: Path) -> None:
    outer = folder.parent / "outer"
    outer.mkdir()
    folder.rename(outer / "val")
    assert opened(outer).class_names == ("ant", "bee", "cat")


def test_linked_class_folders_are_followed(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "ant").symlink_to(folder / "ant")
    (tmp_path / "links" / "dog").symlink_to(folder / "cat")
    assert opened(tmp_path / "links").labels == [0] * 4 + [1] * 4


def test_what_is_no_image_is_ignored(folder: Path) -> None:
    (folder / "notes.txt").write_text("not an image")
    write(folder, "__MACOSX/ant/0.png", "ant/._0.png", ".thumbnails/0.png")
    assert len(opened(folder)) == len(opened(zipped(folder))) == 12


@pytest.mark.parametrize("pack", [Path, zipped])
def test_images_without_class_folders_are_unlabelled(
    tmp_path: Path, pack: Callable[[Path], Path]
) -> None:
    data = opened(pack(write(tmp_path / "flat", "a.png", "b.JPG")), class_names=["x", "y"])
    (batch,) = everything(data)
    assert (data.labels, batch.labels) == (None, None)
    assert batch.names == ["a.png", "b.JPG"]


def test_folders_map_to_the_models_names(folder: Path) -> None:
    data = opened(folder, class_names=["dog", "cat", "bee", "ant"])
    assert data.labels == [3] * 4 + [2] * 4 + [1] * 4
    assert data.class_names == ("dog", "cat", "bee", "ant")


def test_one_folder_that_the_model_knows_is_a_class(tmp_path: Path) -> None:
    root = write(tmp_path / "set", "val/cat/0.png", "val/cat/1.png")
    assert opened(root, class_names=["ant", "cat"]).labels == [1, 1]
    assert opened(root).labels is None


def test_other_names_map_in_sorted_order_when_the_number_agrees(folder: Path) -> None:
    with pytest.warns(UserWarning, match="not called as the model's classes"):
        assert opened(folder, class_names=["Z", "Y", "X"]).labels == opened(folder).labels
    assert opened(folder, num_classes=3).labels == opened(folder).labels


def test_folders_that_timm_would_number_otherwise_are_named(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    root = write(tmp_path / "set", *(f"class_{i}/0.png" for i in range(11)))
    opened(root)  # nobody asked which class is which
    opened(root, class_names=[f"class_{i}" for i in range(11)])
    opened(write(tmp_path / "padded", "08/0.png", "09/0.png", "10/0.png"), num_classes=3)
    assert not recwarn.list
    with pytest.warns(UserWarning, match=r"class_0, class_1, class_10.*class_0, class_1, class_2"):
        assert opened(root, num_classes=11).labels == list(range(11))


def test_classes_that_are_called_as_the_models_are_no_surprise(
    recwarn: pytest.WarningsRecorder,
) -> None:
    names = ["ant", "crane", "crane"]  # of ImageNet's classes two are cranes
    assert opened("synthetic:4", class_names=names).labels == [0, 1, 2, 0]
    assert not recwarn.list


def test_a_name_that_two_classes_share_matches_neither(folder: Path) -> None:
    with pytest.raises(DataError, match=r"3 class folders.*4 classes"):
        opened(folder, class_names=["ant", "bee", "cat", "cat"])


@pytest.mark.parametrize(
    "known", [{"class_names": ["x"] * 10}, {"num_classes": 10}], ids=["names", "number"]
)
def test_another_number_of_classes_stops(folder: Path, known: dict[str, object]) -> None:
    with pytest.raises(DataError, match=r"has 3 class folders \(ant, bee, cat\).*has 10 classes"):
        opened(folder, **known)


def test_loose_images_beside_class_folders_stop(folder: Path) -> None:
    with pytest.raises(DataError, match="mixes 1 images without a class with 3 class folders"):
        opened(write(folder, "preview.png"))


def test_limit_is_balanced_and_deterministic(folder: Path) -> None:
    write(folder, *(f"cat/{i}.png" for i in range(20)))
    picks = {seed: opened(folder, limit=8, seed=seed) for seed in range(5)}
    for data in picks.values():
        assert data.labels is not None
        assert sorted(Counter(data.labels).values()) == [2, 3, 3]
        assert data.names == sorted(data.names)
    assert opened(folder, limit=8, seed=3).names == picks[3].names
    assert len({tuple(data.names) for data in picks.values()}) > 1
    # The small classes run out; the rest comes from the large one.
    assert Counter(opened(folder, limit=20).labels) == {0: 4, 1: 4, 2: 12}
    assert opened(folder, limit=1000).names == opened(folder).names
    with pytest.raises(OptionError, match="limit is 0"):
        opened(folder, limit=0)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("pack", [Path, zipped])
def test_bad_images_are_named_and_skipped(
    tmp_path: Path, pack: Callable[[Path], Path], workers: int
) -> None:
    root = write(tmp_path / "set", *(f"{c}/{i}.jpg" for c in "ab" for i in range(4)))
    Image.effect_noise((64, 64), 50).save(root / "a/2.jpg")
    (root / "a/2.jpg").write_bytes((root / "a/2.jpg").read_bytes()[:-200])
    (root / "b/0.jpg").write_text("not an image")
    batches = everything(opened(pack(root)), batch_size=3, workers=workers)
    assert [len(batch) for batch in batches] == [2, 2, 2]
    assert [b.labels.tolist() for b in batches if b.labels is not None] == [[0, 0], [0, 1], [1, 1]]
    skipped = [bad for batch in batches for bad in batch.skipped]
    assert [bad.name for bad in skipped] == ["a/2.jpg", "b/0.jpg"]
    assert "truncated" in skipped[0].reason
    assert skipped[1].reason == "OSError: cannot identify an image format in it"


def test_what_is_measured_goes_on_without_a_file_that_is_gone(folder: Path) -> None:
    data = opened(folder)
    (folder / "ant/1.png").unlink()
    first, *_ = everything(data)
    assert first.names == ["ant/0.png", "ant/2.png", "ant/3.png", "bee/0.png"]
    (gone,) = first.skipped
    assert gone == Lost("ant/1.png", gone.reason)
    assert gone.reason.startswith("FileNotFoundError: ")
    (folder / "ant/1.png").symlink_to(folder / "nowhere.png")  # that is so every day
    assert everything(data)[0].skipped == [
        Skipped("ant/1.png", "OSError: it is a link to a file that is not there")
    ]


def test_a_batch_of_bad_images_only_is_empty(folder: Path) -> None:
    for file in (folder / "ant").iterdir():
        file.write_bytes(b"")
    first, second, _ = everything(opened(folder), batch_size=4)
    assert not first
    assert (len(first.images), first.labels, first.names) == (0, None, [])
    assert len(first.skipped) == len(second) == 4
    assert {bad.reason for bad in first.skipped} == {"OSError: the file is empty"}


def test_a_damaged_member_of_an_archive_is_skipped(folder: Path) -> None:
    file = zipped(folder)
    content = bytearray(file.read_bytes())
    with zipfile.ZipFile(file) as archive:
        member = archive.getinfo("bee/1.png")
    start = member.header_offset + 30 + len(member.filename)
    content[start + 8 : start + 16] = b"\xff" * 8
    file.write_bytes(content)
    batches = everything(opened(file))
    assert [bad.name for batch in batches for bad in batch.skipped] == ["bee/1.png"]


def test_errors_of_the_transform_are_not_hidden(folder: Path) -> None:
    def broken(image: object) -> Tensor:
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        everything(open_images(folder, transform=broken))


def test_an_opened_archive_survives_pickling(folder: Path) -> None:
    data = opened(zipped(folder))
    assert data[0] is not None
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy[5].image, data[5].image)


def test_images_are_converted_to_the_models_mode(folder: Path) -> None:
    assert everything(opened(folder, mode="L"))[0].images.shape == (5, 1, 16, 16)


@pytest.mark.parametrize("file", ["a.png", "a.tif", "a.pgm"])
def test_grey_images_of_16_bits_are_scaled_down_to_8(tmp_path: Path, file: str) -> None:
    levels = [0, 100, 255]
    raw = b"".join((257 * level).to_bytes(2, "little") for level in levels)
    Image.frombytes("I;16", (3, 1), raw).save(tmp_path / file)
    (batch,) = everything(opened(tmp_path))
    assert batch.images.flatten(1).tolist() == [levels * 3]
    (batch,) = everything(opened(tmp_path, mode="L"))
    assert batch.images.flatten().tolist() == levels


@pytest.mark.parametrize(("mode", "value"), [("F", 0.5), ("I", 65536), ("I", -1)])
def test_images_without_a_scale_are_skipped(tmp_path: Path, mode: str, value: float) -> None:
    Image.new(mode, (3, 1), value).save(tmp_path / "a.tif")
    ((bad,),) = (batch.skipped for batch in everything(opened(tmp_path)))
    assert bad.name == "a.tif"
    assert f"span {value:g} to {value:g}" in bad.reason


def test_a_path_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no image folder or \.zip archive at '.*nowhere'"):
        opened(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"holds no image.*\.jpg, \.jpeg"):
        opened(tmp_path)
    damaged = zipped(write(tmp_path / "set", "a/0.png", "b/0.png"))
    damaged.write_bytes(damaged.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"set\.zip' cannot be read as a zip archive"):
        opened(damaged)


def test_the_demo_images_are_balanced() -> None:
    data = opened("demo", mode="L", num_classes=10)
    assert Counter(data.labels) == dict.fromkeys(range(10), 200)
    assert data.labels is not None
    assert data.labels[:4] == [9, 2, 1, 1]
    assert data.class_names is not None
    assert (data.class_names[0], data.class_names[9]) == ("T-shirt/top", "Ankle boot")
    with pytest.raises(DataError, match=r"10 class folders.*3 classes"):
        opened("demo", num_classes=3)


def test_the_embedded_files_stay_small() -> None:
    images = sum(file.stat().st_size for file in ASSETS.glob("fashion_mnist_test_*"))
    assert 0 < images <= 1_000_000
    assert 0 < (ASSETS / "vit_fashion_mnist" / "model.safetensors").stat().st_size <= 5_000_000


def test_parts_of_a_collection_are_joined(folder: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "more", *(f"{c}/{i}.png" for c in ("bee", "ant", "cat") for i in "56"))
    pack = zipped(other)
    parts = {str(folder): opened(folder), str(pack): opened(pack)}
    data = join(parts)
    assert (len(data), data.class_names) == (18, ("ant", "bee", "cat"))
    assert data.labels == [0] * 4 + [1] * 4 + [2] * 4 + [0] * 2 + [1] * 2 + [2] * 2
    assert data.names[12] == f"{pack}/ant/5.png"
    images = [batch.images for part in parts.values() for batch in everything(part)]
    assert torch.equal(
        torch.cat([batch.images for batch in everything(data, workers=1)]), torch.cat(images)
    )
    assert data.source.names()[:1] == [f"{folder}/{parts[str(folder)].source.names()[0]}"]
    write(other, "dog/0.png")
    with pytest.raises(DataError, match="do not have the same classes"):
        join(parts | {str(other): opened(other)})


def test_synthetic_images_stand_for_any_data() -> None:
    data = opened("synthetic:7", class_names=["a", "b", "c"])
    assert (data.labels, data.class_names) == ([0, 1, 2, 0, 1, 2, 0], ("a", "b", "c"))
    (batch,) = everything(data, batch_size=10)
    assert batch.images.shape == (7, 3, 64, 64)
    assert len({image.numpy().tobytes() for image in batch.images}) == 7
    assert torch.equal(everything(opened("synthetic:7"), batch_size=10)[0].images, batch.images)
    with pytest.raises(DataError, match="synthetic:N"):
        opened("synthetic:many")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU copies from pinned memory")
def test_a_loader_pins_whole_batches() -> None:
    batch = Batch(torch.zeros(2, 3), torch.tensor([1, 0]), ["a", "b"], []).pin_memory()
    assert batch.images.is_pinned()
    assert batch.labels is not None
    assert batch.labels.is_pinned()
    assert batch.names == ["a", "b"]
