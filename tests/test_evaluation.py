"""Evaluation: the metrics against hand-made logits, and a real run on the embedded model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergence
from mergence import demo
from mergence.calibration import calibrate
from mergence.data import Batch, Skipped, loader
from mergence.distances import kl_divergence
from mergence.errors import DataError, OptionError
from mergence.evaluation import _Tally, evaluate
from mergence.outputs import answer
from mergence.program import program_of
from mergence.recipe import make


@pytest.fixture(scope="module")
def embedded() -> nn.Module:
    return demo.load().model


def batches(images: Tensor, labels: Tensor | None, skipped: int = 0) -> Iterator[Batch]:
    bad = [Skipped(f"bad-{i}", "OSError: broken") for i in range(skipped)]
    yield Batch(images, labels, [f"image-{i}" for i in range(len(images))], bad)


def test_a_tally_counts_hits_agreement_and_divergence() -> None:
    dense = torch.tensor([[2.0, 0, 0, 0, 0, 0], [0, 3.0, 0, 0, 0, 0]])
    logits = torch.tensor([[0.0, 1, 2, 3, 4, 5], [0, 3.0, 0, 0, 0, 0]])
    tally = _Tally()
    tally.add(logits, dense, torch.tensor([0, 1]))
    assert (tally.top1, tally.top5, tally.agreement) == (1, 1, 1)
    p, q = dense[0].softmax(0), logits[0].softmax(0)
    by_hand = sum(float(a) * math.log(float(a) / float(b)) for a, b in zip(p, q, strict=True))
    assert tally.kl == pytest.approx(by_hand, rel=1e-5)


def test_fewer_than_five_classes_still_have_a_top5() -> None:
    tally = _Tally()
    tally.add(torch.tensor([[1.0, 2, 3]]), torch.tensor([[1.0, 2, 3]]), torch.tensor([0]))
    assert (tally.top1, tally.top5) == (0, 1)


def test_keeping_everything_agrees_exactly_with_the_dense_model(embedded: nn.Module) -> None:
    images = torch.randn(3, 1, 28, 28)
    keep_all = make("mergence", schedule=[196] * 12)
    result = evaluate(embedded, batches(images, None), {"all": keep_all}).results
    assert [row.name for row in result] == ["dense", "all"]
    assert (result[1].agreement, result[1].kl, result[1].macs_ratio) == (100.0, 0.0, 1.0)
    assert result[1].top1 is None


@pytest.fixture(params=["timm", "transformers"])
def of_tokens(request: pytest.FixtureRequest, fresh: Any) -> Any:
    """Models without a pooling, which answer with tokens."""
    if request.param == "timm":
        model = fresh("timm-vit")
        model.reset_classifier(0, "")
        return model
    tower = fresh("transformers-vit_pooler")
    tower.pooler = None
    return tower


def test_tokens_are_compared_patch_by_patch(of_tokens: Any) -> None:
    images, recipe = torch.randn(2, 3, 96, 96), make("mergence", keep_rate=0.7)
    dense, reduced = evaluate(of_tokens, batches(images, None), {"reduced": recipe}).results
    with torch.no_grad():
        expected = answer(of_tokens(images))
        found = mergence.restore(answer(mergence.apply(of_tokens, recipe)(images)))
    assert dense.cosine == pytest.approx(0, abs=1e-6)
    cosine = torch.cosine_similarity(expected.flatten(1), found.flatten(1)).mean()
    assert reduced.cosine == pytest.approx(1 - float(cosine), abs=1e-6)


def test_tokens_that_remember_nothing_cannot_be_compared(fresh: Any) -> None:
    model = fresh("timm-vit")
    model.reset_classifier(0, "")
    model.register_forward_hook(lambda module, images, tokens: tokens.clone())
    images = torch.randn(2, 3, 96, 96)
    with pytest.raises(OptionError, match=r"\[2, 37, 48\] and \[2, 1[0-9], 48\].*pools"):
        evaluate(model, batches(images, None), {"reduced": make("mergence", keep_rate=0.7)})


def test_a_single_value_cannot_be_compared(fresh: Any) -> None:
    model = fresh("timm-vit")
    model.reset_classifier(1)
    images = batches(torch.randn(2, 3, 96, 96), None)
    with pytest.raises(OptionError, match=r"a single value.*reset_classifier\(0\)"):
        evaluate(model, images, {"reduced": make("mergence", keep_rate=0.7)})


def test_skipped_images_are_reported_and_do_not_count(embedded: nn.Module) -> None:
    run = batches(torch.randn(2, 1, 28, 28), torch.tensor([1, 2]), skipped=3)
    result = evaluate(embedded, run, {})
    assert result.images == 2
    assert [item.name for item in result.skipped] == ["bad-0", "bad-1", "bad-2"]


def test_no_readable_image_is_an_error(embedded: nn.Module) -> None:
    with pytest.raises(DataError, match="None of the 2 images"):
        evaluate(embedded, batches(torch.empty(0), None, skipped=2), {})


def test_a_recipe_that_does_not_fit_stops_before_any_image_is_read(embedded: nn.Module) -> None:
    def never() -> Iterator[Batch]:
        raise AssertionError("an image was read")
        yield

    with pytest.raises(mergence.MergenceError, match="lists 3 counts"):
        evaluate(embedded, never(), {"wrong": make("topk", schedule=[196, 100, 50])})


def test_no_recipe_takes_the_place_of_the_dense_model(embedded: nn.Module) -> None:
    images = batches(torch.randn(1, 1, 28, 28), None)
    with pytest.raises(OptionError, match="A recipe is called 'dense'"):
        evaluate(embedded, images, {"dense": make("topk", macs=0.5)})


def test_evaluation_leaves_a_reduced_model_as_it_was(embedded: nn.Module) -> None:
    mergence.apply(embedded, "tome", macs=0.8)
    try:
        evaluate(
            embedded, batches(torch.randn(1, 1, 28, 28), None), {"evit": make("evit", macs=0.5)}
        )
        assert mergence.recipe_of(embedded).method.name == "tome"
    finally:
        mergence.remove(embedded)


def test_schedules_are_solved_once_and_each_run_has_what_the_model_has_learned(
    monkeypatch: pytest.MonkeyPatch, fresh: Any
) -> None:
    model = mergence.apply(fresh("timm-vit"), "mstm", keep_rate=0.6, fusion=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".mergence." in name:
                parameter.add_(0.3)
    solved = []

    def counting(model: nn.Module, recipe: mergence.Recipe) -> nn.Module:
        solved.append(recipe.method.name)
        return mergence.apply(model, recipe)

    monkeypatch.setattr("mergence.evaluation.apply", counting)
    three = [batch for _ in range(3) for batch in batches(torch.randn(2, 3, 96, 96), None)]
    recipes = {"other": make("tome", keep_rate=0.6), "own": mergence.recipe_of(model)}
    dense, _, own = evaluate(model, three, recipes).results
    assert solved == ["tome", "mstm"]
    assert dense.kl == 0
    with torch.inference_mode():
        images = torch.cat([batch.images for batch in three])
        with mergence.disabled(model):
            whole = model(images)
        expected = kl_divergence(whole, model(images)).mean()
    assert own.kl == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.slow
def test_merging_keeps_the_answers_of_the_embedded_model_where_pruning_does_not() -> None:
    """A real model on real images, at half of the MACs."""
    loaded = demo.load()
    data = demo.images(loaded, limit=100)
    recipes = {name: make(name, macs=0.5) for name in ("mergence", "topk")}
    dense, ours, topk = evaluate(loaded.model, loader(data, batch_size=50), recipes).results
    assert dense.top1 is not None
    assert dense.top1 > 85
    assert ours.macs_ratio <= 0.5
    assert ours.agreement > 90
    assert ours.kl < topk.kl / 3


def test_batches_may_come_from_any_loader(embedded: nn.Module) -> None:
    images, labels = torch.randn(4, 1, 28, 28), torch.tensor([1, 2, 3, 4])
    data = torch.utils.data.TensorDataset(images, labels)
    recipes = {"reduced": make("mergence", macs=0.5)}
    expected = evaluate(embedded, batches(images, labels), recipes).results
    pairs: Any = torch.utils.data.DataLoader(data, 2)
    for given in (pairs, [(images, labels)]):
        found = evaluate(embedded, given, recipes).results
        assert [(r.top1, r.kl) for r in found] == [
            (r.top1, pytest.approx(r.kl, rel=1e-4)) for r in expected
        ]
    for name in ("labels", "label"):  # as transformers and datasets make them
        found = evaluate(embedded, [{"pixel_values": images, name: labels}], recipes).results
        assert [r.top1 for r in found] == [r.top1 for r in expected]
    assert evaluate(embedded, [images], recipes).results[1].top1 is None
    wrong: Any
    for wrong in ({"image": images}, [labels], "ab"):
        with pytest.raises(DataError, match="without images"):
            evaluate(embedded, [wrong], recipes)
    for wrong in (["tome"], {"tome": "tome"}):
        with pytest.raises(OptionError, match="give a dict of recipes by name"):
            evaluate(embedded, [images], wrong)


def test_without_an_image_the_first_bad_one_is_named(embedded: nn.Module) -> None:
    bad = list(batches(torch.empty(0), None, skipped=2))
    with pytest.raises(DataError, match=r"None of the 2 .*First: bad-0: OSError: broken\."):
        evaluate(embedded, bad, {"reduced": make(macs=0.5)})


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_training_goes_on_after_an_evaluation(dtype: torch.dtype | None, fresh: Any) -> None:
    model = fresh("timm-vit").train()
    model.blocks[1].eval()  # as those that are frozen
    images = torch.randn(2, 3, 96, 96)
    evaluate(model, [images], {"reduced": make("tome", keep_rate=0.6)}, dtype=dtype)
    assert [model.training, *(block.training for block in model.blocks[:3])] == [1, 1, 0, 1]
    model(images).sum().backward()
    with pytest.raises(mergence.MergenceError, match="lists 3 counts"):
        evaluate(model, [images], {"wrong": make("topk", schedule=[36, 20, 10])})
    assert model.training


def test_a_model_is_run_as_it_is_and_a_copy_of_it_in_another_type(fresh: Any) -> None:
    model, images, seen = fresh("timm-vit").double(), torch.randn(2, 3, 96, 96), []
    model.blocks[0].register_forward_pre_hook(lambda block, given: seen.append(given[0].dtype))
    runs = {"reduced": make("tome", keep_rate=0.6)}
    for wanted in (None, torch.float32):
        evaluate(model, [images], runs, dtype=wanted)
        assert set(seen) == {wanted or torch.float64}
        calibrate(model, [images], budgets=[0.7], points=1, trials=0, tune=False, dtype=wanted)
        assert set(seen) == {wanted or torch.float64}
        seen.clear()
    with pytest.raises(mergence.MergenceError):
        calibrate(model, [images], budgets=[0.01], dtype=torch.float32)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}


def test_labels_are_class_indices_however_a_loader_gives_them(embedded: nn.Module) -> None:
    images = torch.randn(12, 1, 28, 28)
    with torch.no_grad():
        labels = embedded(images).argmax(dim=1)

    def accuracy(*given: Any) -> tuple[float | None, float | None]:
        (dense,) = evaluate(embedded, given, {}).results
        return dense.top1, dense.top5

    for one in (labels, labels[:, None], labels.tolist(), tuple(labels.tolist()), labels.numpy()):
        assert accuracy((images, one)) == (100, 100)
    assert accuracy((images[:4], labels[:4]), images[4:]) == (100, 100)  # of those with labels
    for other in ([f"{i}.png" for i in range(12)], {"boxes": labels}, [{"box": 1}] * 12, None):
        assert accuracy((images, other)) == (None, None)
    one_hot = nn.functional.one_hot(labels, 10)
    for wrong in (one_hot, one_hot.float(), labels[:3]):
        with pytest.raises(DataError, match=r"12 images are of shape \[(12, 10|3)\].*argmax"):
            accuracy((images, wrong))


def test_maps_that_lie_beside_the_images_are_no_labels_of_a_model_without_classes(
    fresh: Any,
) -> None:
    model = fresh("timm-vit")
    model.reset_classifier(0)
    pair = torch.randn(2, 3, 96, 96), torch.randn(2, 96, 96)
    assert evaluate(model, [pair], {}).results[0].top1 is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_answers_that_are_no_numbers_are_not_compared(value: float, embedded: Any) -> None:
    """NaN has its largest value where NaN has: that would count as agreement."""

    def spoilt(block: nn.Module, given: Any, tokens: Tensor) -> Tensor | None:
        return torch.full_like(tokens, value) if tokens.shape[1] in spoilt_at else None

    images = [torch.randn(2, 1, 28, 28)]
    hook = embedded.blocks[-1].register_forward_hook(spoilt)
    try:
        for dense, whose in ((True, "The dense model"), (False, r"The model with .* 'half'")):
            spoilt_at = {197} if dense else set(range(197))
            with pytest.raises(OptionError, match=rf"^{whose} answers with .* 20 of 20.* dtype"):
                evaluate(embedded, images, {"half": make("tome", macs=0.5)})
            whose = whose.replace("'half'", "'tome'")
            with pytest.raises(OptionError, match=rf"^{whose} answers with .* 20 of 20.* dtype"):
                calibrate(embedded, images, budgets=[0.5], method="tome")
    finally:
        hook.remove()


def test_macs_are_those_of_one_image_at_the_size_that_ran(fresh: Any) -> None:
    model = fresh("transformers-dinov2")  # made for 36 patches
    recipe = make("tome", schedule=[36, 30, 20, 10, 10, 10])
    small, large = torch.randn(2, 3, 48, 48), torch.randn(1, 3, 160, 160)
    program = program_of(mergence.apply(fresh("transformers-dinov2"), recipe))

    def counted(*images: Tensor) -> list[tuple[float, float]]:
        return [(r.gmacs, r.macs_ratio) for r in evaluate(model, images, {"r": recipe}).results]

    for images, patches in ((small, [9]), (large, [100]), ([small, large], [9, 9, 100])):
        dense = sum(program.macs(n, dense=True).total for n in patches)
        reduced = sum(program.macs(n).total for n in patches)
        assert counted(*(images if isinstance(images, list) else [images])) == [
            (pytest.approx(dense / len(patches) / 1e9), 1.0),
            (pytest.approx(reduced / len(patches) / 1e9), pytest.approx(reduced / dense)),
        ]
