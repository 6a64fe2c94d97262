"""Files that are there whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mergence.errors import OptionError


def check_target(path: Path, what: str) -> None:
    """Refuse a file that could not be written when the work for it is done.

    Args:
        path: The file.
        what: What to call it in the error: the option that names it.

    Raises:
        OptionError: Its folder is missing or may not be written to, or it is a folder itself.
    """
    path = path.absolute()
    if not path.parent.is_dir():
        raise OptionError(f"{what}: there is no folder '{path.parent}'. Make it.")
    if path.is_dir():
        raise OptionError(f"{what}: '{path}' is a folder. Name a file.")
    place = path if path.exists() else path.parent
    if not os.access(place, os.W_OK):
        raise OptionError(
            f"{what}: '{place}' may not be written to. Name another place, or correct its rights."
        )


@contextmanager
def staged(folder: Path, *, last: str = "", what: Path | None = None) -> Iterator[Path]:
    """Lend a temporary folder whose files are moved into `folder` when all of them are written.

    Each file replaces one of its name in one step, and other files are left alone. Where anything
    fails before the first is moved, `folder` stays as it was.

    Args:
        folder: Where the files go; made where it is missing, below a folder that exists.
        last: Name of the file that is moved after all others.
        what: What to say cannot be written; the folder, if unset.

    Raises:
        OptionError: The folder cannot be made or written to, or has no room for the files.
    """
    made = not folder.exists()
    # Inside of the folder, because files can be moved in one step within one file system only.
    temporary = folder / f".mergence-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise OptionError(f"Nothing can be written to the folder '{folder}': {error}.") from error
    left = " Nothing was changed."
    try:
        yield temporary
        for file in sorted(temporary.iterdir(), key=lambda file: (file.name == last, file.name)):
            file.replace(folder / file.name)
            left = " Some of its files are the new ones."
        made = False
    except Exception as error:
        if (reason := _reason(error, folder)) is None:
            raise
        raise OptionError(f"'{what or folder}' cannot be written: {reason}.{left}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if made:
            folder.rmdir()


@contextmanager
def staged_file(path: Path) -> Iterator[Path]:
    """Lend a temporary place of one file, which replaces `path` when it is written.

    Where it cannot be replaced the place is its own: a device, a pipe, a file of two names or one
    that is mounted, or one that may be written to in a folder that may not.

    Raises:
        OptionError: It cannot be written.
    """
    place = path.resolve()  # a link stays one
    replaceable = place.parent.is_dir() and os.access(place.parent, os.W_OK)
    if path.exists():
        replaceable &= path.is_file() and path.stat().st_nlink == 1 and not os.path.ismount(place)
    if not replaceable:
        try:
            yield path
        except OSError as error:
            raise OptionError(f"'{path}' cannot be written: {error.strerror}.") from error
        return
    with staged(place.parent, what=path) as temporary:
        yield temporary / place.name
        if path.exists():
            shutil.copymode(path, temporary / place.name)


def write_text(path: Path, text: str) -> None:
    """Write a text file; it is there whole or not at all.

    Raises:
        OptionError: It cannot be written.
    """
    with staged_file(path) as file:
        file.write_text(text, encoding="utf-8")


def read_json(path: Path) -> Any:
    """What a JSON file holds.

    Raises:
        OSError: It cannot be read.
        ValueError: It holds no JSON, or such as no program writes.
    """
    try:
        # Windows puts a mark in front of UTF-8; this encoding reads files without it, too.
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def _reason(error: Exception, folder: Path) -> str | None:
    """Why the system did not write a file below a folder; None where the error is another."""
    if isinstance(error, OSError):
        name = error.filename  # None where a file was open already
        other = isinstance(name, str) and not Path(name).is_relative_to(folder)
        return None if other else error.strerror  # which libraries' own errors of this type lack
    from safetensors import SafetensorError  # slow to import, and this module is not

    return str(error) if isinstance(error, SafetensorError) else None
