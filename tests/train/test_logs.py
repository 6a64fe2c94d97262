"""What a run writes down for people."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergence.train.logs import Logs


def test_a_run_that_starts_anew_has_its_first_step_once(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for _ in range(2):  # the first one fell before it had a checkpoint
        logs = Logs(tmp_path, 0, tensorboard=True)
        logs.epoch({"epoch": 0, "update": 0, "dense top1": 50.0})
        logs.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [e.step for e in events.Scalars("epoch/dense top1")] == [0]
