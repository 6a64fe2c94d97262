"""Files stay small: no file grows by "one more method" or "one more model"."""

from __future__ import annotations

from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[2]
LONGEST = 400
MEDIAN = 150


def lengths(folder: str) -> dict[str, int]:
    """Lines of each Python file of a folder."""
    return {
        str(file.relative_to(ROOT)): len(file.read_text(encoding="utf-8").splitlines())
        for file in sorted((ROOT / folder).rglob("*.py"))
    }


@pytest.mark.parametrize("folder", ["src", "tests"])
def test_no_file_is_too_long(folder: str) -> None:
    long = {file: lines for file, lines in lengths(folder).items() if lines > LONGEST}
    assert not long, f"over {LONGEST} lines, split by subject: {long}"


@pytest.mark.parametrize("folder", ["src", "tests"])
def test_the_median_file_is_short(folder: str) -> None:
    found = median(lengths(folder).values())
    assert found < MEDIAN, f"the median file of {folder}/ has {found:.0f} lines, not under {MEDIAN}"
