"""The oldest release of a library that a family of it reads is the one that the extra asks for."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from torch.torch_version import TorchVersion

from mergence import family

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
EXTRAS = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]


@pytest.mark.parametrize("library", ["timm", "transformers"])
def test_the_extra_asks_for_what_the_families_read(library: str) -> None:
    families = family.registry().values()
    oldest = [one.oldest for one in families if one.models[0].partition(".")[0] == library]
    assert f"{library}>={min(oldest, key=TorchVersion)}" in EXTRAS[library]
    # Those of models that came later ask for more.
    assert family.registry()[library].oldest == min(oldest, key=TorchVersion)


def test_the_families_of_two_libraries_know_how_old_they_may_be() -> None:
    assert {"timm", "timm_eva", "timm_beit", "timm_naflex", "transformers"} <= {
        name for name, one in family.registry().items() if one.oldest
    }
