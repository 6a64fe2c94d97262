"""Plug-ins that cannot be used say which package, which entry point and why."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import mergence
from mergence import family, method
from mergence.errors import PluginError

REASONS = {
    "raise ImportError('No module named\\n  missing_thing.')": (
        " ({file}, line 1): ImportError: No module named missing_thing. If it is yours"
    ),
    "def half(x):\n    return x / 0\nTHING = half(1)": (
        " ({file}, line 2): ZeroDivisionError: division by zero. If it is yours"
    ),
    "from mergence import KeepRate\nTHING = KeepRate(keep_rate=5)": (
        " ({file}, line 2): ScheduleError: keep_rate is 5; give a number above 0 and at most 1. If"
    ),
    "": ": AttributeError: module 'broken_plugin' has no attribute 'THING'. If it is yours",
}


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Installs a package `broken-plugin` with some code under an entry point `thing`."""
    forget: list[Any] = [family.registry.cache_clear, method._discover.cache_clear]

    def install(group: str, code: str) -> None:
        (tmp_path / "broken_plugin.py").write_text(code, encoding="utf-8")
        info = tmp_path / "broken_plugin-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-plugin\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[{group}]\nthing = broken_plugin:THING\n")
        monkeypatch.syspath_prepend(tmp_path)
        for clear in forget:
            clear()

    monkeypatch.delitem(sys.modules, "broken_plugin", raising=False)
    yield install
    monkeypatch.undo()
    sys.modules.pop("broken_plugin", None)
    for clear in forget:
        clear()


@pytest.mark.parametrize("code", REASONS, ids=["import", "any", "of ours", "no such name"])
@pytest.mark.parametrize("group", ["mergence.families", "mergence.methods"])
def test_what_cannot_be_loaded_is_named_with_the_reason(
    plugin: Callable[..., None], group: str, code: str, tmp_path: Path
) -> None:
    plugin(group, code)
    said = (
        f"The plug-in 'broken-plugin' (entry point 'thing = broken_plugin:THING' of {group}) "
        f"cannot be loaded{REASONS[code].format(file=tmp_path / 'broken_plugin.py')}"
    )
    ask = family.registry if group == "mergence.families" else method.names
    for _ in range(2):  # an error is not remembered as an answer
        with pytest.raises(PluginError, match=re.escape(said)) as caught:
            ask()
        assert caught.value.__cause__ is not None
        assert "\n" not in str(caught.value)
    with pytest.raises(mergence.MergenceError, match=re.escape(said)):
        mergence.apply(torch.nn.Identity(), "mergence", macs=0.67)


@pytest.mark.parametrize(
    ("group", "wanted"),
    [("mergence.families", "Family"), ("mergence.methods", "Method")],
)
def test_what_is_something_else_is_named(
    plugin: Callable[..., None], group: str, wanted: str
) -> None:
    plugin(group, "class THING: pass")
    said = rf"'broken-plugin' \(.* of {group}\) names <class 'broken_plugin\.THING'>.*{wanted}"
    with pytest.raises(PluginError, match=said):
        mergence.apply(torch.nn.Identity(), "mergence", macs=0.67)


def test_without_it_everything_is_as_before() -> None:
    assert "timm" in family.registry()
    assert "mergence" in method.names()
