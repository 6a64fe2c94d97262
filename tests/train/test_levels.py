"""Which reduction is applied at which step."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import timm
import torch
from torch import nn

import mergence
from mergence import family
from mergence.errors import OptionError, ScheduleError
from mergence.outputs import answer
from mergence.recipe import make
from mergence.train.levels import Choice, Reducer, Timetable


@pytest.fixture
def model() -> nn.Module:
    size: dict[str, Any] = {"embed_dim": 48, "depth": 6, "num_heads": 3, "img_size": 96}
    made: nn.Module = timm.create_model("vit_tiny_patch16_224", num_classes=10, **size)
    return made


@pytest.fixture
def image() -> torch.Tensor:
    return torch.randn(2, 3, 96, 96)


def strengths(table: Timetable, epochs: int) -> list[float]:
    return [table.at(update).strength for update in range(epochs * table.steps)]


def test_one_recipe_is_applied_at_every_step() -> None:
    table = Timetable(recipes=("a",), steps=5)
    assert {table.at(update) for update in range(50)} == {Choice("a", 1.0)}


def test_recipes_take_turns_at_random_but_the_same_in_every_process() -> None:
    table = Timetable(recipes=("a", "b", "c"), steps=5, seed=1)
    drawn = [table.at(update).recipe for update in range(600)]
    assert drawn == [table.at(update).recipe for update in range(600)]
    assert all(150 < count < 250 for count in Counter(drawn).values())
    assert drawn != [
        Timetable(recipes=("a", "b", "c"), steps=5, seed=2).at(u).recipe for u in range(600)
    ]


def test_steps_beyond_the_plan_draw_a_recipe_each() -> None:
    table = Timetable(recipes=("a", "b"), steps=5, warmup=2)
    found = [table.at(4, update) for update in range(4, 104)]
    assert found[0] == table.at(4)
    assert {choice.strength for choice in found} == {found[0].strength}
    assert {choice.recipe for choice in found} == {"a", "b"}


def test_the_warm_up_goes_from_dense_to_full_along_a_cosine() -> None:
    found = strengths(Timetable(recipes=("a",), steps=4, warmup=2), 4)
    assert found[0] == 0
    assert found[4] == pytest.approx(0.5)
    assert found[8:] == [1.0] * 8
    assert found == sorted(found)


def test_epochs_switch_the_reduction_on_and_off() -> None:
    def epochs(text: str, warmup: float = 0) -> list[float]:
        return strengths(Timetable(recipes=("a",), steps=1, epochs=text, warmup=warmup), 6)

    assert epochs("all") == [1] * 6
    assert epochs("none") == [0] * 6
    assert epochs("2-3, 5") == [0, 1, 1, 0, 1, 0]
    assert epochs("4-") == [0, 0, 0, 1, 1, 1]
    # The warm-up begins with the first reduced epoch.
    assert epochs("3-", warmup=2) == [0, 0, 0, pytest.approx(0.5), 1, 1]


@pytest.mark.parametrize("text", ["", "0-3", "3-2", "1,,2", "a", "1:3", "some"])
def test_epochs_that_cannot_be_read_are_refused(text: str) -> None:
    with pytest.raises(OptionError, match="reduce_epochs is"):
        Timetable(recipes=("a",), steps=1, epochs=text)


def test_a_choice_changes_the_model_and_back(model: nn.Module, image: torch.Tensor) -> None:
    recipes = {"mild": make("mergence", macs=0.8), "strong": make("tome", macs=0.6)}
    dense = model.eval()(image)
    expected = {}
    for name, recipe in recipes.items():
        with mergence.applied(model, recipe):
            expected[name] = model(image)
    reducer = Reducer(model, recipes)
    for name in ("mild", "strong", "mild"):
        program = reducer.select(Choice(name, 1.0))
        assert torch.equal(model(image), expected[name])
        assert mergence.recipe_of(model).method == recipes[name].method == program.method
    reducer.select(Choice("strong", 0.0))
    assert torch.equal(model(image), dense)
    mergence.remove(model)
    assert torch.equal(model(image), dense)


@pytest.mark.parametrize("method", ["mergence", "tome", "evit", "mctf"])
def test_strength_goes_from_dense_to_the_recipe(model: nn.Module, method: str) -> None:
    reducer = Reducer(model, {"a": make(method, macs=0.5)})
    full = reducer.program(Choice("a", 1.0))
    shares = []
    for strength in (0.0, 0.01, 0.25, 0.5, 0.75, 1.0):
        program = reducer.select(Choice("a", strength))
        shares.append(program.macs().total)
        if strength:
            assert program.first_reduction() == full.first_reduction()
        model(torch.zeros(1, 3, 96, 96))
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == full.macs(dense=True).total
    assert shares[-1] == full.macs().total


def test_coarse_patches_come_with_strength(model: nn.Module) -> None:
    reducer = Reducer(model, {"a": make("mergence", macs=0.4, coarse=0.6)})
    patches, starts = 36, []
    for strength in (0.0, 0.2, 0.5, 0.8, 1.0):
        program = reducer.select(Choice("a", strength))
        starts.append(program.tokens(patches)[0])
        assert max(program.counts()) <= starts[-1]
        model(torch.zeros(1, 3, 96, 96))
    assert starts[0] == patches
    assert starts == sorted(starts, reverse=True)
    assert starts[-1] == patches - 3 * 5


def test_a_learned_module_is_put_in_once(model: nn.Module, image: torch.Tensor) -> None:
    reducer = Reducer(
        model, {str(rate): make("mstm", keep_rate=rate, fusion=True) for rate in (0.5, 0.7)}
    )
    before = dict(model.named_parameters())
    assert sum(".mergence.gates" in name for name in before) == 1
    for choice in (Choice("0.5", 1.0), Choice("0.7", 0.5), Choice("0.5", 0.0)):
        reducer.select(choice)
        model(image)
        assert all(before[name] is p for name, p in model.named_parameters())


def test_recipes_must_agree_on_the_place_of_a_learned_module(model: nn.Module) -> None:
    fused = {
        "early": make("mstm", schedule=[30, 30, 20, 20, 20, 20], fusion=True),
        "late": make("mstm", schedule=[36, 36, 20, 20, 20, 20], fusion=True),
    }
    with pytest.raises(ScheduleError, match=r"late 3, early 1"):
        Reducer(model, fused)


def test_models_of_every_family_change_their_reduction(tiny_model: nn.Module) -> None:
    model = tiny_model
    image = torch.randn(2, *family.find(model).input_shape(model))
    dense = answer(model(image))
    with mergence.applied(model, "mergence", keep_rate=0.7):
        expected = answer(model(image))
    reducer = Reducer(model, {"a": make("mergence", keep_rate=0.7)})
    for strength, output in ((1.0, expected), (0.0, dense), (1.0, expected)):
        reducer.select(Choice("a", strength))
        assert torch.equal(answer(model(image)), output)
