"""The oldest release of a library that its family reads is the one that the extra asks for."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from mergence import family

PROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"
EXTRAS = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]


@pytest.mark.parametrize("name", [name for name, one in family.registry().items() if one.oldest])
def test_the_extra_asks_for_what_the_family_reads(name: str) -> None:
    one = family.registry()[name]
    library = one.models[0].partition(".")[0]
    assert f"{library}>={one.oldest}" in EXTRAS[library]


def test_the_families_of_two_libraries_know_how_old_they_may_be() -> None:
    assert {"timm", "timm_eva", "timm_beit", "timm_naflex", "transformers"} <= {
        name for name, one in family.registry().items() if one.oldest
    }
