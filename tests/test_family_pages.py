"""The examples on the pages of the families run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

PAGES = sorted((Path(__file__).resolve().parents[1] / "docs" / "families").glob("[a-z]*.md"))
EXAMPLE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_examples_of_the_page_run(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    examples = EXAMPLE.findall(page.read_text(encoding="utf-8"))
    assert examples, f"{page} shows no example"
    scope: dict[str, object] = {}
    for example in examples:
        exec(compile(example, str(page), "exec"), scope)
    assert "patch tokens" in capsys.readouterr().out
    reduced, dense = scope["logits"], scope["dense"]
    assert reduced.shape == dense.shape  # type: ignore[attr-defined]
    assert not reduced.equal(dense)  # type: ignore[attr-defined]
