"""Methods that keep tokens as they are: EViT, top-k and random."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergence import method as methods
from mergence.errors import OptionError
from mergence.ops import merge


def test_evit_fuses_the_inattentive_into_the_last_slot_by_importance(view: Any) -> None:
    tokens = view([[1.0], [10.0], [20.0], [40.0]], importance=[0.1, 0.5, 0.3, 0.1])
    plan = methods.build("evit", {}).plan(tokens, 3)
    assert plan.slot.tolist() == [[2, 0, 1, 2]]
    merged, size = merge(tokens.x, tokens.size, plan)
    assert merged.flatten().tolist() == [10.0, 20.0, 20.5]  # (0.1 * 1 + 0.1 * 40) / 0.2
    assert size.tolist() == [[1.0, 1.0, 2.0]]


def test_evit_weighs_by_importance_alone(view: Any) -> None:
    tokens = view([[0.0], [8.0], [4.0]], importance=[0.3, 0.1, 0.6], size=[50.0, 1.0, 1.0])
    plan = methods.build("evit", {}).plan(tokens, 1)
    merged, size = merge(tokens.x, tokens.size, plan)
    assert merged.item() == pytest.approx(0.1 * 8 + 0.6 * 4, rel=1e-6)
    assert size.item() == 52


def test_evit_without_any_importance_takes_the_plain_mean(view: Any) -> None:
    tokens = view([[1.0], [2.0], [6.0]], importance=[float("nan")] * 3)
    merged, _ = merge(tokens.x, tokens.size, methods.build("evit", {}).plan(tokens, 1))
    assert merged.item() == pytest.approx(3.0, rel=1e-6)


def test_topk_keeps_the_most_important_in_raster_order(plan_of: Any) -> None:
    plan = plan_of("topk", 3, torch.zeros(5, 2), importance=[0.3, 0.1, 0.9, 0.2, 0.5])
    assert plan.slot.tolist() == [[0, -1, 1, -1, 2]]


def test_topk_prefers_any_number_to_nan(plan_of: Any) -> None:
    plan = plan_of("topk", 1, torch.zeros(3, 2), importance=[float("nan"), 0.0, float("nan")])
    assert plan.slot.tolist() == [[-1, 0, -1]]


def places(plan_of: Any, *, block: int = 1, seed: int = 0, images: int = 1) -> list[list[int]]:
    x = torch.randn(images, 196, 2)
    return plan_of("random", 98, x, block=block, options={"seed": seed}).slot.tolist()


def test_random_takes_the_same_places_in_every_image_and_every_run(plan_of: Any) -> None:
    first, second = places(plan_of, images=2)
    assert first == second
    torch.manual_seed(99)
    assert [first] == places(plan_of)


def test_random_depends_on_the_seed_and_the_block(plan_of: Any) -> None:
    kept = {
        (seed, block): {
            n for n, s in enumerate(places(plan_of, seed=seed, block=block)[0]) if s >= 0
        }
        for seed in (0, 1, 2**31 - 1)
        for block in (1, 4)
    }
    for one in kept:
        for other in kept:
            # Independent halves of 196 share 49, give or take 3.5: within six deviations.
            assert one == other or 28 <= len(kept[one] & kept[other]) <= 70


def test_random_spreads_over_the_image(plan_of: Any) -> None:
    total = torch.zeros(4)
    for seed in range(25):
        slot = torch.tensor(places(plan_of, seed=seed)[0])
        total += (slot >= 0).reshape(4, 49).sum(dim=1)
    # 25 x 24.5 expected per quarter of the image, with a deviation of at most 18.
    assert ((total - 612.5).abs() < 75).all()


@pytest.mark.parametrize("seed", [-1, 2**31, 0.5, True])
def test_random_takes_a_whole_number_as_seed(seed: Any) -> None:
    with pytest.raises(OptionError, match=r"Random.seed is"):
        methods.build("random", {"seed": seed})
