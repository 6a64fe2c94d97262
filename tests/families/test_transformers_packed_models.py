"""Models of image and language around towers of packed patches: Qwen2-VL, GLM-4V and their kin."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import mergence
from mergence.errors import UnsupportedModelError
from mergence.families._common import randomised
from mergence.families._transformers import full_name
from mergence.families._transformers_tiny import PACKED
from mergence.families.transformers_packed import CONTAINERS

TEXT = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "intermediate_size": 96,
    "vocab_size": 64,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "rope_parameters": {
        "rope_type": "default",
        "mrope_section": [2, 2, 2],
        "rope_theta": 10000.0,
        "partial_rotary_factor": 1.0,
    },
    "moe_intermediate_size": 32,
    "num_experts": 2,
    "num_experts_per_tok": 1,
}
# What sees an image at two places of a prompt, and what else a configuration wants to hear.
IDS = {"image_token_id": 5, "video_token_id": 6}
IDS |= {"vision_start_token_id": 7, "vision_end_token_id": 8}
IDS |= {"image_start_token_id": 7, "image_end_token_id": 8}
IDS |= {"video_start_token_id": 9, "video_end_token_id": 10}
PROMPT = torch.tensor([[7, *[5] * 16, 8, 7, *[5] * 6, 8, 9, 10]])
AUDIO = {"d_model": 48, "encoder_layers": 1, "encoder_attention_heads": 3, "encoder_ffn_dim": 48}
AUDIO |= {"num_mel_bins": 16, "output_dim": 48, "downsample_hidden_size": 16}


def whole(name: str) -> Any:
    module, _, cls = name.rpartition(".")
    kind = getattr(import_module(module), cls, None)
    if kind is None:
        pytest.skip(f"there is no {cls} in transformers {transformers.__version__}")
    text = dict(TEXT)
    if "ernie" in module:
        text |= {"moe_intermediate_size": [32, 32], "moe_k": 1, "moe_num_experts": 2}
    options: dict[str, Any] = {"text_config": text, "vision_config": dict(PACKED), **IDS}
    if "omni" in module:
        options["audio_config"] = AUDIO
    if cls.startswith("Col"):
        options = {"vlm_config": options | {"model_type": "qwen2_vl"}}
    if "omni" in module and "Thinker" not in cls:
        options = {"thinker_config": options, "enable_audio_output": False}
    return randomised(kind(kind.config_class(**options))).eval()


def asked(model: Any, patches: Tensor, grid: Tensor) -> Any:
    """What a model answers to two images, of 8 x 8 and of 6 x 4 patches."""
    if type(model).__name__.startswith("Col"):  # one image a prompt, and padded
        padded = nn.utils.rnn.pad_sequence(patches.split(grid.prod(dim=1).tolist()), True)
        prompt = PROMPT[:, :18].repeat(2, 1)
        prompt[1, 7:17] = 9
        return model(pixel_values=padded, image_grid_thw=grid, input_ids=prompt).embeddings
    model = getattr(model, "thinker", model)
    kinds = {"mm_token_type_ids": (PROMPT == 5).int()}
    found = model(input_ids=PROMPT, pixel_values=patches, image_grid_thw=grid, **kinds)
    return found.logits if "logits" in found else found.last_hidden_state


@torch.no_grad()
@pytest.mark.parametrize("name", CONTAINERS, ids=lambda name: name.rpartition(".")[2])
def test_models_of_image_and_language_are_reduced_whole(name: str) -> None:
    model = whole(name)
    stem = next(m for n, m in model.named_modules() if n.endswith("patch_embed.proj"))
    grid = torch.tensor([[1, 8, 8], [1, 6, 4]])
    patches = torch.randn(88, stem.weight[0].numel())
    expected, keys = asked(model, patches, grid), list(model.state_dict())
    mergence.apply(model, macs=1.0)
    torch.testing.assert_close(asked(model, patches, grid), expected, rtol=1e-4, atol=1e-5)
    mergence.apply(model, macs=0.6)
    assert list(model.state_dict()) == keys
    found = asked(model, patches, grid)
    assert found.shape == expected.shape
    assert (found - expected).abs().max() > 1e-2
    with mergence.disabled(model):
        assert torch.equal(asked(model, patches, grid), expected)
    assert torch.equal(asked(mergence.remove(model), patches, grid), expected)


@torch.no_grad()
def test_they_write_and_are_saved(tmp_path: Path) -> None:
    model = whole(full_name("qwen3_vl", "Qwen3VLForConditionalGeneration"))
    grid = torch.tensor([[1, 8, 8], [1, 6, 4]])
    inputs = {
        "input_ids": PROMPT,
        "pixel_values": torch.randn(88, 96),
        "image_grid_thw": grid,
        "mm_token_type_ids": (PROMPT == 5).int(),
    }
    options = {"max_new_tokens": 4, "do_sample": False}
    dense = model.generate(**inputs, **options)
    mergence.apply(model, macs=0.6)
    expected = model.generate(**inputs, **options)
    assert expected.shape[1] > PROMPT.shape[1]
    mergence.save(model, tmp_path / "reduced")
    with mergence.disabled(model):
        assert torch.equal(model.generate(**inputs, **options), dense)
    again = mergence.load(tmp_path / "reduced")
    assert torch.equal(again.generate(**inputs, **options), expected)


def test_a_model_around_another_tower_is_refused() -> None:
    model = whole(full_name("qwen2_vl", "Qwen2VLModel"))
    model.visual = nn.Identity()
    with pytest.raises(UnsupportedModelError, match="Qwen2VLModel has none of the towers"):
        mergence.apply(model, macs=0.6)
