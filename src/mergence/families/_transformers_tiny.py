"""Tiny random models of transformers, one of each kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from mergence.families._common import randomised

_TINY: dict[str, tuple[str, str, dict[str, Any]]] = {
    "vit": ("ViTForImageClassification", "ViTConfig", {}),
    "vit_pooler": ("ViTModel", "ViTConfig", {}),
    "deit": ("DeiTForImageClassificationWithTeacher", "DeiTConfig", {}),
    "dinov2": (
        "Dinov2ForImageClassification",
        "Dinov2Config",
        {"mlp_ratio": 4, "layerscale_value": 0.3},
    ),
    "dinov2_reg": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        {"mlp_ratio": 4, "layerscale_value": 0.3, "use_swiglu_ffn": True},
    ),
    "dinov3": (
        "DINOv3ViTModel",
        "DINOv3ViTConfig",
        {
            "num_register_tokens": 4,
            "layerscale_value": 0.3,
            "use_gated_mlp": True,
            "pos_embed_rescale": None,  # else training is random
        },
    ),
    "dinov2_backbone": (
        "Dinov2Backbone",
        "Dinov2Config",
        {"mlp_ratio": 4, "layerscale_value": 0.3, "out_indices": [1, 2, 6]},
    ),
    "dinov3_backbone": (
        "DINOv3ViTBackbone",
        "DINOv3ViTConfig",
        {
            "num_register_tokens": 4,
            "layerscale_value": 0.3,
            "out_indices": [1, 2, 6],
            "pos_embed_rescale": None,
        },
    ),
    "vit_msn": ("ViTMSNForImageClassification", "ViTMSNConfig", {}),
    "ijepa": ("IJepaForImageClassification", "IJepaConfig", {}),
    "clip": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {"projection_dim": 24}),
    "metaclip2": (
        "MetaClip2VisionModelWithProjection",
        "MetaClip2VisionConfig",
        {"projection_dim": 24},
    ),
    "metaclip2_classifier": ("MetaClip2ForImageClassification", "MetaClip2Config", {}),
    "altclip": ("AltCLIPVisionModel", "AltCLIPVisionConfig", {}),
    "chinese_clip": ("ChineseCLIPVisionModel", "ChineseCLIPVisionConfig", {}),
    "clip_classifier": ("CLIPForImageClassification", "CLIPConfig", {}),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {}),
    "siglip_classifier": ("SiglipForImageClassification", "SiglipConfig", {}),
    "aimv2": ("Aimv2VisionModel", "Aimv2VisionConfig", {}),
    "aimv2_native": (
        "Aimv2VisionModel",
        "Aimv2VisionConfig",
        {"is_native": True, "qkv_bias": True},
    ),
    "owlvit": ("OwlViTVisionModel", "OwlViTVisionConfig", {}),
    "blip": ("BlipVisionModel", "BlipVisionConfig", {}),
    "blip2": (
        "Blip2VisionModelWithProjection",
        "Blip2Config",
        {
            "qformer_config": {
                "hidden_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 3,
                "intermediate_size": 96,
                "encoder_hidden_size": 48,
                "hidden_dropout_prob": 0.0,
                "attention_probs_dropout_prob": 0.0,
            },
            "num_query_tokens": 3,
            "image_text_hidden_size": 24,
        },
    ),
    "vitpose_backbone": (
        "VitPoseBackbone",
        "VitPoseBackboneConfig",
        {"image_size": [96, 96], "patch_size": [16, 16], "out_indices": [1, 2, 6]},
    ),
    "videomae": (
        "VideoMAEForVideoClassification",
        "VideoMAEConfig",
        {"num_frames": 8, "patch_size": 32},
    ),
    "vivit": (
        "VivitForVideoClassification",
        "VivitConfig",
        {"num_frames": 8, "tubelet_size": [2, 32, 32]},
    ),
    "tipsv2": (
        "Tipsv2VisionModel",
        "Tipsv2VisionConfig",
        {"mlp_ratio": 4, "layerscale_value": 0.3, "num_register_tokens": 1},
    ),
}


def tiny_configuration(config: str, **options: Any) -> Any:
    """A configuration for six blocks of width 48 and 36 patches of an image of 96 x 96 pixels.

    Args:
        config: The name of the configuration's class.
        **options: What else it holds.
    """
    import transformers

    size = {
        "hidden_size": 48,
        "num_hidden_layers": 6,
        "num_attention_heads": 3,
        "image_size": 96,
        "patch_size": 16,
    }
    if not config.startswith(("Dinov2", "Tipsv2")):
        size["intermediate_size"] = 192
    if "text_config" in getattr(transformers, config).sub_configs:
        text = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3}
        text["project_dim"] = 48  # AltCLIP's
        options |= {
            "vision_config": size,
            "text_config": text | {"intermediate_size": 96, "vocab_size": 64},
        }
        options.setdefault("num_labels", 5)
        return getattr(transformers, config)(**options)
    return getattr(transformers, config)(**(size | {"num_labels": 5} | options))


PACKED = {
    "depth": 6,
    "hidden_size": 48,
    "embed_dim": 48,
    "intermediate_size": 96,
    "mlp_ratio": 2,
    "num_heads": 3,
    "patch_size": 4,
    "image_size": 32,
    "out_hidden_size": 48,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [1, 3],
    "in_channels": 3,
    "window_size": 16,
    "fullatt_block_indexes": [1, 4],
}
"""Sizes of a tower of packed patches, as the configurations of any call them."""


def tiny_models() -> Mapping[str, Callable[[], nn.Module]]:
    """Builders of tiny random models, one for each kind."""

    def builder(cls: str, config: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            import transformers

            model: nn.Module = getattr(transformers, cls)(tiny_configuration(config, **options))
            return randomised(model).eval()

        return build

    return {name: builder(*kind) for name, kind in _TINY.items()}
