"""One run at a time in a folder."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mergence.errors import OptionError

LOCK = ".lock"


@contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep other processes from training in a folder, which is made where it is missing.

    The system lets go of the folder when this process ends, however it ends. Of file systems
    without locks, and of Windows, there is no protection. The file stays: one that is removed could
    still be waited at while others lock the next of its name.

    Raises:
        OptionError: Another process has it, or nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / LOCK).open("a")
    except OSError as error:
        raise OptionError(f"The folder '{folder}' cannot be written to: {error}.") from error
    with file:
        try:
            import fcntl

            # Not flock: the processes that read images would hold it for a while after ours.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:
            pass
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                raise OptionError(
                    f"Another process trains in '{folder}'. Wait until it has ended, or end it, "
                    "and go on with --resume; or choose another folder. Where both were meant to "
                    "be one run, start them by torchrun or accelerate launch."
                ) from error
        yield
