"""Coarse patches against loops over the regions, and through everything that follows them."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mergence
from mergence import coarse, family
from mergence.errors import OptionError, ReducedOutputError, ScheduleError
from mergence.families import CoarseStem, _coarse, can_read_coarsely
from mergence.families._coarse import as_product
from mergence.ops import merge
from mergence.outputs import answer
from mergence.plan import MergePlan

COUNTS = [20, 20, 15, 15, 8, 8]
OPTIONS: dict[str, Any] = {"schedule": COUNTS, "coarse": 0.5}
"""36 patches: four regions of nine are coarse, so that 24 tokens enter."""


@pytest.fixture
def vit(fresh: Any) -> nn.Module:
    return fresh("timm-vit")


@pytest.fixture
def image() -> Tensor:
    return torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(1))


def chosen_by_loop(fine: Tensor, half: Tensor, grid: tuple[int, int], regions: int) -> set[int]:
    """First patches of the regions of least loss, for one image."""
    rows, columns = grid[0] // 2, grid[1] // 2
    losses = []
    for r in range(rows):
        for c in range(columns):
            four = [(2 * r + y) * grid[1] + 2 * c + x for y in (0, 1) for x in (0, 1)]
            loss = sum(float((half[r, c] - fine[p]).square().mean()) for p in four) / 4
            y, x = (2 * i / (n - 1) - 1 if n > 1 else -1 for i, n in ((r, rows), (c, columns)))
            losses.append((math.log(loss) - coarse.CENTRE / 2 * (y * y + x * x), four[0]))
    return {first for _, first in sorted(losses)[:regions]}


@pytest.mark.parametrize("grid", [(6, 6), (5, 8), (7, 7), (2, 2)])
def test_the_regions_of_least_loss_join_and_the_rest_stays(grid: tuple[int, int]) -> None:
    rows, columns = grid[0] // 2, grid[1] // 2
    patches, regions = grid[0] * grid[1], max(rows * columns // 2, 1)
    fine = torch.randn(2, patches, 5)
    half = torch.randn(2, rows, columns, 5)
    plan, chosen, loss = coarse.plan(coarse.difference(fine, half, grid), grid, regions)
    assert plan.slots == patches - 3 * regions
    assert chosen.shape == coarse.spread(loss, grid).shape == (2, patches)
    assert loss.shape == (2, rows, columns)
    for image in range(2):
        firsts = chosen_by_loop(fine[image], half[image], grid, regions)
        expected, slot = [0] * patches, 0
        inside = set()
        for patch in range(patches):
            if patch in inside:
                continue
            expected[patch] = slot
            if patch in firsts:
                for other in (patch + 1, patch + grid[1], patch + grid[1] + 1):
                    expected[other] = slot
                    inside.add(other)
            slot += 1
        assert plan.slot[image].tolist() == expected
        marked = {int(p) for p in chosen[image].nonzero()}
        assert marked == firsts | inside


def test_flat_regions_count_as_the_least_and_the_border_goes_first() -> None:
    flat = torch.zeros(1, 36, 4)
    plan, chosen, _ = coarse.plan(flat, (6, 6), 4)
    assert chosen.reshape(6, 6)[:2, :2].all()
    assert not chosen.reshape(6, 6)[2:4].any()
    assert plan.slots == 24


def test_an_image_at_half_its_resolution_leaves_odd_rows_out() -> None:
    image = torch.randn(1, 3, 24, 40)
    half = coarse.halved(image, (3, 5), (8, 8))
    torch.testing.assert_close(half, F.avg_pool2d(image[:, :, :16, :32], 2))
    half = coarse.halved(image[:, :, :, :30], (3, 3), (8, 8))  # six pixels are in no patch
    torch.testing.assert_close(half, F.avg_pool2d(image[:, :, :16, :16], 2))


# Of one kind of each sort of tower: where its patch embedding, the positions of its patches and the
# norm before its first block are.
PARTS: dict[str, tuple[str, Callable[[Any], Tensor], str | None]] = {
    "timm-vit": ("patch_embed.proj", lambda m: m.pos_embed[0, 1:], None),
    "timm-clip": ("patch_embed.proj", lambda m: m.pos_embed[0, 1:], "norm_pre"),
    "torchvision-vit": ("conv_proj", lambda m: m.encoder.pos_embedding[0, 1:], None),
    "open_clip-tower": ("conv1", lambda m: m.positional_embedding[1:], "ln_pre"),
    "transformers-vit": (
        "vit.embeddings.patch_embeddings.projection",
        lambda m: m.vit.embeddings.position_embeddings[0, 1:],
        None,
    ),
    "transformers-deit": (
        "deit.embeddings.patch_embeddings.projection",
        lambda m: m.deit.embeddings.position_embeddings[0, 2:],
        None,
    ),
    "transformers-dinov2_reg": (
        "dinov2_with_registers.embeddings.patch_embeddings.projection",
        lambda m: m.dinov2_with_registers.embeddings.position_embeddings[0, 1:],
        None,
    ),
    "transformers-clip": (
        "vision_model.embeddings.patch_embedding",
        lambda m: m.vision_model.embeddings.position_embedding.weight[1:],
        "vision_model.pre_layrnorm",
    ),
    "transformers-siglip": (
        "embeddings.patch_embedding",
        lambda m: m.embeddings.position_embedding.weight,
        None,
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", PARTS)
def test_a_coarse_token_is_the_region_at_half_resolution_at_its_mean_place(
    kind: str, fresh: Any, image: Tensor
) -> None:
    model, (stem, positions, norm) = fresh(kind), PARTS[kind]
    spec, first = family.find(model).inspect(model), []
    handle = spec.blocks[0].register_forward_pre_hook(lambda _, given: first.append(given[0]))
    model(image)
    embed, place = model.get_submodule(stem), positions(model)
    fine = embed(image).flatten(2).transpose(1, 2)
    half = embed(F.avg_pool2d(image, 2)).permute(0, 2, 3, 1)
    mergence.apply(model, schedule=[24] * 6, coarse=4 / 9)
    trace = mergence.trace(model, image)
    handle.remove()
    whole, tokens = first
    prefix = spec.cost.prefix
    assert tokens.shape == (3, prefix + 24, 48)
    assert torch.equal(tokens[:, :prefix], whole[:, :prefix])
    (point,) = trace.points
    assert point.block == 0
    for index in range(len(image)):
        firsts = chosen_by_loop(fine[index], half[index], (6, 6), 4)
        expected, source, inside = [], [0] * 36, set()
        for patch in range(36):
            row, column = divmod(patch, 6)
            if patch in firsts:
                four = [patch, patch + 1, patch + 6, patch + 7]
                expected.append(half[index, row // 2, column // 2] + place[four].mean(dim=0))
                inside.update(four)
                for other in four:
                    source[other] = len(expected) - 1
            elif patch not in inside:
                expected.append(fine[index, patch] + place[patch])
                source[patch] = len(expected) - 1
        entered = torch.stack(expected)
        if norm is not None:
            entered = model.get_submodule(norm)(entered)
        torch.testing.assert_close(tokens[index, prefix:], entered, atol=1e-5, rtol=1e-5)
        assert point.source[index].tolist() == source
        assert point.size[index].tolist() == [float(source.count(slot)) for slot in range(24)]


@torch.no_grad()
def test_a_picture_in_one_colour_loses_nothing(vit: Any) -> None:
    vit = vit.double()
    nn.init.zeros_(vit.pos_embed)
    image = torch.randn(2, 3, 1, 1, dtype=torch.float64).expand(2, 3, 96, 96)
    expected = vit(image)
    mergence.apply(vit, **OPTIONS)
    torch.testing.assert_close(vit(image), expected, rtol=1e-5, atol=1e-5)


def test_other_sizes_of_images_and_odd_grids(fresh: Any) -> None:
    import timm

    model = timm.create_model(
        "vit_tiny_patch16_224", embed_dim=48, depth=2, num_heads=3, dynamic_img_size=True
    ).eval()
    mergence.apply(model, keep_rate=0.7, coarse=0.25)
    with torch.no_grad():
        for side in (224, 112, 144):
            assert model(torch.randn(2, 3, side, side)).shape == (2, 1000)
    narrow = torch.randn(1, 3, 16, 256)
    with pytest.raises(ScheduleError, match=r"1 regions .* 1 x 16 .* hold 0"):
        model(narrow)


@torch.no_grad()
def test_what_timm_does_to_images_and_embeddings_is_done_to_coarse_ones(fresh: Any) -> None:
    import timm

    size = {"embed_dim": 48, "depth": 1, "num_heads": 3, "img_size": 96}
    options = {"embed_norm_layer": "layernorm", "dynamic_img_size": True, "dynamic_img_pad": True}
    model = timm.create_model("vit_tiny_patch16_224", **size, **options).eval()
    embed, entered = model.patch_embed, []
    nn.init.normal_(embed.norm.weight)
    mergence.apply(model, schedule=[9], coarse=1.0)
    model.blocks[0].register_forward_pre_hook(lambda _, given: entered.append(given[0]))
    image = torch.randn(2, 3, 90, 90)  # timm fills it with zeros to 96 x 96
    model(image)
    half = embed.proj(F.avg_pool2d(F.pad(image, (0, 6, 0, 6)), 2)).flatten(2).transpose(1, 2)
    place = F.avg_pool2d(model.pos_embed[:, 1:].transpose(1, 2).reshape(1, 48, 6, 6), 2)
    expected = embed.norm(half) + place.flatten(2).transpose(1, 2)
    torch.testing.assert_close(entered[0][:, 1:], expected, atol=1e-5, rtol=1e-5)


def test_a_whole_image_can_be_coarse(vit: nn.Module, image: Tensor) -> None:
    mergence.apply(vit, schedule=[9] * 6, coarse=1.0)
    assert (mergence.trace(vit, image).points[0].size == 4).all()


def test_the_books_reach_the_first_block_only_with_the_run(vit: Any) -> None:
    mergence.apply(vit, schedule=[24] * 6, coarse=4 / 9)
    with pytest.raises(mergence.errors.ReducedOutputError, match="by itself"):
        vit.blocks[0](torch.randn(1, 25, 48))


def test_gradients_reach_the_patch_embedding(vit: Any, image: Tensor) -> None:
    mergence.apply(vit, **OPTIONS).train()(image).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vit.parameters())


@pytest.mark.parametrize("kind", ["timm-vit", "transformers-siglip"])
def test_recipes_keep_it_and_schedules_scale_by_patches(
    kind: str, fresh: Any, tmp_path: Path
) -> None:
    vit = fresh(kind)
    mergence.apply(vit, schedule=mergence.Counts(after=tuple(COUNTS), of=36), coarse=0.5)
    mergence.recipe_of(vit).save(tmp_path / "r.json")
    mergence.apply(vit, tmp_path / "r.json")
    found = mergence.describe(vit)
    assert (found.start, list(found.counts)) == (24, COUNTS)
    assert "36 → 24 → 20 20 15" in str(found)
    # More tokens than enter cannot leave: at another size, rounding must not ask for them.
    mergence.apply(vit, schedule=mergence.Counts(after=(97,) * 6, of=144), coarse=0.5)
    assert mergence.describe(vit).counts == (24,) * 6


def test_what_cannot_be_is_refused_before_anything_changes(fresh: Any, vit: nn.Module) -> None:
    with pytest.raises(OptionError, match=r"coarse is 1\.5"):
        mergence.apply(vit, macs=0.5, coarse=1.5)
    with pytest.raises(OptionError, match="learned module"):
        mergence.apply(vit, "mstm", macs=0.5, coarse=0.2, fusion=True)


def test_a_patch_embedding_that_was_exchanged_is_not_passed_over(vit: Any, image: Tensor) -> None:
    mergence.apply(vit, **OPTIONS)
    vit.patch_embed.proj = nn.Conv2d(3, 48, 16, 16)
    with pytest.raises(ReducedOutputError, match=r"exchanged since, apply again"):
        vit(image)
    assert mergence.apply(vit, **OPTIONS)(image).isfinite().all()


class CoarseBlocks:
    """As the docs tell the reader to write one, for `PlainViT.blocks`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        dense: Any = super()
        y: Tensor = dense.forward(self._mergence.coarsened(x))
        return y


