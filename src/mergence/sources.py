"""Where encoded images come from: a folder, a zip archive, the embedded demo, or thin air."""

from __future__ import annotations

import gzip
import io
import os
import random
import stat
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from mergence.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

ASSETS = Path(__file__).parent / "assets"
LARGEST = 1 << 29
"""Bytes that an encoded image may have: more than any, and no harm to memory."""
FASHION_MNIST_CLASSES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)


class Source(Protocol):
    """Where encoded images come from. Travels to worker processes by fork or pickle."""

    def names(self) -> list[str]: ...

    def open(self, name: str) -> Image: ...


@dataclass(frozen=True)
class Folder:
    """A folder and everything below it."""

    root: Path

    def names(self) -> list[str]:
        found = []
        # Class folders are often links to one shared copy, which pathlib's own walks do not follow.
        for folder, folders, files in os.walk(self.root, onerror=_stop, followlinks=True):
            # A link to a folder that it lies in would be followed for ever.
            around = {os.path.realpath(folder), *map(str, Path(os.path.realpath(folder)).parents)}
            folders[:] = [f for f in folders if os.path.realpath(Path(folder, f)) not in around]
            found += [Path(folder, file).relative_to(self.root).as_posix() for file in files]
        return found

    def open(self, name: str) -> Image:
        return decode(read_file(self.root / name))


@dataclass
class Zip:
    """A zip archive."""

    path: Path
    # An open archive shares its file offset with forked workers and cannot be pickled, so each
    # process opens its own at first use.
    _opened: tuple[int, zipfile.ZipFile, dict[str, str]] | None = field(default=None, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "_opened": None}

    def _archive(self) -> tuple[zipfile.ZipFile, dict[str, str]]:
        """The archive, and its members by their plain names."""
        if self._opened is None or self._opened[0] != os.getpid():
            archive = zipfile.ZipFile(self.path)
            members = {_plain(member): member for member in archive.namelist()}
            self._opened = (os.getpid(), archive, members)
        return self._opened[1:]

    def names(self) -> list[str]:
        try:
            return list(self._archive()[1])
        except Exception as error:  # damaged bytes fail in as many ways as zipfile has
            raise DataError(
                f"'{self.path}' cannot be read as a zip archive: {error}. "
                "Pass an image folder or an undamaged .zip file."
            ) from error

    def open(self, name: str) -> Image:
        archive, members = self._archive()
        _check_size(archive.getinfo(members[name]).file_size)  # zipfile unpacks no more
        return decode(archive.read(members[name]))


class Demo:
    """2,000 Fashion-MNIST test images in idx format: a header, then 28 x 28 bytes an image."""

    def __init__(self) -> None:
        images = (ASSETS / "fashion_mnist_test_images.idx3-ubyte.gz").read_bytes()
        labels = (ASSETS / "fashion_mnist_test_labels.idx1-ubyte.gz").read_bytes()
        self.pixels = gzip.decompress(images)[16:]
        self.labels = list(gzip.decompress(labels)[8:])

    def names(self) -> list[str]:
        return [f"demo/{index:04d}" for index in range(len(self.labels))]

    def open(self, name: str) -> Image:
        from PIL import Image

        start = 784 * int(name.removeprefix("demo/"))
        return Image.frombytes("L", (28, 28), self.pixels[start : start + 784])


@dataclass(frozen=True)
class Joined:
    """Several sources, whose images are called by the source's name and their own."""

    parts: Mapping[str, Source]

    def names(self) -> list[str]:
        return [f"{part}/{name}" for part, source in self.parts.items() for name in source.names()]

    def open(self, name: str) -> Image:
        part = max((p for p in self.parts if name.startswith(f"{p}/")), key=len)
        return self.parts[part].open(name.removeprefix(f"{part}/"))


class Synthetic:
    """Random images, to try a configuration without its data: `synthetic:N`."""

    def __init__(self, size: int) -> None:
        self.size = size

    def names(self) -> list[str]:
        return [f"synthetic/{index:06d}" for index in range(self.size)]

    def open(self, name: str) -> Image:
        from PIL import Image

        return Image.frombytes("RGB", (64, 64), random.Random(name).randbytes(3 * 64 * 64))


def read_file(path: Path) -> bytes:
    """The content of an image file, whatever has named it.

    Raises:
        OSError: It is not there, no regular file or larger than any image.
    """
    if path.is_symlink() and not path.exists():  # every day, unlike a file that is out of reach
        raise OSError("it is a link to a file that is not there")
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):  # a pipe would be waited for
        raise OSError("it is no regular file")
    _check_size(about.st_size)
    return path.read_bytes()


def decode(encoded: bytes) -> Image:
    """An image that knows its format and size and is read on demand.

    Raises:
        OSError: It is none, or one of a format that other programs are run for.
    """
    from PIL import Image, UnidentifiedImageError

    if not encoded:
        raise OSError("the file is empty")
    try:
        image = Image.open(io.BytesIO(encoded))
    except UnidentifiedImageError:
        raise OSError("cannot identify an image format in it") from None
    if image.format in ("EPS", "WMF"):  # whatever its name ends in
        raise OSError(f"it is a program that draws ({image.format}), and is not run")
    return image


def _plain(member: str) -> str:
    """A member's name without the "./" of some archivers, or the backslashes of others."""
    return "/".join(part for part in member.replace("\\", "/").split("/") if part != ".")


def _check_size(size: int) -> None:
    if size > LARGEST:
        raise OSError(f"it has {size:,} bytes; an image may have {LARGEST:,}")


def _stop(error: OSError) -> None:
    raise DataError(
        f"'{error.filename}' cannot be read ({error.strerror}), so images would be missing. "
        "Correct its rights, or pass a folder without it."
    ) from error


def open_source(path: str | Path) -> Source:
    """Open what a path names.

    Raises:
        DataError: There is nothing of that name.
    """
    if path == "demo":
        return Demo()
    kind, _, size = str(path).partition(":")
    if kind == "synthetic" and size.isdigit() and int(size) > 0:
        return Synthetic(int(size))
    root = Path(path).expanduser()
    if root.is_dir():
        return Folder(root)
    if root.is_file():
        return Zip(root)
    raise DataError(
        f"There is no image folder or .zip archive at '{path}' (looked in {Path.cwd()}). "
        "Give the path of one, 'demo' for the embedded images, or 'synthetic:N' for random ones."
    )
