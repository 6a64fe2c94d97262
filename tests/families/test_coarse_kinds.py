"""Coarse patches of every kind of model that can read them, and of those that cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mergence
from mergence import family
from mergence.errors import OptionError, ReducedOutputError
from mergence.outputs import answer

CANNOT = [
    "timm_beit-beit",
    "timm_eva-eva02",
    "timm_naflex-gap",
    "transformers-dinov3",
    "transformers-dinov3_backbone",
    "transformers-videomae",
    "transformers-vitpose_backbone",
    "transformers-vivit",
    "transformers_vjepa2-vjepa2",
]
"""Those whose places turn queries and keys or bias pairs, videos, padded images, and NaFlex."""
KINDS = [
    f"{name}-{kind}"
    for name in ("open_clip", "timm", "torchvision", "transformers")
    for kind in family.registry()[name].tiny()
    if f"{name}-{kind}" not in CANNOT
]
COUNTS = [20, 20, 15, 15, 8, 8]
OPTIONS: dict[str, Any] = {"schedule": COUNTS, "coarse": 0.5}
"""36 patches: four regions of nine are coarse, so that 24 tokens enter."""


@pytest.fixture
def image() -> Tensor:
    return torch.randn(3, 3, 96, 96, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_model_reads_coarsely(kind: str, fresh: Any, image: Tensor) -> None:
    model = fresh(kind)
    dense = answer(model(image))
    assert torch.equal(answer(mergence.apply(model, schedule=[36] * 6, coarse=0)(image)), dense)
    mergence.apply(model, **OPTIONS)
    assert mergence.describe(model).start == 24
    reduced = answer(model(image))
    assert reduced.shape == dense.shape
    assert reduced.isfinite().all()
    assert not torch.equal(reduced, dense)
    torch.testing.assert_close(answer(model(image[1:2])), reduced[1:2], atol=1e-5, rtol=1e-4)
    trace = mergence.trace(model, image)
    assert [(p.block, p.size.shape[1]) for p in trace.points] == [(0, 24), (1, 20), (3, 15), (5, 8)]
    assert (trace.points[-1].size.sum(dim=1) == 36).all()
    with mergence.disabled(model):
        assert torch.equal(answer(model(image)), dense)
    assert torch.equal(answer(mergence.remove(model)(image)), dense)


@torch.no_grad()
@pytest.mark.parametrize("kind", [k for k in KINDS if k.startswith("timm-")])
def test_tokens_of_timm_are_restored_to_every_patch(kind: str, fresh: Any, image: Tensor) -> None:
    model = mergence.apply(fresh(kind), **OPTIONS)
    maps = model.forward_intermediates(image, indices=1, intermediates_only=True)
    assert maps[0].shape[2:] == (6, 6)
    assert mergence.restore(model.forward_features(image)).shape[1] == model.num_prefix_tokens + 36


@torch.no_grad()
def test_tokens_of_other_libraries_are_restored_to_every_patch(fresh: Any, image: Tensor) -> None:
    tower = mergence.apply(fresh("open_clip-tower"), **OPTIONS)
    maps = tower.forward_intermediates(image)["image_intermediates"]
    assert {m.shape for m in maps} == {(3, 48, 6, 6)}
    model = mergence.apply(fresh("transformers-vit_pooler"), **OPTIONS)
    found = model(image, output_hidden_states=True)
    assert [h.shape[1] - 1 for h in found.hidden_states[:3]] == [24, 20, 20]
    for tokens in (found.last_hidden_state, found.hidden_states[0]):
        assert mergence.restore(tokens).shape == (3, 37, 48)


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("transformers-dinov2", {}),
        ("transformers-dinov2_reg", {}),
        ("transformers-vit_pooler", {"interpolate_pos_encoding": True}),
        ("transformers-clip", {"interpolate_pos_encoding": True}),
        ("transformers-siglip", {"interpolate_pos_encoding": True}),
    ],
)
def test_other_sizes_of_images_in_transformers(
    kind: str, options: dict[str, Any], fresh: Any
) -> None:
    model = mergence.apply(fresh(kind), keep_rate=0.7, coarse=0.25)
    image = torch.randn(2, 3, 7 * 16, 9 * 16 + 5)
    with mergence.disabled(model):
        dense = answer(model(image, **options))
    spec, seen = family.find(model).inspect(model), []
    spec.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0].shape[1]))
    assert answer(model(image, **options)).shape == dense.shape
    assert seen == [spec.cost.prefix + 63 - 3 * 4]  # of 7 x 9 patches, 63 / 16 regions are coarse


@pytest.mark.parametrize("kind", CANNOT)
def test_models_that_cannot_read_coarsely_are_refused_before_anything_changes(
    kind: str, fresh: Any
) -> None:
    model = fresh(kind)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(OptionError, match="cannot read patches of this model coarsely"):
        mergence.apply(model, macs=0.5, coarse=0.2)
    assert [type(m) for m in model.modules()] == classes


def test_patch_embeddings_that_overlap_or_have_several_layers_are_refused() -> None:
    import transformers
    from torchvision.models import VisionTransformer
    from torchvision.models.vision_transformer import ConvStemConfig

    stem = [ConvStemConfig(8, 3, 4), ConvStemConfig(8, 3, 4)]
    size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    for model in (
        VisionTransformer(96, 16, 2, 3, 48, 96, conv_stem_configs=stem),
        transformers.ASTModel(transformers.ASTConfig(**size, max_length=96)),
        transformers.ViTMAEModel(transformers.ViTMAEConfig(**size, mask_ratio=0.0)),
    ):
        mergence.apply(model, macs=0.8)
        with pytest.raises(OptionError, match="cannot read patches of this model coarsely"):
            mergence.apply(model, macs=0.5, coarse=0.2)


@torch.no_grad()
def test_a_folder_keeps_the_share(fresh: Any, image: Tensor, tmp_path: Path) -> None:
    model = mergence.apply(fresh("transformers-dinov2_reg"), **OPTIONS)
    mergence.save(model, tmp_path)
    loaded = mergence.load(tmp_path)
    assert mergence.recipe_of(loaded) == mergence.recipe_of(model)
    assert torch.equal(answer(loaded(image)), answer(model(image)))


def test_adapters_around_a_patch_embedding_are_not_left_out(fresh: Any, image: Tensor) -> None:
    class Adapted(nn.Module):  # as peft's
        def __init__(self, layer: nn.Conv2d) -> None:
            super().__init__()
            self.base_layer, self.weight = layer, layer.weight

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = 2 * self.base_layer(x)
            return y

    model = mergence.apply(fresh("timm-vit"), **OPTIONS)
    model.patch_embed.proj = Adapted(model.patch_embed.proj)
    with pytest.raises(ReducedOutputError, match=r"adapters were put around it .* apply again"):
        model(image)
    with mergence.disabled(model):
        model(image)
    mergence.apply(model, macs=0.4)  # reads nothing coarsely any more
    assert mergence.describe(model).start == 36
    found = model(image)
    mergence.remove(model)
    with torch.no_grad():
        model.patch_embed.proj = model.patch_embed.proj.base_layer
        for parameter in model.patch_embed.proj.parameters():
            parameter.mul_(2)
    torch.testing.assert_close(found, mergence.apply(model, macs=0.4, coarse=0)(image))


def test_spectrograms_whose_patches_do_not_overlap_can_be_read_coarsely() -> None:
    import transformers

    size = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3}
    audio = {"max_length": 128, "num_mel_bins": 64, "frequency_stride": 16, "time_stride": 16}
    model = transformers.ASTModel(transformers.ASTConfig(**size, **audio))
    mergence.apply(model, schedule=[20, 10], coarse=0.5)
    trace = mergence.trace(model, torch.randn(2, 128, 64))
    assert [p.size.shape for p in trace.points] == [(2, 20), (2, 10)]
    assert trace.points[0].source.reshape(2, 4, 8)[:, 1::2, 1::2].eq(
        trace.points[0].source.reshape(2, 4, 8)[:, ::2, ::2]
    ).sum(dim=(1, 2)).tolist() == [4, 4]


def test_masked_patches_beside_coarse_ones_are_refused(image: Tensor) -> None:
    import transformers

    from mergence.families._transformers_tiny import tiny_configuration

    model = transformers.ViTModel(tiny_configuration("ViTConfig"), use_mask_token=True)
    mask = torch.ones(3, 36, dtype=torch.bool)
    mergence.apply(model, **OPTIONS)
    with pytest.raises(ReducedOutputError, match="bool_masked_pos"):
        model(image, bool_masked_pos=mask)
    mergence.apply(model, schedule=COUNTS)
    model(image, bool_masked_pos=mask)


@pytest.mark.slow
def test_transformers_compile_in_one_graph_and_export_with_any_batch(image: Tensor) -> None:
    import transformers

    from mergence.families._transformers_tiny import tiny_configuration

    config = tiny_configuration("CLIPVisionConfig", num_hidden_layers=2)
    model = transformers.CLIPVisionModel(config).eval()
    mergence.apply(model, schedule=[20, 8], coarse=0.5)
    with torch.no_grad():
        expected = answer(model(image))
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(answer(compiled(image)), expected)
        batch = {0: torch.export.Dim("batch", min=1, max=64)}
        exported = torch.export.export(model, (image,), dynamic_shapes={"pixel_values": batch})
        torch.testing.assert_close(answer(exported.module()(image[:2])), expected[:2])


@torch.no_grad()
@pytest.mark.parametrize("size", [(16, 512), (512, 16)], ids=["a row", "a column"])
def test_a_line_of_patches_has_no_regions_and_only_merges(size: tuple[int, int]) -> None:
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=size).eval()
    mergence.apply(model, macs=0.4)
    found = mergence.describe(model)
    assert found.start == found.patches == 32
    assert found.macs_ratio <= 0.4
    assert model(torch.randn(2, 3, *size)).shape == (2, 1000)
    with pytest.raises(OptionError, match="cannot read patches of this model coarsely"):
        mergence.apply(model, macs=0.4, coarse=0.25)
