"""The page that says what is covered is what the registry says."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_the_support_matrix_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "tools" / "support_matrix.py"))
    text = (ROOT / "docs" / "families" / "README.md").read_text(encoding="utf-8")
    assert made["table"]() in text, "run python tools/support_matrix.py"
    for line in made["page"]().splitlines():
        if line.startswith("- `"):  # what is covered, and what is refused
            assert line in text, "run python tools/support_matrix.py"
