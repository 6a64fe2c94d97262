"""What a run writes down for people: CSV files, TensorBoard, and where it stands."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergence.errors import CheckpointError

Row = dict[str, Any]


@dataclass(frozen=True)
class Status:
    """Where a run stands after a step.

    Attributes:
        update: Steps done.
        updates: Steps of the whole run, as far as a stream says how long it is.
        epoch: The epoch under way, counted from 1.
        epochs: Epochs of the run.
        loss: Mean loss of the step.
        images_per_s: Images per second since this process started training, over all processes.
        seconds_left: At this speed, until the end of the last epoch.
    """

    update: int
    updates: int
    epoch: int
    epochs: int
    loss: float
    images_per_s: float
    seconds_left: float


class Logs:
    """`steps.csv` and `epochs.csv` in a folder, and TensorBoard's events where asked for.

    Args:
        folder: The run's folder.
        update: The step that the run goes on from; what was noted of later ones is dropped.
        tensorboard: Write events as well.
    """

    def __init__(self, folder: Path, update: int, *, tensorboard: bool) -> None:
        self.folder = folder
        self.steps = [row for row in _read(folder / "steps.csv") if int(row["update"]) <= update]
        self.events: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            events: Any = SummaryWriter  # it is not typed
            # A run that starts anew counts its first validation as step 0.
            self.events = events(str(folder / "tensorboard"), purge_step=update and update + 1)

    def step(self, row: Row) -> None:
        """Note a step."""
        self.steps.append(row)
        self._event("train", row, ("loss", "lr", "images_per_s", "strength"))

    def write(self, history: Sequence[Row]) -> None:
        """Write both files.

        Raises:
            CheckpointError: They cannot be written.
        """
        _write(self.folder / "steps.csv", self.steps)
        _write(self.folder / "epochs.csv", history)

    def epoch(self, row: Row) -> None:
        """Note an epoch."""
        self._event("epoch", row, [key for key in row if key not in ("epoch", "update")])

    def close(self) -> None:
        """Finish TensorBoard's file."""
        if self.events is not None:
            self.events.close()

    def _event(self, group: str, row: Row, keys: Sequence[str]) -> None:
        for key in keys if self.events is not None else ():
            if row.get(key) is not None:
                self.events.add_scalar(f"{group}/{key}", row[key], row["update"])


def _read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    text = io.StringIO()
    names = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(text.getvalue(), encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise CheckpointError(
            f"'{path}' cannot be written: {error}. Make room, or correct the folder's rights; "
            "--resume goes on from the last checkpoint."
        ) from error
