"""Recipes: JSON in and out, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mergence
from mergence import family, schedule
from mergence import method as methods
from mergence.errors import MergenceError, OptionError, RecipeError
from mergence.files import staged
from mergence.method import Method, build, register
from mergence.methods import Mergence
from mergence.recipe import Recipe, make
from mergence.schedule import Constant, Counts, KeepRate, Macs

RECIPE = Recipe(
    build("mergence", {"alpha": 0.5}),
    Macs(macs=0.67, shape=KeepRate(blocks=(4, 7))),
    align=8,
    notes={"measured": {"top1": 81.4}},
)


@pytest.fixture
def vit() -> nn.Module:
    return family.registry()["timm"].tiny()["vit"]()


@pytest.mark.parametrize(
    "recipe",
    [
        RECIPE,
        make("tome", r=1.5),
        make("evit", keep_rate=0.7),
        make("mstm", schedule=[36, 30, 20, 10, 10, 10], fusion=True),
        make(macs=0.67),
    ],
    ids=lambda recipe: recipe.method.name,
)
def test_a_recipe_survives_a_file(recipe: Recipe, tmp_path: Path) -> None:
    recipe.save(tmp_path / "recipe.json")
    assert Recipe.load(tmp_path / "recipe.json") == recipe


def test_a_recipe_that_cannot_be_written_says_where(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    places = {"none/r.json": "no folder", ".": "is a folder", "file/r.json": "no folder"}
    for path, message in places.items():
        with pytest.raises(OptionError, match=message):
            RECIPE.save(tmp_path / path)
    with pytest.raises(OptionError, match="Nothing can be written"), staged(tmp_path / "file"):
        raise AssertionError("never lent")


def test_what_was_applied_can_be_saved_and_applied_from_the_file(
    vit: nn.Module, tmp_path: Path
) -> None:
    notes = {"kl": 0.01}
    mergence.apply(vit, replace(make("tome", macs=0.8, align=4), notes=notes))
    before, file = mergence.describe(vit), tmp_path / "tome.json"
    mergence.recipe_of(vit).save(file)
    assert Recipe.load(file).notes == notes
    for path in (file, str(file)):
        mergence.apply(vit, "topk", r=1)
        mergence.apply(vit, path)
        assert mergence.describe(vit) == before


def test_a_recipe_is_made_of_what_it_can_carry() -> None:
    method, schedule = build("tome", {}), KeepRate()
    wrong: list[tuple[tuple[Any, ...], str]] = [
        (("tome", schedule), "method is 'tome'; give a method"),
        ((method, [36, 30]), r"schedule is \[36, 30\]; give a schedule.*Counts\(after="),
        ((method, schedule, None, None), "notes are None; give a mapping"),
    ]
    for arguments, message in wrong:
        with pytest.raises(OptionError, match=message):
            Recipe(*arguments)


@pytest.fixture
def free() -> Iterator[type[Method]]:
    """A method whose options take anything."""

    @register("free")
    @dataclass(frozen=True, kw_only=True)
    class Free(Mergence):
        first: Any = None
        second: Any = None

    yield Free
    del methods._REGISTRY["free"]


def test_options_of_several_values_survive_a_file_and_can_be_told_apart(
    free: Any, tmp_path: Path
) -> None:
    for recipe in (
        make("free", macs=0.67, first=[1.0, [2, "a"]], second={"a": [1]}),
        make(free(first=(1.0, (2, "a")), second={"a": (1,)}), macs=0.67),
    ):
        assert recipe.method.first == (1.0, (2, "a"))  # type: ignore[attr-defined]
        recipe.save(tmp_path / "recipe.json")
        assert Recipe.load(tmp_path / "recipe.json") == recipe
    assert hash(make("free", macs=0.67, first=[1, [2]]).method)


@pytest.mark.parametrize(
    "value", [torch.ones(2), {1}, torch.float32, len, float("nan"), KeepRate()], ids=repr
)
def test_what_json_cannot_hold_is_refused_when_the_recipe_is_made(value: Any, free: Any) -> None:
    with pytest.raises(OptionError, match=r"Free\.second is .*a recipe cannot hold; give a number"):
        make("free", macs=0.67, second=value)
    with pytest.raises(OptionError, match=r"Free\.first is \[1\].*a tuple"):
        make(free(first=[1]), macs=0.67)


@pytest.mark.parametrize("data", [[], None, "tome", 5], ids=str)
def test_what_is_no_object_is_no_recipe(data: Any) -> None:
    with pytest.raises(RecipeError, match=r"no mergence recipe, but a .*; give an object"):
        Recipe.from_dict(data)


def test_a_recipe_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    text = json.dumps(RECIPE.to_dict())
    (tmp_path / "windows.json").write_text(text, encoding="utf-8-sig")
    assert Recipe.load(tmp_path / "windows.json") == RECIPE


def test_align_given_beside_a_recipe_replaces_its_own() -> None:
    assert make(RECIPE, align=4).align == 4
    assert make(RECIPE) == RECIPE


@pytest.mark.parametrize(
    ("recipe", "cpu", "cuda"),
    [
        (make(macs=0.67), 1, 8),
        (make(macs=0.67, align=1), 1, 1),
        (make(macs=0.67, align=16), 16, 16),
        (make("tome", r=2), 1, 1),
        (make("evit", keep_rate=0.7), 1, 1),
        (make("evit", schedule=[36, 30, 20, 10, 10, 10]), 1, 1),
        (make("evit", keep_rate=0.7, align=8), 8, 8),
    ],
)
def test_alignment_that_nobody_asks_for_depends_on_the_device_and_the_schedule(
    recipe: Recipe, cpu: int, cuda: int
) -> None:
    assert (recipe.on("cpu").align, recipe.on("cuda").align) == (cpu, cuda)


@pytest.mark.parametrize(("tiles", "expected"), [(True, 16), (False, 1)])
def test_in_bfloat16_counts_fill_the_tiles_of_a_cpu_that_has_them(
    vit: nn.Module, monkeypatch: pytest.MonkeyPatch, tiles: bool, expected: int
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    recipe = make(macs=0.67)
    assert recipe.on("cpu", torch.bfloat16).align == expected
    assert (recipe.on("cpu").align, recipe.on("mps", torch.bfloat16).align) == (1, 1)
    assert mergence.describe(mergence.apply(vit, recipe)).align == 1
    assert mergence.describe(mergence.apply(vit.bfloat16(), recipe)).align == expected


def test_the_alignment_of_the_device_is_applied_and_described_and_the_recipe_keeps_its_own(
    vit: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = mergence.describe(mergence.apply(vit, macs=0.67))
    assert exact.align == exact.to_dict()["align"] == 1
    assert "multiples" not in str(exact)
    monkeypatch.setattr(schedule, "multiple_on", lambda device, dtype: 8)  # as if this were CUDA
    found = mergence.describe(mergence.apply(vit, macs=0.67))
    assert found.counts != exact.counts
    assert all((n + 1) % 8 == 0 for n in found.counts if n < 36)
    assert found.macs_ratio <= 0.67
    assert found.align == 8
    assert "(+ 1 prefix, alone in the last MLP, in multiples of 8)" in str(found)
    assert mergence.recipe_of(vit).align is None
    mergence.apply(vit, mergence.recipe_of(vit), align=1)
    assert mergence.describe(vit).counts == exact.counts
    # Counts are followed as they are.
    mergence.apply(vit, schedule=[36, 30, 20, 10, 10, 10])
    assert mergence.describe(vit).counts == (36, 30, 20, 10, 10, 10)


@pytest.mark.parametrize(
    ("named", "schedule"),
    [
        ({"macs": 0.5}, Macs(macs=0.5, shape=Constant())),
        ({"keep_rate": 0.5}, KeepRate(keep_rate=0.5)),
        ({"r": 3}, Constant(r=3)),
        ({"schedule": [4, 3]}, Counts(after=(4, 3))),
        ({"schedule": (4, 3)}, Counts(after=(4, 3))),
        ({"schedule": Constant(r=2, first=3)}, Constant(r=2, first=3)),
    ],
    ids=str,
)
def test_each_way_to_say_how_much_makes_its_schedule(named: Any, schedule: Any) -> None:
    assert make("tome", **named).schedule == schedule


def test_unknown_keys_are_warned_about_and_ignored() -> None:
    data = RECIPE.to_dict() | {"colour": "red", "written_by": "mergence 9"}
    with pytest.warns(UserWarning, match="written by mergence 9.*ignored: colour"):
        assert Recipe.from_dict(data) == RECIPE


def changed(**changes: Any) -> dict[str, Any]:
    data = RECIPE.to_dict()
    return {key: changes.get(key, value) for key, value in data.items()}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (changed(mergence_recipe=2), "format 2 .*reads formats up to 1. Upgrade"),
        (changed(mergence_recipe="new"), "format"),
        (changed(mergence_recipe=True), "format True"),
        (changed(method={"method": "tome", "version": 99}), "version 99.*Upgrade"),
        (changed(method={"method": "tome", "version": "x"}), "version"),
        (changed(method={"method": "tome", "version": True}), "whole number under 'version'"),
        (changed(method={"name": "tome"}), "method"),
        (changed(method={"method": "tme"}), "no method 'tme'.*Did you mean 'tome'"),
        (changed(method={"method": "tome", "power": 2}), "no option 'power'"),
        (changed(method={"method": "mergence", "alpha": "a"}), "alpha is 'a'"),
        (changed(method="tome"), "no mergence recipe"),
        (changed(schedule={"kind": "spiral"}), "kind 'spiral'"),
        (changed(schedule={"kind": ["ramp"]}), r"kind \['ramp'\]"),
        (changed(schedule=[1, 2]), "schedule"),
        (changed(notes="by me"), "notes are 'by me'"),
        (changed(align="8"), "align is '8'"),
        (changed(align=0), "align is 0"),
        (changed(align=True), "align is True"),
        ({}, "no mergence recipe.*Found: nothing"),
        ({"epochs": 3}, "no mergence recipe.*Found: epochs"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_recipe_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(MergenceError, match=message):
        Recipe.from_dict(json.loads(json.dumps(data)))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ({"kind": "constant", "r": 2, "first": "x"}, "block 'x'.*blocks 1 to 6"),
        ({"kind": "constant", "r": 2, "first": None}, "block None"),
        ({"kind": "keep_rate", "keep_rate": 0.5, "blocks": 5}, "blocks is 5;.*list"),
        ({"kind": "keep_rate", "keep_rate": 0.5, "blocks": "45"}, "blocks is '45';.*list"),
        ({"kind": "keep_rate", "keep_rate": 0.5, "blocks": [None]}, "block None"),
    ],
    ids=str,
)
def test_a_damaged_schedule_is_refused_when_it_is_applied(
    schedule: dict[str, Any], message: str, fresh: Any
) -> None:
    data = json.loads(json.dumps(changed(schedule=schedule)))
    with pytest.raises(MergenceError, match=message):
        mergence.apply(fresh("timm-vit"), Recipe.from_dict(data))


def test_as_many_tokens_leave_as_can_however_large_r_is(fresh: Any) -> None:
    for r in (1e6, 1e308):
        model = mergence.apply(fresh("timm-vit"), "topk", r=r)
        assert set(mergence.describe(model).counts) == {1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"mergence_recipe": 1,', "is not valid JSON"),
        (b"\xff\xfe\x00", "cannot be read"),
        (b"[1, 2]", "holds a list, not an object"),
        (b"", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON: it is nested too deep"),
        (b'{"align": ' + b"9" * 5000 + b"}", "is not valid JSON: .*digits"),
    ],
)
def test_a_damaged_file_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "broken.json"
    file.write_bytes(content)
    with pytest.raises(RecipeError, match=rf"broken\.json' {message}"):
        Recipe.load(file)


def test_a_recipe_file_takes_no_options_beside_it(tmp_path: Path) -> None:
    RECIPE.save(tmp_path / "a.json")
    with pytest.raises(OptionError, match="already says everything; alpha"):
        make(tmp_path / "a.json", alpha=0.1)


def test_numbers_of_numpy_are_numbers() -> None:
    numpy = pytest.importorskip("numpy", reason="numpy is not installed")
    recipe = make("random", macs=0.5, seed=numpy.int64(3), size_attention=numpy.float32(0.5))
    assert recipe == make("random", macs=0.5, seed=3, size_attention=0.5)
