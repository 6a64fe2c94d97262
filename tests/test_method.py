"""The method registry and the base class, by example of a method of someone else's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import mergence
from mergence import family
from mergence import method as methods
from mergence.errors import OptionError, PlanError, UnknownNameError
from mergence.multiscale import MultiScaleFusion
from mergence.plan import MergePlan, TokenView
from mergence.planning import keep_highest
from mergence.schedule import KeepRate, Schedule


@pytest.fixture
def pairs() -> Iterator[type[mergence.Method]]:
    """As the docs tell the reader to write one: neighbours merge, the rest stays."""

    @mergence.register("pairs")
    @dataclass(frozen=True, kw_only=True)
    class Pairs(mergence.Method):
        shape: ClassVar[Schedule] = KeepRate()

        def plan(self, tokens: TokenView, slots: int) -> MergePlan:
            count = tokens.size.shape[1]
            slot = (torch.arange(count) - (count - slots)).clamp(min=0)
            return MergePlan(slot.expand_as(tokens.size), tokens.size, slots)

    yield Pairs
    del methods._REGISTRY["pairs"]


def test_every_method_of_the_issue_is_there_and_says_what_it_is() -> None:
    assert {"mergence", "mstm", "tome", "evit", "topk", "random"} <= set(methods.names())
    for name, cls in methods.registry().items():
        assert cls.name == name
        assert cls.__doc__
        assert isinstance(cls.shape, Schedule)


def test_a_registered_method_is_found_and_runs(pairs: type[mergence.Method]) -> None:
    assert "pairs" in methods.names()
    model: nn.Module = family.registry()["timm"].tiny()["vit"]()
    mergence.apply(model, "pairs", schedule=[36, 30, 30, 30, 30, 30])
    trace = mergence.trace(model, torch.randn(1, 3, 96, 96))
    assert trace.points[0].source.tolist() == [[0] * 7 + list(range(1, 30))]
    assert trace.points[0].size.tolist() == [[7.0] + [1.0] * 29]


def test_a_taken_name_is_refused_and_stays_with_its_owner() -> None:
    owner = methods.registry()["tome"]
    with pytest.raises(UnknownNameError, match=r"'tome' is taken by mergence\.methods\.tome\.ToMe"):

        @mergence.register("tome")
        @dataclass(frozen=True, kw_only=True)
        class Mine(mergence.Method):
            def plan(self, tokens: Any, slots: int) -> Any: ...

    assert methods.registry()["tome"] is owner


def test_a_method_of_another_module_may_not_take_a_name_by_calling_itself_alike() -> None:
    owner = methods.registry()["topk"]
    impostor = type("TopK", (owner,), {"__module__": "elsewhere", "__qualname__": "TopK"})
    try:
        with pytest.raises(UnknownNameError, match="taken"):
            mergence.register("topk")(impostor)
    finally:
        methods._REGISTRY["topk"] = owner


def test_a_method_without_a_rule_cannot_be_made() -> None:
    with pytest.raises(TypeError, match="abstract"):
        mergence.Method()  # type: ignore[abstract]


def test_an_option_without_a_default_is_asked_for(
    pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Demanding(pairs):  # type: ignore[misc]
        k: int

    monkeypatch.setitem(methods._REGISTRY, "pairs", Demanding)
    with pytest.raises(OptionError, match=r"'pairs' needs a value for its option 'k'.*k=\.\.\."):
        methods.build("pairs", {})
    assert methods.build("pairs", {"k": 3}) == Demanding(k=3)


def kept(tokens: TokenView, slots: int) -> MergePlan:
    return keep_highest(tokens.size, slots).drop(tokens.size)


WRONG: dict[str, tuple[Callable[[TokenView, int], Any], str]] = {
    "more slots": (lambda t, s: kept(t, s + 2), "made 27 slots where 25"),
    "fewer slots": (lambda t, s: kept(t, s - 1), "made 24 slots where 25"),
    "no plan": (lambda t, s: None, "NoneType in place of a MergePlan"),
    "numbers": (lambda t, s: replace(kept(t, s), slot=t.size), "slots of torch.float32"),
    "weights": (lambda t, s: replace(kept(t, s), weight=t.size.long()), "weights of torch.int64"),
    "short": (lambda t, s: replace(kept(t, s), weight=t.size[:, 1:]), r"weight is \[2, 35\]"),
    "one image": (lambda t, s: replace(kept(t, s), slot=kept(t, s).slot[0]), r"slot is \[36\]"),
    "one for all": (lambda t, s: replace(kept(t, s), slot=kept(t, s).slot[:1]), r"slot is \[1, 36"),
    "a list": (lambda t, s: replace(kept(t, s), slot=[0] * 36), "slot is a list; give a tensor"),
    "no weight": (lambda t, s: replace(kept(t, s), weight=None), "weight is a NoneType; give a"),
    "in place": (lambda t, s: (t.x.sub_(1), kept(t, s))[1], "'pairs' changed the tokens or"),
    "in place, sizes": (lambda t, s: (t.size.add_(1), kept(t, s))[1], r"in place.*x\.clone\(\)"),
    "too many": (lambda t, s: kept(t, 99), "99 of 36 tokens are to stay"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_plan_says_what_is_wrong(name: str, pairs: Any) -> None:
    rule, message = WRONG[name]
    pairs.plan = lambda self, tokens, slots: rule(tokens, slots)
    model: nn.Module = family.registry()["timm"].tiny()["vit"]()
    mergence.apply(model, "pairs", schedule=[36, 25, 25, 25, 25, 25])
    with pytest.raises(PlanError, match=message):
        model(torch.randn(2, 3, 96, 96))


GIVEN: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "nothing": (lambda x: None, "gives NoneType"),
    "fewer": (lambda x: x[:, ::2], r"gives \[2, 18, 48\] of torch.float32"),
    "several": (lambda x: (x, x), "gives tuple"),
    "as a grid": (lambda x: x.unflatten(1, (6, 6)), r"gives \[2, 6, 6, 48\]"),
    "finer": (lambda x: x.double(), r"gives \[2, 36, 48\] of torch.float64"),
}


@pytest.mark.parametrize("name", GIVEN)
def test_what_a_learned_module_gives_wrongly_is_named(
    name: str, pairs: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    change, message = GIVEN[name]
    monkeypatch.setattr(MultiScaleFusion, "forward", lambda self, x, grid: change(x))
    pairs.learned = lambda self, dim: MultiScaleFusion(dim)
    model: nn.Module = family.registry()["timm"].tiny()["vit"]()
    mergence.apply(model, "pairs", schedule=[36, 25, 25, 25, 25, 25])
    with pytest.raises(PlanError, match=rf"of method 'pairs' {message}.*\[2, 36, 48\] of torch.fl"):
        model(torch.randn(2, 3, 96, 96))
    change = Tensor.bfloat16  # as autocast has it
    assert model(torch.randn(2, 3, 96, 96)).dtype == torch.float32


def test_what_cannot_be_a_method_is_refused_when_it_is_registered(pairs: Any) -> None:
    before = methods.names()
    for needs in ("keys", {"key"}):
        wrong = type("Wrong", (pairs,), {"needs": needs})
        with pytest.raises(OptionError, match=r"Wrong\.needs is .*'key.*importance, keys"):
            mergence.register("wrong")(wrong)
    with pytest.raises(OptionError, match="no subclass of Method"):
        mergence.register("wrong")(len)  # type: ignore[type-var]
    assert methods.names() == before


def test_a_method_without_a_name_of_its_own_is_refused(pairs: Any) -> None:
    model: nn.Module = family.registry()["timm"].tiny()["vit"]()
    for unnamed in (type("Heir", (pairs,), {}), type("Heir", (mergence.Method,), {"plan": kept})):
        with pytest.raises(OptionError, match=r"Heir has no name of its own.*register\("):
            mergence.apply(model, unnamed(), keep_rate=0.7)
    del pairs.shape
    with pytest.raises(OptionError, match="'pairs' has no schedule of its own"):
        mergence.apply(model, "pairs", macs=0.67)
    pairs.learned = lambda self, dim: nn.Identity()
    with pytest.raises(OptionError, match=r"learns is a Identity.*mergence\.method\.Learned"):
        mergence.apply(model, "pairs", keep_rate=0.7)


@pytest.mark.slow
def test_the_name_of_a_method_cannot_be_taken_before_it_is_first_used() -> None:
    script = """
import mergence
class Mine(mergence.Method):
    def plan(self, tokens, slots): ...
try:
    mergence.register("topk")(Mine)
except mergence.MergenceError as error:
    print(error)
print(mergence.methods.TopK, mergence.train.Config, mergence.errors.PlanError)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert (
        "taken by mergence.methods.topk.TopK. Choose another name for __main__.Mine" in done.stdout
    )
    assert "mergence.errors.PlanError" in done.stdout
