"""Models of transformers whose heads or decoders read a token for every patch of the image."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

import mergence
from mergence.errors import ReducedOutputError, UnsupportedModelError
from mergence.families._common import randomised
from mergence.families._transformers_tiny import tiny_configuration

TEXT = torch.tensor([[1, 5, 9, 2], [1, 7, 3, 2]])
SMALL = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3}
QFORMER = SMALL | {"intermediate_size": 96, "encoder_hidden_size": 48, "vocab_size": 64}
SCHEDULE = [36, 28, 28, 20, 20, 11]
SIZES = torch.tensor([[96, 96]] * 2)
PADDED = ("Idefics2", "Idefics3", "SmolVLM")
CLIP, SIGLIP, INTERN, *PADDING = (
    tiny_configuration(f"{name}VisionConfig").to_dict()
    for name in ("CLIP", "Siglip", "InternVL", *PADDED)
)

PERCEIVER = {"resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 3}
PERCEIVER |= {"resampler_head_dim": 16, "num_key_value_heads": 3, "hidden_size": 48}

GEMMA = SMALL | {"model_type": "gemma", "num_key_value_heads": 3, "head_dim": 16}
GEMMA |= {"intermediate_size": 96, "vocab_size": 64}

Reader = tuple[Any, str, Callable[[Any, Tensor], Tensor]]


def build(cls: str, config: Any) -> Any:
    return randomised(getattr(transformers, cls)(config)).eval()


def detector(name: str) -> Reader:
    config = tiny_configuration(f"{name}Config", projection_dim=48)
    return (
        build(f"{name}ForObjectDetection", config),
        f"{name.lower()}.vision_model",
        lambda model, image: _joined(model(TEXT, image), "logits", "pred_boxes"),
    )


def segmenter() -> Reader:
    config = tiny_configuration(
        "CLIPSegConfig",
        extract_layers=[0, 2, 5],
        reduce_dim=16,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=32,
        projection_dim=48,
    )
    model = build("CLIPSegForImageSegmentation", config)
    return model, "clip.vision_model", lambda model, image: model(TEXT, image).logits


def captioner() -> Reader:
    config = tiny_configuration("BlipConfig")
    config.text_config.encoder_hidden_size = 48
    config.text_config.is_decoder = True
    config.text_config.update({"bos_token_id": 1, "eos_token_id": 2, "sep_token_id": 2})
    model = build("BlipForConditionalGeneration", config)
    return model, "vision_model", lambda model, image: model(image, TEXT).logits


def matcher() -> Reader:
    config = tiny_configuration("BlipConfig", image_text_hidden_size=24)
    config.text_config.encoder_hidden_size = 48
    model = build("BlipForImageTextRetrieval", config)
    return model, "vision_model", lambda model, image: model(TEXT, image).itm_score


def answerer() -> Reader:
    config = tiny_configuration("BlipConfig")
    config.text_config.encoder_hidden_size = 48
    model = build("BlipForQuestionAnswering", config)
    return (
        model,
        "vision_model",
        lambda model, image: model(TEXT, image, decoder_input_ids=TEXT, labels=TEXT).loss[None],
    )


def language_model(name: str) -> Reader:
    text = SMALL | {"ffn_dim": 96, "vocab_size": 64, "word_embed_proj_dim": 48, "pad_token_id": 1}
    config = tiny_configuration(
        f"{name}Config", qformer_config=QFORMER, num_query_tokens=3, image_token_index=5
    )
    config.text_config = transformers.OPTConfig(**text)
    prompt = torch.tensor([[5, 5, 5, 2, 7, 9]] * 2)
    more = {"qformer_input_ids": TEXT} if name == "InstructBlip" else {}
    return (
        build(f"{name}ForConditionalGeneration", config),
        "vision_model",
        lambda model, image: model(pixel_values=image, input_ids=prompt, **more).logits,
    )


def conversation(
    names: str, text: str, tokens: int, vision: Mapping[str, Any] = CLIP, **options: Any
) -> Reader:
    """A model whose language model of one kind has a number of tokens for an image."""
    more = {"model_type": text, "num_key_value_heads": 3, "head_dim": 16, "pad_token_id": 1}
    more |= {"intermediate_size": 96, "vocab_size": 64, "eos_token_id": 2}
    kind = getattr(transformers, f"{names}Config")
    placeholder = "image_token_id" if hasattr(kind, "image_token_id") else "image_token_index"
    options |= {placeholder: 5, "vision_config": dict(vision), "text_config": SMALL | more}
    model = build(f"{names}ForConditionalGeneration", kind(**options))
    prompt = torch.tensor([[5] * tokens + [2, 7]] * 2)

    def call(model: Any, image: Tensor) -> Tensor:
        size = {}
        if "image_grid_pinpoints" in options:  # the whole image, and then its parts
            image, size = image[:, None].repeat(1, 2, 1, 1, 1), {"image_sizes": SIZES}
        if names in PADDED:  # several images for each prompt
            image = image[:, None]
        scores: Tensor = model(pixel_values=image, input_ids=prompt, **size).logits
        return scores

    tower = "vision_tower" if hasattr(model.model, "vision_tower") else "vision_model"
    return model, f"model.{tower}", call


def paligemma() -> dict[str, Any]:
    """The configuration of a PaliGemma inside another model, and of its text."""
    options = {"vision_config": SIGLIP | {"projection_dim": 48}, "text_config": GEMMA}
    return options | {"model_type": "paligemma", "projection_dim": 48, "image_token_index": 5}


def retriever() -> Reader:
    model = build("ColPaliForRetrieval", transformers.ColPaliConfig(vlm_config=paligemma()))
    prompt = torch.tensor([[5] * 36 + [2, 7]] * 2)
    return model, "vlm.vision_tower", lambda model, image: model(prompt, image).embeddings


def robot() -> Reader:
    config = transformers.PI0Config(vlm_config=paligemma(), dit_config=GEMMA, chunk_size=4)
    model = build("PI0ForConditionalGeneration", config)
    inputs = {
        "state": torch.ones(2, 32),
        "noise": torch.ones(2, 4, 32),
        "timestep": torch.tensor([0.5, 0.5]),
        "input_ids": torch.tensor([[5] * 36 + [2, 7]] * 2),
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
    }
    return (
        model,
        "model.vlm.vision_tower",
        lambda model, image: model(pixel_values=image[:, None], **inputs).logits,
    )


def reader_of_text() -> Reader:
    decoder = transformers.TrOCRConfig(
        d_model=48, decoder_layers=1, decoder_attention_heads=3, decoder_ffn_dim=96, vocab_size=64
    )
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        tiny_configuration("ViTConfig"), decoder
    )
    model = build("VisionEncoderDecoderModel", config)
    return model, "encoder", lambda model, image: model(image, decoder_input_ids=TEXT).logits


def depth(**options: Any) -> Reader:
    config = tiny_configuration(
        "DPTConfig",
        backbone_out_indices=[0, 1, 3, 5],
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        **options,
    )
    model = build("DPTForDepthEstimation", config)
    return model, "dpt", lambda model, image: model(image).predicted_depth


READERS: dict[str, Callable[[], Reader]] = {
    "owlvit": lambda: detector("OwlViT"),
    "owlv2": lambda: detector("Owlv2"),
    "clipseg": segmenter,
    "blip": captioner,
    "blip_vqa": answerer,
    "blip_itm": matcher,
    "blip2": lambda: language_model("Blip2"),
    "instructblip": lambda: language_model("InstructBlip"),
    "llava": lambda: conversation("Llava", "llama", 36),
    "vipllava": lambda: conversation("VipLlava", "llama", 36, vision_feature_layers=[-2, -3]),
    "llava_next": lambda: conversation("LlavaNext", "llama", 78, image_grid_pinpoints=[[96, 96]]),
    "llava_next_video": lambda: conversation(
        "LlavaNextVideo", "llama", 78, image_grid_pinpoints=[[96, 96]]
    ),
    "llava_onevision": lambda: conversation(
        "LlavaOnevision", "qwen2", 78, SIGLIP, image_grid_pinpoints=[[96, 96]]
    ),
    "paligemma": lambda: conversation(
        "PaliGemma", "gemma", 36, SIGLIP | {"projection_dim": 48}, projection_dim=48
    ),
    "gemma3": lambda: conversation("Gemma3", "gemma3_text", 9, SIGLIP, mm_tokens_per_image=9),
    "aya_vision": lambda: conversation("AyaVision", "cohere2", 9, SIGLIP),
    "cohere2_vision": lambda: conversation(
        "Cohere2Vision", "cohere2", 9, SIGLIP, alignment_intermediate_size=64
    ),
    "internvl": lambda: conversation("InternVL", "qwen2", 9, INTERN),
    "internvl_6b": lambda: conversation(
        "InternVL", "qwen2", 9, INTERN | {"use_qk_norm": True, "norm_type": "rms_norm"}
    ),
    "deepseek_vl": lambda: conversation("DeepseekVL", "llama", 36, SIGLIP),
    "idefics2": lambda: conversation(
        "Idefics2", "mistral", 4, PADDING[0], perceiver_config=PERCEIVER
    ),
    "idefics3": lambda: conversation("Idefics3", "llama", 9, PADDING[1]),
    "smolvlm": lambda: conversation("SmolVLM", "llama", 9, PADDING[2]),
    "colpali": retriever,
    "pi0": robot,
    "trocr": reader_of_text,
    "dpt": depth,
}
DINO = {"model_type": "dinov2", "num_hidden_layers": 6, "reshape_hidden_states": False}
DINO |= SMALL | {"num_hidden_layers": 6, "image_size": 96, "patch_size": 16}


def _joined(outputs: Any, *names: str) -> Tensor:
    return torch.cat([getattr(outputs, name).flatten(1) for name in names], dim=1)


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 96, 96)


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest) -> Reader:
    return READERS[request.param]()


@torch.no_grad()
def test_they_read_its_tokens_value_for_every_patch(reader: Reader, image: Tensor) -> None:
    model, path, call = reader
    expected, keys = call(model, image), list(model.state_dict())
    alone = mergence.apply(copy.deepcopy(model.get_submodule(path)), schedule=SCHEDULE)
    mergence.apply(model, macs=1.0)
    assert torch.equal(call(model, image), expected)
    mergence.apply(model, schedule=SCHEDULE)
    assert mergence.describe(model).counts == tuple(SCHEDULE)
    assert list(model.state_dict()) == keys
    given: list[Any] = []
    handle = model.get_submodule(path).register_forward_hook(
        lambda _, inputs, options, output: given.extend([*inputs, *options.values(), output]),
        with_kwargs=True,
    )
    found = call(model, image)
    handle.remove()
    seen, output = given[0], given[-1]
    assert found.shape == expected.shape
    assert not torch.equal(found, expected)
    states = "hidden_states" in output
    own = alone(seen, output_hidden_states=states)
    tokens = [own.last_hidden_state, *(own.hidden_states if states else ())]
    full = [output.last_hidden_state, *(output.hidden_states if states else ())]
    prefix = mergence.describe(model).prefix
    for one, other in zip(full, tokens, strict=True):
        if one is not None:  # the library keeps those states that it needs
            assert one.shape == (len(seen), prefix + 36, 48)
            assert torch.equal(one, mergence.restore(other))
            assert torch.equal(mergence.restore(one), one)
    with mergence.disabled(model):
        assert torch.equal(call(model, image), expected)
    mergence.remove(model)
    assert torch.equal(call(model, image), expected)


@torch.no_grad()
def test_they_can_read_coarsely(reader: Reader, image: Tensor) -> None:
    model, _, call = reader
    expected = call(model, image)
    mergence.apply(model, macs=0.5, coarse=0.3)
    assert mergence.describe(model).start < 36
    found = call(model, image)
    assert found.shape == expected.shape
    assert found.isfinite().all()


@torch.no_grad()
def test_a_decoder_weighs_a_merged_token_by_its_size(image: Tensor) -> None:
    # Patches that look alike are one token, which nothing is lost by, if it counts as many times.
    model, _, call = captioner()
    model.vision_model.embeddings.position_embedding.zero_()
    image = image[:, :, :16, :16].repeat(1, 1, 6, 6)
    image[:, :, :16, :16] = torch.randn(2, 3, 16, 16)
    expected = call(model, image)
    mergence.apply(model, schedule=[36, 30, 20, 10, 4, 2])
    torch.testing.assert_close(call(model, image), expected, rtol=1e-4, atol=1e-5)
    alone = mergence.remove(model).vision_model
    mergence.apply(alone, schedule=[36, 30, 20, 10, 4, 2])
    assert (call(model, image) - expected).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize("name", ["OwlViT", "Owlv2"])
def test_detectors_look_for_what_an_image_shows(name: str, image: Tensor) -> None:
    model, _, _ = detector(name)
    query = image.flip(2)
    expected = model.image_guided_detection(image, query).target_pred_boxes
    mergence.apply(model, macs=1.0)
    assert torch.equal(model.image_guided_detection(image, query).target_pred_boxes, expected)
    mergence.apply(model, schedule=SCHEDULE)
    found = model.image_guided_detection(image, query).target_pred_boxes
    assert found.shape == expected.shape == (2, 36, 4)
    assert not torch.equal(found, expected)


@torch.no_grad()
@pytest.mark.parametrize(
    "make", [captioner, reader_of_text, lambda: language_model("Blip2"), READERS["gemma3"]]
)
def test_they_write(make: Callable[[], Reader], image: Tensor) -> None:
    model, path, _ = make()
    options = {"max_new_tokens": 4, "do_sample": False}
    if path == "encoder":
        options |= {"decoder_start_token_id": 1, "eos_token_id": 63, "pad_token_id": 0}
    if "Blip2" in type(model).__name__:
        options["input_ids"] = torch.tensor([[5, 5, 5, 2]] * 2)
    if "Gemma3" in type(model).__name__:
        options["input_ids"] = torch.tensor([[5] * 9 + [2]] * 2)
    expected = model.generate(pixel_values=image, **options)
    mergence.apply(model, macs=1.0)
    assert torch.equal(model.generate(pixel_values=image, **options), expected)
    mergence.apply(model, schedule=SCHEDULE)
    assert len(model.generate(pixel_values=image, **options)) == 2
    with mergence.disabled(model):
        assert torch.equal(model.generate(pixel_values=image, **options), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["idefics2", "smolvlm"])
def test_an_image_that_is_padded_is_refused(kind: str, image: Tensor) -> None:
    model = mergence.apply(READERS[kind]()[0], schedule=SCHEDULE)
    mask = torch.ones(2, 1, 96, 96, dtype=torch.bool)
    prompt = torch.tensor([[5] * (4 if kind == "idefics2" else 9) + [2, 7]] * 2)
    inputs = {"pixel_values": image[:, None], "input_ids": prompt}
    expected = model(**inputs).logits
    assert torch.equal(model(**inputs, pixel_attention_mask=mask).logits, expected)
    mask[:, :, 64:] = False
    with pytest.raises(ReducedOutputError, match="given an attention mask"):
        model(**inputs, pixel_attention_mask=mask)
    with mergence.disabled(model):
        assert model(**inputs, pixel_attention_mask=mask).logits.shape == expected.shape


def test_a_tower_that_is_not_known_in_one_of_them_is_named() -> None:
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2]),
        transformers.TrOCRConfig(
            d_model=16, decoder_layers=1, decoder_attention_heads=2, vocab_size=64
        ),
    )
    model = transformers.VisionEncoderDecoderModel(config)
    with pytest.raises(UnsupportedModelError, match=r"'encoder' of this VisionEnc.*SwinModel\. Kn"):
        mergence.apply(model, macs=0.67)


@torch.no_grad()
def test_a_depth_model_may_be_built_on_a_backbone(image: Tensor) -> None:
    model, _, call = depth(backbone_config=DINO | {"out_indices": [1, 3, 4, 6]})
    expected = call(model, image)
    mergence.apply(model, schedule=SCHEDULE)
    found = call(model, image)
    assert found.shape == expected.shape
    assert not torch.equal(found, expected)
    mergence.apply(mergence.remove(model).backbone, schedule=SCHEDULE)
    assert torch.equal(call(model, image), found)


def test_a_depth_model_on_a_hybrid_is_refused() -> None:
    bit = {"model_type": "bit", "embedding_size": 8, "hidden_sizes": [8, 8, 8, 48]}
    bit |= {"depths": [1, 1, 1, 1], "out_features": ["stage1", "stage2", "stage3"]}
    bit |= {"layer_type": "bottleneck", "embedding_dynamic_padding": True, "num_groups": 2}
    hybrid = {"is_hybrid": True, "backbone_config": bit, "backbone_featmap_shape": [1, 8, 6, 6]}
    with pytest.raises(UnsupportedModelError, match=r"DPTModel.*a hybrid with a convolutional"):
        mergence.apply(depth(**hybrid, neck_ignore_stages=[0, 1])[0], macs=0.67)
