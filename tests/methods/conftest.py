"""Plans of small hand-made inputs."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from mergence.method import build
from mergence.plan import MergePlan


@pytest.fixture(scope="session")
def plan_of(view: Any) -> Callable[..., MergePlan]:
    """The plan of a method, by name, for one image given as `[N, C]` rows."""

    def plan(
        method: str,
        slots: int,
        x: Any,
        *,
        options: dict[str, Any] | None = None,
        **named: Any,
    ) -> MergePlan:
        return build(method, options or {}).plan(view(x, **named), slots)

    return plan


@pytest.fixture(scope="session")
def at() -> Callable[..., list[tuple[float, float]]]:
    """Vectors of length one at angles in degrees."""

    def vectors(*degrees: float) -> list[tuple[float, float]]:
        return [(math.cos(math.radians(d)), math.sin(math.radians(d))) for d in degrees]

    return vectors
