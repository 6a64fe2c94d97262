"""timm's models that look like plain Vision Transformers are refused, each with its reason."""

from __future__ import annotations

import pytest
import timm
import torch

import mergence
from mergence.errors import UnsupportedModelError
from mergence.families._timm_refused import REFUSED

# One of each class, the smallest; the class, without `timm.models.`, and a part of the reason.
ARCHITECTURES = {
    "cait_xxs24_224": ("cait.Cait", "heads mix their attention maps"),
    "convit_tiny": ("convit.ConVit", "distances of all places"),
    "crossvit_tiny_240": ("crossvit.CrossVit", "two sequences"),
    "deepseek_vit_412m": ("deepseek_vit.DeepseekVitClassifier", "back into the grid"),
    "deepseek_vit_412m_enc": ("deepseek_vit.DeepseekVitEncoder", "back into the grid"),
    "gemma4_vit_167m": ("gemma4_vit.Gemma4VitClassifier", "norms behind attention"),
    "gemma4_vit_167m_enc": ("gemma4_vit.Gemma4VitEncoder", "norms behind attention"),
    "mixer_s32_224": ("mlp_mixer.MlpMixer", "as wide as there are patches"),
    "qwen3_vit_88m": ("qwen3_vit.Qwen3VitClassifier", "back into the grid"),
    "qwen3_vit_88m_enc": ("qwen3_vit.Qwen3VitEncoder", "back into the grid"),
    "tnt_s_legacy_patch16_224": ("tnt.TNT", "sequence of its pixels"),
    "vit_relpos_small_patch16_224": (
        "vision_transformer_relpos.VisionTransformerRelPos",
        "bias for every pair of places",
    ),
    "samvit_base_patch16": ("vision_transformer_sam.VisionTransformerSAM", "windows"),
    "volo_d1_224": ("volo.VOLO", "grid smaller"),
    "xcit_nano_12_p16_224": ("xcit.Xcit", "between channels"),
}
# Of the class that is covered, with parts that are not.
PARTS = {
    "vit_base_patch16_rpn_224": "ResPostBlock",
    "vit_small_patch16_18x2_224": "ParallelThingsBlock",
    "vit_dpwee_patch16_reg1_gap_256": "DiffParallelScalingBlock",
    "vit_pwee_patch16_reg1_gap_256": "ParallelScalingBlock",
    "vit_tiny_r_s16_p8_224": "HybridEmbed",
    "vitamin_small_224": "HybridEmbed",
}


def build(name: str) -> torch.nn.Module:
    with torch.device("meta"):  # their sizes do not matter
        model: torch.nn.Module = timm.create_model(name)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_reason_is_that_of_the_class(name: str) -> None:
    cls, reason = ARCHITECTURES[name]
    with pytest.raises(UnsupportedModelError) as caught:
        mergence.apply(build(name), macs=0.67)
    message = str(caught.value)
    assert message.startswith(f"A timm.models.{cls} cannot be reduced: ")
    assert reason in message
    assert "Known: " in message


def test_every_class_that_is_refused_by_name_is_among_them() -> None:
    assert {f"timm.models.{cls}" for cls, _ in ARCHITECTURES.values()} == set(REFUSED)


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTS)
def test_other_blocks_and_stems_are_named(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"is a timm\.\S+\.{PARTS[name]}; mergence"):
        mergence.apply(build(name), macs=0.67)
