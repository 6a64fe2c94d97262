"""Recipe files as what a run reduces by: their names, and what became of them since."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from mergence.errors import OptionError
from mergence.recipe import make
from mergence.train import Config
from mergence.train.build import recipes_of

Build = Callable[..., Config]


def write(path: Path, macs: float = 0.67) -> str:
    path.parent.mkdir(exist_ok=True)
    make("mergence", macs=macs).save(path)
    return str(path)


@pytest.mark.parametrize("name", ["mergence", "config", "dense"])
def test_names_that_the_library_uses_are_refused(config: Build, tmp_path: Path, name: str) -> None:
    first = write(tmp_path / "first.json")
    second = write(tmp_path / "other" / f"{name}.json", 0.5)
    with pytest.raises(OptionError, match=rf"called '{name}'.*Rename"):
        recipes_of(config(recipe=[first, second]))


def test_the_recipe_of_a_trained_model_may_come_first(config: Build, tmp_path: Path) -> None:
    saved, second = write(tmp_path / "mergence.json"), write(tmp_path / "second.json", 0.5)
    assert list(recipes_of(config(recipe=saved))) == ["mergence"]
    assert list(recipes_of(config(recipe=[saved, second]))) == ["mergence", "second"]
    with pytest.raises(OptionError, match="called 'dense'"):
        recipes_of(config(recipe=write(tmp_path / "dense.json")))
