"""A wrong argument stops before anything is changed, and the message says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergence
from mergence import surgery
from mergence.errors import (
    MergenceError,
    OptionError,
    RecipeError,
    ScheduleError,
    UnknownNameError,
)
from mergence.method import build, registry

TopK = registry()["topk"]

WRONG: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[MergenceError], str]] = {
    "method misspelt": (("tme",), {"macs": 0.7}, UnknownNameError, "'tme'.*Did you mean 'tome'"),
    "method unlike any": (("xyz",), {"macs": 0.7}, UnknownNameError, "'xyz'.*Known.*mstm.*tome"),
    "method of another type": ((5,), {"macs": 0.7}, OptionError, "5"),
    "method class": ((TopK,), {"macs": 0.7}, OptionError, "TopK"),
    "recipe missing": (("no.json",), {}, RecipeError, "'no.json' cannot be read"),
    "recipe path missing": ((Path("no.json"),), {}, RecipeError, "'no.json' cannot be read"),
    "macs zero": ((), {"macs": 0}, ScheduleError, "macs is 0;.*above 0 and at most 1"),
    "macs above one": ((), {"macs": 1.5}, ScheduleError, "macs is 1.5;.*at most 1"),
    "macs nan": ((), {"macs": float("nan")}, ScheduleError, "macs is nan"),
    "macs true": ((), {"macs": True}, OptionError, "macs is True, a bool; give a number"),
    "macs text": ((), {"macs": "a"}, OptionError, "macs is 'a', a str; give a number"),
    "macs out of reach": ((), {"macs": 0.01}, ScheduleError, "macs=0.01 is out of reach"),
    "keep rate zero": ((), {"keep_rate": 0.0}, ScheduleError, "keep_rate is 0.0;"),
    "keep rate above one": ((), {"keep_rate": 1.1}, ScheduleError, "keep_rate is 1.1;"),
    "r negative": ((), {"r": -1}, ScheduleError, "r is -1;"),
    "r nan": ((), {"r": float("nan")}, ScheduleError, "r is nan;"),
    "r infinite": ((), {"r": float("inf")}, ScheduleError, "r is inf;"),
    "no token left": ((), {"schedule": [36, 20, 8, 4, 2, 0]}, ScheduleError, "block 6.*keeps 0"),
    "negative count": ((), {"schedule": [36, 20, 8, 4, 2, -1]}, ScheduleError, "keeps -1"),
    "rising": ((), {"schedule": [36, 20, 21, 9, 9, 9]}, ScheduleError, "block 3.*21.*only 20"),
    "more than there are": ((), {"schedule": [37] * 6}, ScheduleError, "block 1.*37.*only 36"),
    "too short": ((), {"schedule": [36, 20]}, ScheduleError, "lists 2 counts.*has 6 blocks"),
    "empty": ((), {"schedule": []}, ScheduleError, "lists 0 counts.*has 6 blocks"),
    "fraction": ((), {"schedule": [36, 20, 8.5, 4, 4, 4]}, ScheduleError, "block 3.*8.5"),
    "schedule of another type": ((), {"schedule": 0.5}, ScheduleError, "schedule is a float"),
    "over half for tome": (
        ("tome",),
        {"schedule": [36, 36, 17, 9, 9, 9]},
        ScheduleError,
        "Block 3 would go from 36 to 17.*at least 18",
    ),
    "block that is not there": (
        (),
        {"schedule": mergence.KeepRate(keep_rate=0.5, blocks=(3, 7))},
        ScheduleError,
        "block 7; the model has blocks 1 to 6",
    ),
    "unknown option": (
        ("mergence",),
        {"macs": 0.7, "alfa": 1},
        OptionError,
        "no option 'alfa'.*alpha",
    ),
    "option out of range": (
        ("mergence",),
        {"macs": 0.7, "alpha": -1},
        OptionError,
        "alpha is -1; give a number at least 0",
    ),
    "size attention no bool": (
        ("topk",),
        {"macs": 0.7, "size_attention": "no"},
        OptionError,
        "size_attention",
    ),
    "two strengths": ((), {"macs": 0.7, "r": 2}, OptionError, "macs and r each say"),
    "no strength": ((), {}, OptionError, "Nothing says how much to reduce"),
    "options beside an object": (
        (build("topk", {}),),
        {"macs": 0.7, "size_attention": True},
        OptionError,
        "TopK.*its own options; size_attention",
    ),
    "strength beside a recipe": (
        (mergence.Recipe(build("topk", {}), mergence.Constant(r=1)),),
        {"macs": 0.7},
        OptionError,
        "already says everything; macs",
    ),
    "align zero": ((), {"macs": 0.7, "align": 0}, OptionError, "align is 0;"),
    "align fraction": ((), {"macs": 0.7, "align": 2.5}, OptionError, "align is 2.5;"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_changes_nothing(
    name: str, vit: nn.Module, image: Tensor, output: Any, snapshot: Any
) -> None:
    arguments, named, error, message = WRONG[name]
    before = snapshot(vit)
    with pytest.raises(error, match=message) as caught:
        mergence.apply(vit, *arguments, **named)
    assert "\n" not in str(caught.value)  # one paragraph
    assert snapshot(vit) == before

    mergence.apply(vit, "evit", keep_rate=0.6)
    before, expected = snapshot(vit), output(vit, image)
    with pytest.raises(error, match=message):
        mergence.apply(vit, *arguments, **named)
    assert snapshot(vit) == before
    assert torch.equal(output(vit, image), expected)


def test_a_failure_half_way_through_is_rolled_back(
    dense: nn.Module, snapshot: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, swap, calls = snapshot(dense), surgery.swap, []

    def failing(*arguments: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("out of luck")
        return swap(*arguments)

    monkeypatch.setattr(surgery, "swap", failing)
    with pytest.raises(RuntimeError, match="out of luck"):
        mergence.apply(dense, "topk", r=1)
    assert len(calls) == 3
    assert snapshot(dense) == before
