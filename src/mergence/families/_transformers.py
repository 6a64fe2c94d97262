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
        mlp: The MLP; in two parts the second adds what came before it.
        split: The attention is a module of queries, keys and values and one of what follows them.
        tuples: The block gives out a tuple.
    """

    attention: str
    norms: tuple[str, str]
    after: tuple[tuple[str, ...], tuple[str, ...]]
    mlp: tuple[str, ...] = ("mlp",)
    split: bool = False
    tuples: bool = False


VIT = Layout("attention", ("layernorm_before", "layernorm_after"), (("dropout",), ("dropout",)))
DINO = Layout(
    "attention", ("norm1", "norm2"), (("layer_scale1", "drop_path"), ("layer_scale2", "drop_path"))
)
CLIP = Layout("self_attn", ("layer_norm1", "layer_norm2"), ((), ()))
SPLIT_VIT = replace(VIT, after=((), ()), mlp=("intermediate", "output"), split=True)


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


def _name(architecture: str, cls: str) -> str:
    return f"transformers.models.{architecture}.modeling_{architecture}.{cls}"


def _named(architecture: str, *classes: str) -> list[str]:
    return [_name(architecture, cls) for cls in classes]


_PROJECTION = "embeddings.patch_embeddings.projection"


def _vit(names: str, prefix: int = 1, **more: Any) -> Tower:
    """A tower whose classes are named as ViT's: `names` is what they begin with."""
    block, attention = f"{names}Layer", f"{names}Attention"
    return Tower(block, attention, VIT, "layers", _PROJECTION, prefix, **more)


def _dino(names: str, **more: Any) -> Tower:
    """A tower as DINOv2's."""
    block, attention = f"{names}Layer", f"{names}Attention"
    return Tower(block, attention, DINO, "encoder.layer", _PROJECTION, 1, **more)


def _clip(block: str, attention: str, prefix: int = 1, **more: Any) -> Tower:
    """A tower as CLIP's."""
    stem = "embeddings.patch_embedding"
    return Tower(block, attention, CLIP, "encoder.layers", stem, prefix, **more)


_DINOV3 = Tower(
    "DINOv3ViTLayer",
    "DINOv3ViTAttention",
    DINO,
    "model.layer",
    "embeddings.patch_embeddings",
    1,
    rotary=True,
)
_VIDEOMAE = Tower(
    "VideoMAELayer",
    "VideoMAEAttention",
    SPLIT_VIT,
    "encoder.layer",
    _PROJECTION,
    0,
    masks="bool_masked_pos",
)
_CLIPS = (
    ("clip", "CLIP", _clip("CLIPEncoderLayer", "CLIPAttention")),
    ("metaclip_2", "MetaClip2", _clip("MetaClip2EncoderLayer", "MetaClip2Attention")),
    ("altclip", "AltCLIP", _clip("AltCLIPEncoderLayer", "AltCLIPAttention")),
    (
        "chinese_clip",
        "ChineseCLIP",
        _clip("ChineseCLIPVisionLayer", "ChineseCLIPVisionAttention"),
    ),
    ("siglip", "Siglip", _clip("SiglipEncoderLayer", "SiglipAttention", prefix=0, head="head")),
)
_REGISTERS = "dinov2_with_registers"

TOWERS: dict[str, Tower] = {
    _name("vit", "ViTModel"): _vit("ViT"),
    _name("deit", "DeiTModel"): _vit("DeiT", prefix=2),
    _name("vit_msn", "ViTMSNModel"): _vit("ViTMSN"),
    _name("ijepa", "IJepaModel"): _vit("IJepa", prefix=0),
    _name("vit_mae", "ViTMAEModel"): _vit("ViTMAE", masks="noise"),
    _name("videomae", "VideoMAEModel"): _VIDEOMAE,
    _name("audio_spectrogram_transformer", "ASTModel"): _vit("AST", prefix=2),
    _name("dinov2", "Dinov2Model"): _dino("Dinov2"),
    _name("dinov2", "Dinov2Backbone"): _dino("Dinov2", maps=True),
    _name(_REGISTERS, "Dinov2WithRegistersModel"): _dino("Dinov2WithRegisters"),
    _name(_REGISTERS, "Dinov2WithRegistersBackbone"): _dino("Dinov2WithRegisters", maps=True),
    _name("dinov3_vit", "DINOv3ViTModel"): _DINOV3,
    _name("dinov3_vit", "DINOv3ViTBackbone"): replace(_DINOV3, maps=True),
    **{
        # Before transformers 5.6 the model was a transformer in a module with no more in it.
        _name(architecture, f"{names}{cls}"): tower
        for architecture, names, tower in _CLIPS
        for cls in ("VisionModel", "VisionTransformer")
    },
}

_VISION = Container("vision_model", ())
_PROJECTED = Container("vision_model", ("visual_projection",))
_BACKBONE = Container("backbone", ())


def _classifier(tower: str, averages: bool = False) -> Container:
    return Container(tower, ("classifier",), averages)


_AVERAGED = _classifier("vision_model", averages=True)

CONTAINERS: dict[str, Container] = {
    name: container
    for names, container in (
        (_named("vit", "ViTForImageClassification"), _classifier("vit")),
        (_named("deit", "DeiTForImageClassification"), _classifier("deit")),
        (
            _named("deit", "DeiTForImageClassificationWithTeacher"),
            Container("deit", ("cls_classifier", "distillation_classifier")),
        ),
        (_named("vit_msn", "ViTMSNForImageClassification"), _classifier("vit")),
        (_named("ijepa", "IJepaForImageClassification"), _classifier("ijepa", averages=True)),
        (
            _named("audio_spectrogram_transformer", "ASTForAudioClassification"),
            _classifier("audio_spectrogram_transformer"),
        ),
        (
            _named("videomae", "VideoMAEForVideoClassification"),
            _classifier("videomae", averages=True),
        ),
        (_named("dinov2", "Dinov2ForImageClassification"), _classifier("dinov2", averages=True)),
        (
            _named(_REGISTERS, "Dinov2WithRegistersForImageClassification"),
            _classifier(_REGISTERS, averages=True),
        ),
        (_named("clip", "CLIPModel", "CLIPVisionModelWithProjection"), _PROJECTED),
        (_named("clip", "CLIPForImageClassification"), _AVERAGED),
        (_named("metaclip_2", "MetaClip2Model", "MetaClip2VisionModelWithProjection"), _PROJECTED),
        (_named("metaclip_2", "MetaClip2ForImageClassification"), _AVERAGED),
        (_named("altclip", "AltCLIPModel"), _PROJECTED),
        (_named("chinese_clip", "ChineseCLIPModel"), _PROJECTED),
        (_named("siglip", "SiglipModel"), _VISION),
        *(
            (_named(architecture, f"{names}VisionModel"), _VISION)
            for architecture, names, _ in _CLIPS
        ),
        (_named("siglip", "SiglipForImageClassification"), _AVERAGED),
        (_named("depth_anything", "DepthAnythingForDepthEstimation"), _BACKBONE),
        (_named("prompt_depth_anything", "PromptDepthAnythingForDepthEstimation"), _BACKBONE),
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


def tiny_models() -> Mapping[str, Callable[[], nn.Module]]:
    """Builders of tiny random models, one for each kind."""

    def builder(cls: str, config: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
        def build() -> nn.Module:
            import transformers

            model: nn.Module = getattr(transformers, cls)(tiny_configuration(config, **options))
            return randomised(model).eval()

        return build

    return {name: builder(*kind) for name, kind in _TINY.items()}