def test_a_family_of_ones_own_must_take_part(
    image: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples" / "plugin" / "src")
    own: Any = importlib.import_module("mergence_plainvit.family").FAMILY
    monkeypatch.setitem(family.registry(), "plainvit", own)  # type: ignore[arg-type]
    model, inspect = own.tiny()["vit"](), own.inspect
    with pytest.raises(OptionError, match="its family does not say that it can"):
        mergence.apply(model, **OPTIONS)
    monkeypatch.setattr(type(own), "inspect", lambda _, model: replace(inspect(model), coarse=True))
    mergence.apply(model, **OPTIONS)
    with pytest.raises(ReducedOutputError, match=r"24 tokens of 36 patches were to enter.*coarse="):
        model(image)

    def reads(_: Any, model: Any) -> family.ModelSpec:
        spec = inspect(model)
        parts = (*spec.parts, (model.embed, CoarseStem), (model.blocks, CoarseBlocks))
        return replace(spec, parts=parts, coarse=can_read_coarsely(model.embed, (6, 6)))

    monkeypatch.setattr(type(own), "inspect", reads)
    trace = mergence.trace(mergence.apply(model, **OPTIONS), image)
    assert [(p.block, p.size.shape[1]) for p in trace.points][:2] == [(0, 24), (1, 20)]


def test_macs_count_the_second_reading(vit: nn.Module) -> None:
    whole = mergence.describe(mergence.apply(vit, schedule=[36] * 6)).reduced
    found = mergence.describe(mergence.apply(vit, schedule=[24] * 6, coarse=4 / 9)).reduced
    assert found.stem == whole.stem * 5 // 4
    assert found.merging == 36 * 48
    assert found.mlp == whole.mlp // (6 * 37) * (5 * 25 + 1)  # the last one of the class token


@pytest.mark.slow
def test_it_compiles_in_one_graph_and_exports(
    vit: nn.Module, image: Tensor, tmp_path: Path, shorten: Any
) -> None:
    short = mergence.apply(shorten(vit, 2), schedule=[20, 8], coarse=0.5)
    with torch.no_grad():
        expected = answer(short(image))
        compiled = torch.compile(short, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(answer(compiled(image)), expected)
    done = mergence.export(short, tmp_path / "m.onnx", image)
    assert done.agreement.off == 0
    assert not any("Scatter" in operator for operator in done.operators)


def test_a_plan_of_regions_is_merged_like_any_other() -> None:
    fine = torch.randn(2, 36, 5)
    change = coarse.difference(fine, torch.randn(2, 3, 3, 5), (6, 6))
    plan, chosen, _ = coarse.plan(change, (6, 6), 3)
    assert isinstance(plan, MergePlan)
    merged, size = merge(fine + change * chosen[..., None], torch.ones(2, 36), plan)
    assert merged.shape == (2, 27, 5)
    assert size.sum(dim=1).tolist() == [36, 36]


def test_a_small_budget_reads_coarsely_by_itself(vit: nn.Module, image: Tensor) -> None:
    mergence.apply(vit, macs=0.35)
    found = mergence.describe(vit)
    assert found.start < 36
    assert found.macs_ratio <= 0.35
    trace = mergence.trace(vit, image)
    assert trace.points[0].block == 0
    assert trace.points[0].size.shape[1] == found.start
    mergence.apply(vit, macs=0.8)
    assert mergence.describe(vit).start == 36


def test_coarse_0_and_other_shapes_read_nothing_coarsely(fresh: Any) -> None:
    vit = fresh("timm-vit")
    for options in ({"macs": 0.35, "coarse": 0}, {"schedule": [12] * 6}, {"keep_rate": 0.3}):
        mergence.apply(vit, **options)
        assert mergence.describe(vit).start == 36
    beit = fresh("timm_beit-beit")
    mergence.apply(beit, macs=0.35)
    assert mergence.describe(beit).start == 36


@pytest.mark.parametrize("align", [1, 2, 4])
def test_tokens_that_enter_are_aligned(vit: nn.Module, image: Tensor, align: int) -> None:
    mergence.apply(vit, macs=0.35, align=align)
    found = mergence.describe(vit)
    assert found.start < 36
    assert (found.start + found.prefix) % align == 0
    assert answer(vit(image)).isfinite().all()


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("shape", "patch"), [((2, 3, 50, 37), (16, 8)), ((1, 1, 8, 8), (4, 4))])
def test_the_product_of_patches_is_the_convolution(
    shape: tuple[int, ...], patch: tuple[int, int], memory: torch.memory_format
) -> None:
    image = torch.randn(shape, dtype=torch.float64).to(memory_format=memory)
    weight = torch.randn(5, shape[1], *patch, dtype=torch.float64)
    bias = torch.randn(5, dtype=torch.float64)
    for added in (bias, None):
        expected = F.conv2d(image, weight, added, stride=patch)
        found = as_product(image, weight, added)
        torch.testing.assert_close(found, expected)
        assert found.flatten(2).mT.is_contiguous()  # as the tokens are read


def test_in_half_precision_a_reduced_model_embeds_by_the_product(
    vit: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def watched(*inputs: Any) -> Any:
        seen.append(inputs)
        return as_product(*inputs)

    monkeypatch.setattr(_coarse, "as_product", watched)
    model = vit.bfloat16()
    image = torch.randn(1, 3, 96, 96, dtype=torch.bfloat16)
    mergence.apply(model, keep_rate=1.0)(image)
    assert not seen  # nothing leaves, and the answer is the dense model's to the last bit
    mergence.apply(model, macs=0.7)
    with mergence.disabled(model):
        model(image)
    assert not seen
    model(image)
    assert len(seen) == 1
