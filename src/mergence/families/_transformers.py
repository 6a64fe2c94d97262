"""Names in transformers: architectures, where their parts are, and tiny ones of each kind."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mergence.families._common import randomised


@dataclass(frozen=True)
class Layout:
    """What a block calls its parts.

    Attributes:
        attention: The attention.
        norms: The norms before attention and MLP.
        after: What both branches pass through before they are added.
        mlp: The MLP, in one part or two.
    """

    attention: str
    norms: tuple[str, str]
    after: tuple[tuple[str, ...], tuple[str, ...]]
    mlp: tuple[str, ...] = ("mlp",)


VIT = Layout("attention", ("layernorm_before", "layernorm_after"), (("dropout",), ("dropout",)))
DINO = Layout(
    "attention", ("norm1", "norm2"), (("layer_scale1", "drop_path"), ("layer_scale2", "drop_path"))
)
CLIP = Layout("self_attn", ("layer_norm1", "layer_norm2"), ((), ()))
VIDEO = Layout(
    "attention", ("layernorm_before", "layernorm_after"), ((), ()), ("intermediate", "output")
)


@dataclass(frozen=True)
class Tower:
    """Where a tower keeps its parts.

    Attributes:
        block: The class of its blocks, in the module of the tower.
        attention: The class of their attention, there too.
        layout: What they call their parts.
        blocks: The path of its blocks.
        stem: The path of its patch embedding, a convolution.
        prefix: Class and distillation tokens; registers are counted from the configuration.
        head: The name of its attention pooling, where it has one.
        rotary: Its blocks turn queries and keys by place.
        masks: The name of the argument that makes it leave patches out.
        maps: It makes feature maps of its hidden states.
    """

    block: str
    attention: str
    layout: Layout
    blocks: str
    stem: str
    prefix: int
    head: str | None = None
    rotary: bool = False
    masks: str | None = None
    maps: bool = False


@dataclass(frozen=True)
class Container:
    """What a model puts around a tower.

    Attributes:
        tower: The name of the tower in it.
        heads: Linear layers of the image side, for its MACs.
        averages: The head takes the mean of the tower's patch tokens.
    """

    tower: str
    heads: tuple[str, ...]
    averages: bool = False


def _named(architecture: str, *classes: str) -> list[str]:
    return [f"transformers.models.{architecture}.modeling_{architecture}.{c}" for c in classes]


_PROJECTION = "embeddings.patch_embeddings.projection"
_DINOV2 = Tower("Dinov2Layer", "Dinov2Attention", DINO, "encoder.layer", _PROJECTION, 1)
_DINOV2_REGISTERS = replace(
    _DINOV2, block="Dinov2WithRegistersLayer", attention="Dinov2WithRegistersAttention"
)
_DINOV3 = Tower(
    "DINOv3ViTLayer",
    "DINOv3ViTAttention",
    DINO,
    "model.layer",
    "embeddings.patch_embeddings",
    1,
    rotary=True,
)

TOWERS: dict[str, Tower] = {
    name: tower
    for names, tower in (
        (
            _named("vit", "ViTModel"),
            Tower("ViTLayer", "ViTAttention", VIT, "layers", _PROJECTION, 1),
        ),
        (
            _named("deit", "DeiTModel"),
            Tower("DeiTLayer", "DeiTAttention", VIT, "layers", _PROJECTION, 2),
        ),
        (
            _named("vit_mae", "ViTMAEModel"),
            Tower("ViTMAELayer", "ViTMAEAttention", VIT, "layers", _PROJECTION, 1, masks="noise"),
        ),
        (
            _named("videomae", "VideoMAEModel"),
            Tower(
                "VideoMAELayer",
                "VideoMAEAttention",
                VIDEO,
                "encoder.layer",
                _PROJECTION,
                0,
                masks="bool_masked_pos",
            ),
        ),
        (
            _named("audio_spectrogram_transformer", "ASTModel"),
            Tower("ASTLayer", "ASTAttention", VIT, "layers", _PROJECTION, 2),
        ),
        (_named("dinov2", "Dinov2Model"), _DINOV2),
        (_named("dinov2", "Dinov2Backbone"), replace(_DINOV2, maps=True)),
        (_named("dinov2_with_registers", "Dinov2WithRegistersModel"), _DINOV2_REGISTERS),
        (
            _named("dinov2_with_registers", "Dinov2WithRegistersBackbone"),
            replace(_DINOV2_REGISTERS, maps=True),
        ),
        (_named("dinov3_vit", "DINOv3ViTModel"), _DINOV3),
        (_named("dinov3_vit", "DINOv3ViTBackbone"), replace(_DINOV3, maps=True)),
        (
            _named("clip", "CLIPVisionModel"),
            Tower(
                "CLIPEncoderLayer",
                "CLIPAttention",
                CLIP,
                "encoder.layers",
                "embeddings.patch_embedding",
                1,
            ),
        ),
        (
            _named("siglip", "SiglipVisionModel"),
            Tower(
                "SiglipEncoderLayer",
                "SiglipAttention",
                CLIP,
                "encoder.layers",
                "embeddings.patch_embedding",
                0,
                head="head",
            ),
        ),
    )
    for name in names
}

_PROJECTED = Container("vision_model", ("visual_projection",))
CONTAINERS: dict[str, Container] = {
    name: container
    for names, container in (
        (_named("vit", "ViTForImageClassification"), Container("vit", ("classifier",))),
        (_named("deit", "DeiTForImageClassification"), Container("deit", ("classifier",))),
        (
            _named("deit", "DeiTForImageClassificationWithTeacher"),
            Container("deit", ("cls_classifier", "distillation_classifier")),
        ),
        (
            _named("audio_spectrogram_transformer", "ASTForAudioClassification"),
            Container("audio_spectrogram_transformer", ("classifier",)),
        ),
        (
            _named("videomae", "VideoMAEForVideoClassification"),
            Container("videomae", ("classifier",), averages=True),
        ),
        (
            _named("dinov2", "Dinov2ForImageClassification"),
            Container("dinov2", ("classifier",), averages=True),
        ),
        (
            _named("dinov2_with_registers", "Dinov2WithRegistersForImageClassification"),
            Container("dinov2_with_registers", ("classifier",), averages=True),
        ),
        (_named("clip", "CLIPModel", "CLIPVisionModelWithProjection"), _PROJECTED),
        (_named("siglip", "SiglipModel"), Container("vision_model", ())),
        (
            [
                *_named("depth_anything", "DepthAnythingForDepthEstimation"),
                *_named("prompt_depth_anything", "PromptDepthAnythingForDepthEstimation"),
            ],
            Container("backbone", ()),
        ),
        (
            [
                *_named("clip", "CLIPForImageClassification"),
                *_named("siglip", "SiglipForImageClassification"),
            ],
            Container("vision_model", ("classifier",), averages=True),
        ),
    )
    for name in names
}


_RECONSTRUCTS = "it reconstructs every patch, and merged patches have no tokens of their own"
_PADS = "it pads images of several sizes to one length (NaFlex)"
_DECODES = (
    "its decoder reconstructs every patch that its encoder left out, and merged patches have no "
    "tokens of their own"
)
_PAIRS = (
    "its attention adds a bias for every pair of places, which is gathered for merged tokens in "
    "timm's Beit alone"
)
REFUSED: dict[str, str] = {
    name: reason
    for names, reason in (
        (_named("vit", "ViTForMaskedImageModeling"), _RECONSTRUCTS),
        (_named("deit", "DeiTForMaskedImageModeling"), _RECONSTRUCTS),
        (_named("vit_mae", "ViTMAEForPreTraining"), _DECODES),
        (_named("videomae", "VideoMAEForPreTraining"), _DECODES),
        (
            _named(
                "siglip2", "Siglip2VisionModel", "Siglip2Model", "Siglip2ForImageClassification"
            ),
            _PADS,
        ),
        (_named("beit", "BeitModel", "BeitForImageClassification"), _PAIRS),
    )
    for name in names
}


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
    "clip": ("CLIPVisionModelWithProjection", "CLIPVisionConfig", {"projection_dim": 24}),
    "clip_classifier": ("CLIPForImageClassification", "CLIPConfig", {}),
    "siglip": ("SiglipVisionModel", "SiglipVisionConfig", {}),
    "siglip_classifier": ("SiglipForImageClassification", "SiglipConfig", {}),
    "videomae": (
        "VideoMAEForVideoClassification",
        "VideoMAEConfig",
        {"num_frames": 8, "patch_size": 32},
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
    if not config.startswith("Dinov2"):
        size["intermediate_size"] = 192
    if config in ("CLIPConfig", "SiglipConfig"):
        text = {"hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 3}
        options |= {
            "vision_config": size,
            "text_config": text | {"intermediate_size": 96, "vocab_size": 64},
        }
        options.setdefault("num_labels", 5)
        return getattr(transformers, config)(**options)
    return getattr(transformers, config)(**(size | {"num_labels": 5} | options))


def tiny_models() -> Mapping[str, Callable[[], nn.Module]]:
    """Builders of tiny random models, one for each kind."""

    def builder(cls: str, config: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            import transformers

            model: nn.Module = getattr(transformers, cls)(tiny_configuration(config, **options))
            return randomised(model).eval()

        return build

    return {name: builder(*kind) for name, kind in _TINY.items()}
