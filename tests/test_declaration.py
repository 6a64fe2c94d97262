"""What a method's class declares wrongly is refused when it is registered."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest

import mergence
from mergence import method as methods
from mergence.errors import OptionError
from mergence.methods import Mergence
from mergence.schedule import KeepRate

frozen = dataclass(frozen=True, kw_only=True)


def plain() -> Any:
    class A(Mergence):
        alpha = 0.0
        size_attention = 0.0

    return A


def unannotated() -> Any:
    @frozen
    class A(Mergence):
        alpha = 0.0  # type: ignore[misc]

    return A


def undecorated() -> Any:
    class A(Mergence):
        alpha: float = 0.0

    return A


def mixed_in() -> Any:
    class Ablation:
        alpha = 0.0

    return frozen(type("A", (Ablation, Mergence), {}))


def new_and_undecorated() -> Any:
    class A(Mergence):
        beta: float = 0.5

    return A


def needs_as_option() -> Any:
    @frozen
    class A(Mergence):
        needs: frozenset[str] = frozenset({"keys"})  # type: ignore[misc]

    return A


def learned_as_option() -> Any:
    @frozen
    class A(Mergence):
        learned: bool = True  # type: ignore[assignment]

    return A


def declaring(**attributes: Any) -> Callable[[], Any]:
    return lambda: type("A", (Mergence,), attributes)


HOW = r"Put @dataclass\(frozen=True, kw_only=True\) above the class and annotate it"
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "plain": (plain, rf"A\.size_attention = 0\.0 would have no effect.*{HOW}"),
    "unannotated": (unannotated, rf"A\.alpha = 0\.0 would.*{HOW}: alpha: float = 0\.0\."),
    "undecorated": (undecorated, rf"A\.alpha = 0\.0 would.*{HOW}: alpha: float = 0\.0\."),
    "mixed in": (mixed_in, r"A\.alpha = 0\.0 would have no effect"),
    "new": (new_and_undecorated, rf"A\.beta is annotated and is no option\. {HOW}"),
    "needs as option": (needs_as_option, r"option of 'needs'.*write needs: ClassVar\[\.\.\.\]"),
    "method as option": (learned_as_option, "option of 'learned'.*rename"),
    "needs": (declaring(needs=["keys"]), r"A\.needs is \['keys'\]; give a frozenset of imp"),
    "shape": (declaring(shape=KeepRate), r"A\.shape is <class.*; give a schedule"),
    "tunable": (declaring(tunable=["alpha"]), r"tunable is \['alpha'\]; give a mapping"),
    "tuned": (declaring(tunable={"alfa": (1,)}), "names 'alfa', which is no.*coarse, alpha"),
    "number": (declaring(tunable={"alpha": 0.5}), r"holds 0\.5 for 'alpha'; give numbers"),
    "texts": (declaring(tunable={"alpha": ("a", "b")}), r"holds \('a', 'b'\) for.*an order"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_would_have_no_effect_or_fail_later_is_refused(name: str) -> None:
    make, message = WRONG[name]
    before = methods.names()
    with pytest.raises(OptionError, match=message):
        mergence.register("wrong")(make())
    assert methods.names() == before


@pytest.mark.parametrize("name", [3, "", "a.json", "mine/a", Mergence])
def test_what_can_be_no_name_is_refused(name: Any) -> None:
    with pytest.raises(OptionError, match=r'method\'s name is .*@mergence\.register\("name"\)'):
        mergence.register(name)


def test_what_has_an_effect_is_registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_REGISTRY", dict(methods._REGISTRY))

    class Parent(Mergence):
        width: ClassVar[int] = 3

    @mergence.register("right")
    @frozen
    class Right(Parent):
        tunable: ClassVar[Any] = {"alpha": (0, 0.5), "soft": (False, True)}
        alpha: float = 0.0
        soft: bool = False

    @mergence.register("made")
    @frozen
    class Made(Right):
        alpha: float = field(default_factory=lambda: 0.1)

    @mergence.register("heir")
    class Heir(Right):
        def fewest_slots(self, tokens: int) -> int:
            return 2

    assert (Heir().alpha, Made().alpha) == (0.0, 0.1)
    assert methods.build("heir", {"soft": True}) == Heir(soft=True)
