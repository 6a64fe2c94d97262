"""Files that are there whole or not at all."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(folder: Path, *, last: str = "") -> Iterator[Path]:
    """Lend a temporary folder whose files are moved into `folder` when all of them are written.

    Each file replaces one of its name in one step, and other files are left alone. Where anything
    fails before the first is moved, `folder` stays as it was.

    Args:
        folder: Where the files go; made where it is missing, below a folder that exists.
        last: Name of the file that is moved after all others.
    """
    made = not folder.exists()
    folder.mkdir(exist_ok=True)
    # Inside of the folder, because files can be moved in one step within one file system only.
    temporary = folder / f".mergence-{uuid.uuid4().hex[:8]}"
    try:
        temporary.mkdir()
        yield temporary
        for file in sorted(temporary.iterdir(), key=lambda file: (file.name == last, file.name)):
            file.replace(folder / file.name)
        made = False
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if made:
            folder.rmdir()
