"""Recipe files as what a run reduces by: their names, and what became of them since."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from mergence.errors import OptionError
from mergence.recipe import make
from mergence.train import Config, fit
from mergence.train.build import recipes_of
from mergence.train.run import Run

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


def test_a_recipe_that_says_something_else_is_noted(config: Build, tmp_path: Path) -> None:
    settings = config(recipe=write(tmp_path / "a.json"), epochs=1, limit=16)
    fit(settings)
    make("mergence", macs=0.67).save(tmp_path / "b.json")
    written = (tmp_path / "b.json").read_text().replace('"notes": {}', '"notes": {"a": 1}')
    (tmp_path / "a.json").write_text(written)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Run(settings).restore()
    write(tmp_path / "a.json", 0.5)
    says = r"goes on with other options: schedule of 'a' .*0\.67.* is now .*0\.5"
    with pytest.warns(UserWarning, match=says):
        assert Run(settings).restore()
    # A version before this one did not write down what they said.
    (file,) = (tmp_path / "run" / "checkpoints").rglob("trainer.pt")
    state = torch.load(file, weights_only=True)
    del state["recipes"]
    torch.save(state, file)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Run(settings).restore()
