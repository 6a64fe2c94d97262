"""Reduced models of transformers: outputs, heads, inputs, and the models that contain a tower."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
import transformers
from accelerate.utils import compile_regions
from torch import Tensor, nn

import mergence
from mergence.errors import ReducedOutputError, UnsupportedModelError
from mergence.families._common import randomised
from mergence.families._transformers import TOWERS, entry
from mergence.families._transformers_releases import as_built
from mergence.families._transformers_tiny import tiny_configuration
from mergence.families.transformers import FAMILY, _opened
from mergence.outputs import answer

TEXT = torch.tensor([[1, 5, 9, 2], [1, 7, 3, 2], [1, 4, 4, 2]])


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 96, 96)


def tiny(kind: str) -> Any:
    return FAMILY.tiny()[kind]()


@torch.no_grad()
@pytest.mark.parametrize("kind", ["dinov2", "dinov2_reg", "clip_classifier", "siglip_classifier"])
def test_classifiers_average_by_size_and_towers_in_them_stay_plain(
    kind: str, image: Tensor
) -> None:
    model = mergence.apply(tiny(kind).double(), keep_rate=0.6)
    image = image.double()
    tower = next(m for m in model.modules() if type(m).__name__.endswith(("Model", "Transformer")))
    prefix = mergence.describe(model).prefix
    size = mergence.trace(model, image).points[-1].size.double()
    assert (size > 1).any()
    tokens = tower(image).last_hidden_state
    mean = (tokens[:, prefix:] * size.unsqueeze(2)).sum(dim=1) / 36
    features = torch.cat((tokens[:, 0], mean), dim=1) if "dino" in kind else mean
    # log(size) and the shares are float32.
    torch.testing.assert_close(
        model(image).logits, model.classifier(features), rtol=1e-5, atol=1e-6
    )
    in_tuple = model(image, return_dict=False)
    assert isinstance(in_tuple, tuple)
    assert torch.equal(in_tuple[0], model(image).logits)


@torch.no_grad()
@pytest.mark.parametrize(
    "cls",
    [
        "CLIPModel",
        "SiglipModel",
        "MetaClip2Model",
        "AltCLIPModel",
        "ChineseCLIPModel",
        "Aimv2Model",
        "Tipsv2Model",
    ],
)
def test_models_of_image_and_text_are_reduced_directly(cls: str, image: Tensor) -> None:
    config = tiny_configuration(cls.replace("Model", "Config"))
    model = randomised(getattr(transformers, cls)(config)).eval()
    keys = list(model.state_dict())
    expected = model(TEXT, image)
    embedding = answer(model.get_image_features(image))
    mergence.apply(model, macs=1.0)
    assert torch.equal(model(TEXT, image).logits_per_image, expected.logits_per_image)
    mergence.apply(model, keep_rate=0.7)
    assert mergence.describe(model).counts == (36, 26, 26, 19, 14, 14)
    assert list(model.state_dict()) == keys
    reduced = model(TEXT, image)
    assert reduced.logits_per_image.shape == (2, 3)
    assert reduced.logits_per_image.isfinite().all()
    assert not torch.equal(reduced.image_embeds, expected.image_embeds)
    assert torch.equal(reduced.text_embeds, expected.text_embeds)
    found = answer(model.get_image_features(image))
    assert not torch.equal(found, embedding)
    with mergence.disabled(model):
        assert torch.equal(answer(model.get_image_features(image)), embedding)
    alone = mergence.apply(mergence.remove(model).vision_model, keep_rate=0.7)
    pooled = alone(image).pooler_output
    projected = hasattr(model, "visual_projection")
    pooled = model.visual_projection(pooled) if projected else pooled
    assert torch.equal(pooled, found)


@torch.no_grad()
@pytest.mark.parametrize("library", ["llava", "paligemma"])
def test_a_language_model_reads_the_tokens_that_its_tower_leaves(
    library: str, image: Tensor
) -> None:
    size = {"hidden_size": 48, "num_hidden_layers": 6, "num_attention_heads": 3}
    vision: Any = size | {"intermediate_size": 96, "image_size": 96, "patch_size": 16}
    text: Any = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3}
    text |= {"intermediate_size": 96, "vocab_size": 64, "num_key_value_heads": 3, "head_dim": 16}
    if library == "llava":
        config = transformers.LlavaConfig(
            vision_config=vision | {"model_type": "clip_vision_model"},
            text_config=text | {"model_type": "llama"},
            image_token_index=5,
        )
        model: Any = transformers.LlavaForConditionalGeneration(config).eval()
    else:
        config = transformers.PaliGemmaConfig(
            vision_config=vision
            | {"model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": 48},
            text_config=text | {"model_type": "gemma"},
            image_token_index=5,
            projection_dim=48,
            hidden_size=48,
        )
        model = transformers.PaliGemmaForConditionalGeneration(config).eval()

    def run(tokens: int) -> Tensor:
        prompt = torch.tensor([[1] + [5] * tokens + [7, 8]] * 2)
        mask = {"attention_mask": torch.ones_like(prompt)}
        types = {"token_type_ids": torch.zeros_like(prompt)} if library == "paligemma" else {}
        logits: Tensor = model(input_ids=prompt, pixel_values=image, **mask, **types).logits
        return logits

    dense = run(36)
    tower = mergence.apply(model.model.vision_tower, schedule=[36, 28, 28, 20, 20, 9])
    left = mergence.describe(tower).counts[-2 if library == "llava" else -1]
    assert run(left).shape == (2, left + 3, 64)
    with pytest.raises(ValueError, match="do not match"):
        run(36)
    with mergence.disabled(tower):
        assert torch.equal(run(36), dense)


def test_a_model_around_a_supported_one_is_refused_with_its_place() -> None:
    words = transformers.BertConfig(
        hidden_size=48, num_hidden_layers=1, num_attention_heads=3, vocab_size=64
    )
    model = transformers.VisionTextDualEncoderModel(
        vision_model=tiny("vit_pooler"), text_model=transformers.BertModel(words)
    )
    with pytest.raises(UnsupportedModelError, match=r"supported model at '\.vision_model'"):
        mergence.apply(model, keep_rate=0.6)


@torch.no_grad()
def test_hidden_states_are_those_of_the_tokens_there_are(image: Tensor) -> None:
    model = mergence.apply(tiny("vit"), keep_rate=0.7)
    found = model(image, output_hidden_states=True)
    counts = (36, *mergence.describe(model).counts)
    assert [h.shape for h in found.hidden_states] == [(2, 1 + n, 48) for n in counts]
    assert torch.equal(found.logits, model(image).logits)
    with mergence.disabled(model):
        dense = model(image, output_hidden_states=True).hidden_states
    assert {h.shape for h in dense} == {(2, 37, 48)}
    assert torch.equal(found.hidden_states[1], dense[1])


@torch.no_grad()
@pytest.mark.parametrize("kind", ["vit_pooler", "dinov2_reg", "dinov3", "siglip"])
def test_hidden_states_give_every_patch_its_value_back(
    kind: str, image: Tensor, merges: Any, by_hand: Any
) -> None:
    model = tiny(kind)
    dense = model(image, output_hidden_states=True)
    mergence.apply(model, "mergence", keep_rate=0.6)
    found = model(image, output_hidden_states=True)
    full = [mergence.restore(h) for h in found.hidden_states]
    assert [h.shape for h in full] == [h.shape for h in dense.hidden_states]
    assert torch.equal(full[0], dense.hidden_states[0])
    prefix = mergence.describe(model).prefix
    for tokens, whole in zip(found.hidden_states[:-1], full, strict=False):
        values = by_hand(tokens[:, prefix:], merges)
        torch.testing.assert_close(whole[:, prefix:], values, rtol=1e-5, atol=1e-5)
        assert torch.equal(whole[:, :prefix], tokens[:, :prefix])
    assert len(merges) == 3
    if hasattr(found, "last_hidden_state"):
        last = mergence.restore(found.last_hidden_state)
        assert last.shape == dense.last_hidden_state.shape
        assert torch.equal(last[:, :prefix], found.last_hidden_state[:, :prefix])


@torch.no_grad()
def test_the_last_hidden_state_passed_the_norm_that_the_tables_name(
    merges: Any, by_hand: Any
) -> None:
    seen = set()
    for build in FAMILY.tiny().values():
        model = build()
        container, _, tower = _opened(model)
        kind = as_built(entry(TOWERS, tower), tower)
        if kind.maps or (container is not None and (container.heads or container.full)):
            continue  # it does not give out tokens
        seen.add(kind.norm)
        last: list[Any] = []

        def keep(block: Any, inputs: Any, y: Any, last: list[Any] = last) -> None:
            last.append(y[0] if isinstance(y, tuple) else y)

        tower.get_submodule(kind.blocks)[-1].register_forward_hook(keep)
        norm = getattr(tower, kind.norm or "", None) or nn.Identity()
        x = torch.randn(2, *FAMILY.input_shape(model))
        for keep_rate in (1.0, 0.6):
            merges.clear()
            found = mergence.apply(model, keep_rate=keep_rate)(x).last_hidden_state
            tokens = last[-1]
            torch.testing.assert_close(found, norm(tokens))
            prefix = mergence.describe(model).prefix
            patches = by_hand(tokens[:, prefix:], merges)
            full = norm(torch.cat((tokens[:, :prefix], patches), dim=1))
            torch.testing.assert_close(mergence.restore(found), full, rtol=1e-5, atol=1e-5)
    assert seen == {None, "layernorm", "norm", "post_layernorm", "rms_norm"}


@torch.no_grad()
def test_attention_maps_are_refused_and_work_while_disabled(image: Tensor) -> None:
    model = tiny("vit")
    model.set_attn_implementation("eager")
    mergence.apply(model, keep_rate=0.7)
    with pytest.raises(ReducedOutputError, match=r"output_attentions.*mergence\.disabled"):
        model(image, output_attentions=True)
    with mergence.disabled(model):
        assert model(image, output_attentions=True).attentions[5].shape == (2, 3, 37, 37)
    model.config.output_attentions = True
    with pytest.raises(ReducedOutputError, match="output_attentions"):
        model(image)


@torch.no_grad()
def test_masks_are_refused_and_work_while_disabled(image: Tensor) -> None:
    model, mask = tiny("vit"), torch.ones(2, 37, dtype=torch.long)
    if "attention_mask" not in inspect.signature(model.vit.forward).parameters:
        pytest.skip("this release of the library takes no masks of patches")
    mask[:, 5] = 0
    expected = model(image, attention_mask=mask).logits
    mergence.apply(model, keep_rate=0.7)
    with pytest.raises(ReducedOutputError, match=r"attention mask.*mergence\.disabled"):
        model(image, attention_mask=mask)
    with pytest.raises(ReducedOutputError, match="attention mask"):
        model.vit(image, None, None, mask)
    with mergence.disabled(model):
        assert torch.equal(model(image, attention_mask=mask).logits, expected)


@torch.no_grad()
def test_attention_that_takes_no_sizes_is_refused(image: Tensor) -> None:
    model = tiny("vit")
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedModelError, match=r"'flex_attention'.*set_attn_impl.*'sdpa'"):
        mergence.apply(model, macs=0.67)
    model.set_attn_implementation("sdpa")
    mergence.apply(model, macs=0.67)
    model.vit.config._attn_implementation = "flex_attention"
    with pytest.raises(ReducedOutputError, match=r"'flex_attention'.*set_attn_impl.*'sdpa'"):
        model(image)


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (128, 96)], ids=str)
@pytest.mark.parametrize("kind", ["vit", "dinov2", "dinov3", "clip", "siglip"])
def test_other_image_sizes(kind: str, size: tuple[int, int]) -> None:
    model, image = tiny(kind), torch.randn(2, 3, *size)
    options = {} if "dino" in kind else {"interpolate_pos_encoding": True}
    expected = answer(model(image, **options))
    mergence.apply(model, macs=1.0)
    assert torch.equal(answer(model(image, **options)), expected)
    mergence.apply(model, keep_rate=0.5)
    found = answer(model(image, **options))
    assert found.shape == expected.shape
    assert not torch.equal(found, expected)
    assert mergence.apply(model, keep_rate=1.0)(image, **options)[0].isfinite().all()


@torch.no_grad()
def test_a_pooling_head_that_cannot_know_the_sizes_refuses(image: Tensor) -> None:
    model = mergence.apply(tiny("siglip"), keep_rate=0.7)
    tokens = model(image).last_hidden_state
    head = next(m for name, m in model.named_modules() if name.split(".")[-1] == "head")
    with pytest.raises(ReducedOutputError, match=r"head.*by itself.*14 tokens.*mergence\.disabled"):
        head(tokens)
    with mergence.disabled(model):
        assert head(tokens).shape == (2, 48)


def test_a_foreign_block_is_refused() -> None:
    class OtherLayer(nn.Identity):
        attention = nn.Identity()

    model = tiny("vit")
    next(m for m in model.modules() if isinstance(m, nn.ModuleList))[2] = OtherLayer()
    with pytest.raises(UnsupportedModelError, match=r"Block 3 .*OtherLayer;.*ViTLayer"):
        mergence.apply(model, macs=0.67)


def test_blocks_that_are_compiled_already_are_refused_with_what_to_do() -> None:
    model = compile_regions(tiny("vit"), backend="eager")
    with pytest.raises(UnsupportedModelError, match=r"OptimizedModule;.*Apply before torch\.comp"):
        mergence.apply(model, macs=0.67)


@pytest.mark.parametrize(
    ("cls", "options"),
    [
        ("SwinModel", {"embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2]}),
        ("ConvNextModel", {"hidden_sizes": [8] * 4, "depths": [1] * 4}),
    ],
)
def test_what_has_no_plain_sequence_is_refused_by_name(cls: str, options: dict[str, Any]) -> None:
    config = getattr(transformers, cls.replace("Model", "Config"))(**options)
    model = getattr(transformers, cls)(config)
    with pytest.raises(UnsupportedModelError, match=rf"{cls};.*Known:.*transformers' ViT"):
        mergence.apply(model, macs=0.67)


@torch.no_grad()
@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
def test_spectrograms(kernel: str) -> None:
    config = transformers.ASTConfig(
        hidden_size=48,
        num_hidden_layers=6,
        num_attention_heads=3,
        intermediate_size=192,
        num_mel_bins=36,
        max_length=76,
        num_labels=5,
    )
    model = randomised(transformers.ASTForAudioClassification(config)).eval()
    model.set_attn_implementation(kernel)
    sound = torch.randn(2, 76, 36)
    expected, before = model(sound).logits, list(model.state_dict())
    mergence.apply(model, macs=1.0)
    assert torch.equal(model(sound).logits, expected)
    mergence.apply(model, keep_rate=0.5)
    found = mergence.describe(model)
    assert (found.patches, found.prefix, found.counts[-1]) == (3 * 7, 2, 3)
    reduced = model(input_values=sound).logits
    assert not torch.equal(reduced, expected)
    trace = mergence.trace(model, sound)
    assert trace.grid == (3, 7)
    torch.testing.assert_close(trace.output.logits, reduced)
    assert list(model.state_dict()) == before
    assert torch.equal(mergence.remove(model)(sound).logits, expected)


SMALL = {"hidden_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    ("cls", "config", "reason"),
    [
        ("BeitModel", "BeitConfig", "bias for every pair of places"),
        ("ViTForMaskedImageModeling", "ViTConfig", "reconstructs every patch"),
    ],
)
def test_what_looks_like_a_covered_model_is_refused_with_the_reason(
    cls: str, config: str, reason: str
) -> None:
    model = getattr(transformers, cls)(getattr(transformers, config)(**SMALL))
    with pytest.raises(
        UnsupportedModelError, match=rf"A transformers\.\S+\.{cls} cannot.*{reason}.*Known: open_"
    ):
        mergence.apply(model, macs=0.67)
