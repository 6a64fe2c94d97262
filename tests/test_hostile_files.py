"""Folders and archives that were made to do harm, or by accident look so."""

from __future__ import annotations

import io
import os
import zipfile
from lzma import LZMAError
from pathlib import Path
from typing import Any

import pytest
from PIL import EpsImagePlugin, Image
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from mergence import sources
from mergence.data import Skipped, open_images
from mergence.errors import DataError, OptionError
from mergence.files import check_target

PNG = io.BytesIO()
Image.new("RGB", (8, 8), (200, 10, 10)).save(PNG, "PNG")


def opened(path: Path) -> Any:
    def transform(image: Image.Image) -> Tensor:
        return pil_to_tensor(image)

    return open_images(path, transform=transform)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a/1.png", "b/2.png"):
        (tmp_path / "set" / name).parent.mkdir(parents=True)
        (tmp_path / "set" / name).write_bytes(PNG.getvalue())
    return tmp_path / "set"


def test_links_in_a_circle_give_each_image_once(folder: Path) -> None:
    (folder / "a" / "up").symlink_to(folder, target_is_directory=True)
    (folder / "b" / "here").symlink_to(folder / "b", target_is_directory=True)
    assert opened(folder).names == ["a/1.png", "b/2.png"]


def test_a_folder_that_cannot_be_read_stops(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scan = os.scandir

    def locked(path: Any) -> Any:
        if Path(path) == folder / "b":
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", locked)
    with pytest.raises(DataError, match=r"'.*set/b' cannot be read.*Permission denied"):
        opened(folder)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="this system has no named pipes")
def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "b" / "3.png")
    found = opened(folder)[2]
    assert found == Skipped("b/3.png", "OSError: it is no regular file")


def test_a_file_of_unlikely_size_is_not_read(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(folder.parent / "set.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/1.png", PNG.getvalue())
        archive.writestr("b/2.png", bytes(5000))  # 25 bytes in the archive
    (folder / "b" / "2.png").write_bytes(bytes(5000))
    monkeypatch.setattr(sources, "LARGEST", 4000)
    for path in (folder, folder.parent / "set.zip"):
        good, bad = opened(path)[0], opened(path)[1]
        assert good.image.shape == (3, 8, 8)
        assert bad.name == "b/2.png"
        assert "5,000 bytes" in bad.reason


def test_pictures_that_are_programs_are_not_run(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *given: run.append(given))
    Image.new("RGB", (8, 8)).save(folder / "b" / "2.png", "EPS")
    found = opened(folder)[1]
    assert isinstance(found, Skipped)
    assert "EPS" in found.reason
    assert not run


@pytest.mark.parametrize(
    "error", [RuntimeError, IndexError, NotImplementedError, LZMAError, OverflowError, MemoryError]
)
def test_whatever_a_decoder_makes_of_damaged_bytes_is_named(
    error: type[Exception], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As those of AVIF, QOI, DDS, xz and TIFF do."""

    def damaged(encoded: bytes) -> Image.Image:
        raise error("damaged")

    monkeypatch.setattr(sources, "decode", damaged)
    assert opened(folder)[0] == Skipped("a/1.png", f"{error.__name__}: damaged")


@pytest.mark.parametrize("size", [(1, 65000), (60000, 1)])
def test_an_image_that_would_be_stretched_to_billions_of_pixels_is_named(
    size: tuple[int, int], folder: Path
) -> None:
    Image.new("L", size).save(folder / "b" / "2.png")
    assert (folder / "b" / "2.png").stat().st_size < 500
    found = opened(folder)[1]
    assert isinstance(found, Skipped)
    assert f"{size[0]} x {size[1]} pixels" in found.reason
    Image.new("L", (1000, 2)).save(folder / "b" / "2.png")
    assert opened(folder)[1].image.shape == (3, 2, 1000)


@pytest.mark.parametrize(
    ("place", "wrong"),
    [(6, b"\xc8"), (46, b"\xff")],  # of a newer format; a name that is not in the encoding it says
    ids=["version", "name"],
)
def test_an_archive_with_a_damaged_list_of_its_files_is_named(
    place: int, wrong: bytes, folder: Path
) -> None:
    file = folder.parent / "set.zip"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("é/1.png", PNG.getvalue())
    whole = file.read_bytes()
    place += whole.index(b"PK\x01\x02")
    file.write_bytes(whole[:place] + wrong + whole[place + 1 :])
    with pytest.raises(DataError, match=r"set\.zip' cannot be read as a zip archive"):
        opened(file)


def test_a_file_that_could_not_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_target(tmp_path / "new.json", "--json new.json")
    with pytest.raises(OptionError, match=r"--json F: there is no folder '.*/none'"):
        check_target(tmp_path / "none" / "new.json", "--json F")
    with pytest.raises(OptionError, match=r"--json F: '.*' is a folder"):
        check_target(tmp_path, "--json F")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(OptionError, match=r"--json F: '.*' may not be written to"):
        check_target(tmp_path / "new.json", "--json F")
    (tmp_path / "new.json").touch()  # a file that may be, in a folder that may not
    check_target(tmp_path / "new.json", "--json F")
