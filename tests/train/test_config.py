"""One set of names for Python, YAML and flags; every mistake is named before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mergence.errors import OptionError
from mergence.train import Config
from mergence.train.config import read_yaml

NEEDED: dict[str, Any] = {"model": "demo", "data": "demo", "out": "run"}


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    config = Config.from_dict(NEEDED | {"macs": [0.67, 0.5], "set": {"alpha": 0.5}, "val": "demo"})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert Config.from_dict(read_yaml(tmp_path / "config.yaml")) == config
    assert list(read_yaml(tmp_path / "config.yaml")) == Config.names()


def test_yaml_writes_numbers_in_its_own_ways() -> None:
    # YAML 1.1 reads 5e-5, without a dot, as a string.
    values = yaml.safe_load("{lr: 5e-5, macs: 0.67, recipe: a.json, weight_decay: 0, epochs: 3}")
    config = Config.from_dict(NEEDED | values)
    assert (config.lr, config.macs, config.recipe) == (5e-5, (0.67,), ("a.json",))
    assert (config.weight_decay, config.epochs) == (0.0, 3)
    assert Config.from_dict(NEEDED | {"epochs": "3"}).epochs == 3  # as quoted fractions are
    # And no as false.
    assert Config.from_dict(NEEDED | yaml.safe_load("precision: no")).precision == "no"


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "unknown key": ({"learning_rate": 1}, "unknown key 'learning_rate'"),
    "misspelt key": ({"epoch": 1}, "Did you mean 'epochs'?"),
    "text for a number": ({"lr": "fast"}, "lr is 'fast', a str; give float"),
    "a fraction of an epoch": ({"epochs": 1.5}, "epochs is 1.5"),
    "text for a whole number": ({"epochs": "1.5"}, "epochs is '1.5', a str; give int"),
    "a flag as a number": ({"epochs": True}, "epochs is True, a bool; give int"),
    "none for a number": ({"lr": None}, "lr is None"),
    "out of range": ({"smoothing": 2}, "smoothing is 2.0; give a number from 0 to 1"),
    "no images": ({"batch_size": 0}, "batch_size is 0; give a number at least 1"),
    "yes for a precision": ({"precision": True}, "precision is True, a bool; give one of no, bf16"),
    "unknown precision": ({"precision": "int4"}, "give one of no, bf16, fp16"),
    "a list of options": ({"set": ["alpha"]}, "set is ['alpha'], a list; give dict"),
    "text among shares": ({"macs": [0.5, "x"]}, "macs is 'x'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_named(case: str) -> None:
    values, says = WRONG[case]
    with pytest.raises(OptionError) as problem:
        Config.from_dict(NEEDED | values)
    assert says in str(problem.value)


def test_what_is_missing_is_listed() -> None:
    with pytest.raises(OptionError, match=r"lacks data, out\. A run needs at least model, data, o"):
        Config.from_dict({"model": "demo"})


def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="cannot be read"):
        read_yaml(tmp_path / "nowhere.yaml")
    file = tmp_path / "config.yaml"
    file.write_text("- a\n- b\n")
    with pytest.raises(OptionError, match="holds a list"):
        read_yaml(file)
    for content in ("a: [", "[" * 20_000, f"a: {'9' * 5000}", "a: 2026-99-99"):
        file.write_text(content)
        with pytest.raises(OptionError, match="cannot be read"):
            read_yaml(file)
