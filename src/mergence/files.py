"""Files that are there whole or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
def staged(folder: Path, *, last: str = "") -> Iterator[Path]:
    """Lend a temporary folder whose files are moved into `folder` when all of them are written.

    Each file replaces one of its name in one step, and other files are left alone. Where anything
    fails before the first is moved, `folder` stays as it was.

    Args:
        folder: Where the files go; made where it is missing, below a folder that exists.
        last: Name of the file that is moved after all others.

    Raises:
        OptionError: The folder cannot be made or written to.
    """
    made = not folder.exists()
    # Inside of the folder, because files can be moved in one step within one file system only.
    temporary = folder / f".mergence-{uuid.uuid4().hex[:8]}"
    try:
        folder.mkdir(exist_ok=True)
        temporary.mkdir()
    except OSError as error:
        raise OptionError(f"Nothing can be written to the folder '{folder}': {error}.") from error
    try:
        yield temporary
        for file in sorted(temporary.iterdir(), key=lambda file: (file.name == last, file.name)):
            file.replace(folder / file.name)
        made = False
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if made:
            folder.rmdir()
