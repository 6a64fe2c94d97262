"""Names in transformers: architectures, and where their parts are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from mergence.family import qualified_names
from mergence.state import Head


@dataclass(frozen=True)
class Layout:
    """What a block calls its parts.

    Attributes:
        attention: The attention.
        norms: The norms before attention and MLP.
        after: What both branches pass through before they are added: modules, and factors.
        mlp: The MLP; in two parts the second adds what came before it.
        split: The attention is a module of queries, keys and values and one of what follows them.
        tuples: The block gives out a tuple.
        experts: The block is told which expert of its MLP to use, if there are several.
    """

    attention: str
    norms: tuple[str, str]
    after: tuple[tuple[str, ...], tuple[str, ...]]
    mlp: tuple[str, ...] = ("mlp",)
    split: bool = False
    tuples: bool = False
    experts: bool = False


VIT = Layout("attention", ("layernorm_before", "layernorm_after"), (("dropout",), ("dropout",)))
DINO = Layout(
    "attention", ("norm1", "norm2"), (("layer_scale1", "drop_path"), ("layer_scale2", "drop_path"))
)
CLIP = Layout("self_attn", ("layer_norm1", "layer_norm2"), ((), ()))
AIM = Layout("attention", ("rms_norm1", "rms_norm2"), ((), ()), mlp=("ffn",))
INTERN = replace(VIT, after=(("lambda_1",), ("dropout", "lambda_2")))
SPLIT_VIT = replace(VIT, after=((), ()), mlp=("intermediate", "output"), split=True)
POSE = replace(SPLIT_VIT, mlp=("mlp",), experts=True)


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
        norm: The name of the norm that its last hidden state passed, where it is such.
        head: The name of its attention pooling, where it has one.
        rotary: Its blocks turn queries and keys by place.
        masks: The name of the argument that makes it leave patches out.
        maps: It makes feature maps of its hidden states.
        oldest: The first release of which it was tried, where that is not the family's.
    """

    block: str
    attention: str
    layout: Layout
    blocks: str
    stem: str
    prefix: int
    norm: str | None = None
    head: str | None = None
    rotary: bool = False
    masks: str | None = None
    maps: bool = False
    oldest: str = "4.57"


@dataclass(frozen=True)
class Container:
    """What a model puts around a tower.

    Attributes:
        towers: The paths of which one is that of the tower in it.
        heads: Linear layers of the image side, for its MACs.
        head: What a classifier outside of the tower makes of its tokens; see `Run.under`.
        full: The head, or a decoder of text, reads a token for every patch.
        oldest: As that of a `Tower`.
    """

    towers: tuple[str, ...]
    heads: tuple[str, ...] = ()
    head: Head | None = None
    full: bool = False
    oldest: str = "4.57"


def full_name(architecture: str, cls: str) -> str:
    """The qualified name of a class in the module of its architecture."""
    return f"transformers.models.{architecture}.modeling_{architecture}.{cls}"


def _named(architecture: str, *classes: str) -> list[str]:
    return [full_name(architecture, cls) for cls in classes]


_PROJECTION = "embeddings.patch_embeddings.projection"


def _vit(names: str, prefix: int = 1, **more: Any) -> Tower:
    """A tower whose classes are named as ViT's: `names` is what they begin with."""
    block, attention = f"{names}Layer", f"{names}Attention"
    return Tower(block, attention, VIT, "layers", _PROJECTION, prefix, "layernorm", **more)


def _dino(names: str, **more: Any) -> Tower:
    """A tower as DINOv2's."""
    block, attention = f"{names}Layer", f"{names}Attention"
    return Tower(block, attention, DINO, "encoder.layer", _PROJECTION, 1, "layernorm", **more)


def _clip(names: str, layer: str = "EncoderLayer", prefix: int = 1, **more: Any) -> Tower:
    """A tower as CLIP's."""
    block, attention, stem = f"{names}{layer}", f"{names}Attention", "embeddings.patch_embedding"
    return Tower(block, attention, CLIP, "encoder.layers", stem, prefix, **more)


_DINOV3 = Tower(
    "DINOv3ViTLayer",
    "DINOv3ViTAttention",
    DINO,
    "model.layer",
    "embeddings.patch_embeddings",
    1,
    "norm",
    rotary=True,
)
_VIDEOMAE = Tower(
    "VideoMAELayer",
    "VideoMAEAttention",
    SPLIT_VIT,
    "encoder.layer",
    _PROJECTION,
    0,
    "layernorm",
    masks="bool_masked_pos",
)
_VITPOSE = Tower(
    "VitPoseBackboneLayer",
    "VitPoseBackboneAttention",
    POSE,
    "encoder.layer",
    _PROJECTION,
    0,
    maps=True,
    oldest="5.6",
)
_DPT = Tower(
    "DPTViTLayer",
    "DPTViTAttention",
    SPLIT_VIT,
    "encoder.layer",
    _PROJECTION,
    1,
    "layernorm",
    oldest="5.6",
)
_AIM = replace(
    _clip("Aimv2", prefix=0, norm="rms_norm", head="head", oldest="5.6"),
    layout=AIM,
    stem="embeddings.patch_embed",
)
_INTERN = replace(_vit("InternVLVision", oldest="5.6"), layout=INTERN, blocks="encoder.layer")
_CLIPS = (
    ("clip", "CLIP", _clip("CLIP")),
    ("metaclip_2", "MetaClip2", _clip("MetaClip2")),
    ("altclip", "AltCLIP", _clip("AltCLIP")),
    ("chinese_clip", "ChineseCLIP", _clip("ChineseCLIPVision", "Layer")),
    ("siglip", "Siglip", _clip("Siglip", prefix=0, norm="post_layernorm", head="head")),
    ("clipseg", "CLIPSeg", _clip("CLIPSeg", oldest="5.6")),
    ("owlvit", "OwlViT", _clip("OwlViT", oldest="5.6")),
    ("owlv2", "Owlv2", _clip("Owlv2", oldest="5.6")),
)
_PADDED = (("idefics2", "Idefics2"), ("idefics3", "Idefics3"), ("smolvlm", "SmolVLM"))
"""Towers as SigLIP's, in models that may pad an image; then there is a mask, which is refused."""
_LANGUAGE = (
    ("llava", "Llava"),
    ("vipllava", "VipLlava"),
    ("llava_next", "LlavaNext"),
    ("llava_next_video", "LlavaNextVideo"),
    ("llava_onevision", "LlavaOnevision"),
    ("paligemma", "PaliGemma"),
    ("gemma3", "Gemma3"),
    ("aya_vision", "AyaVision"),
    ("cohere2_vision", "Cohere2Vision"),
    ("internvl", "InternVL"),
    ("deepseek_vl", "DeepseekVL"),
    *_PADDED,
)
"""Models of image and language whose language model reads every patch."""
_REGISTERS = "dinov2_with_registers"

TOWERS: dict[str, Tower] = {
    full_name("vit", "ViTModel"): _vit("ViT"),
    full_name("deit", "DeiTModel"): _vit("DeiT", prefix=2),
    full_name("vit_msn", "ViTMSNModel"): _vit("ViTMSN"),
    full_name("ijepa", "IJepaModel"): _vit("IJepa", prefix=0),
    full_name("vit_mae", "ViTMAEModel"): _vit("ViTMAE", masks="noise"),
    full_name("videomae", "VideoMAEModel"): _VIDEOMAE,
    full_name("vivit", "VivitModel"): _vit("Vivit", oldest="5.6"),
    full_name("tipsv2", "Tipsv2VisionModel"): _dino("Tipsv2Vision"),
    full_name("tipsv2", "Tipsv2VisionBackbone"): _dino("Tipsv2Vision", maps=True),
    full_name("audio_spectrogram_transformer", "ASTModel"): _vit("AST", prefix=2),
    full_name("dinov2", "Dinov2Model"): _dino("Dinov2"),
    full_name("dinov2", "Dinov2Backbone"): _dino("Dinov2", maps=True),
    full_name(_REGISTERS, "Dinov2WithRegistersModel"): _dino("Dinov2WithRegisters"),
    full_name(_REGISTERS, "Dinov2WithRegistersBackbone"): _dino("Dinov2WithRegisters", maps=True),
    full_name("dinov3_vit", "DINOv3ViTModel"): _DINOV3,
    full_name("dinov3_vit", "DINOv3ViTBackbone"): replace(_DINOV3, maps=True),
    full_name("vitpose_backbone", "VitPoseBackbone"): _VITPOSE,
    full_name("dpt", "DPTModel"): _DPT,
    full_name("aimv2", "Aimv2VisionModel"): _AIM,
    full_name("internvl", "InternVLVisionModel"): _INTERN,
    **{
        full_name(architecture, f"{names}VisionModel"): _clip(
            names, norm="post_layernorm", oldest="5.6"
        )
        for architecture, names in (
            ("blip", "Blip"),
            ("blip_2", "Blip2"),
            ("instructblip", "InstructBlip"),
        )
    },
    **{
        full_name(architecture, f"{names}VisionTransformer"): replace(
            _clip(names, prefix=0, norm="post_layernorm", oldest="5.6"),
            attention=f"{names}VisionAttention",
        )
        for architecture, names in _PADDED
    },
    **{
        # Before transformers 5.6 the model was a transformer in a module with no more in it.
        full_name(architecture, f"{names}{cls}"): tower
        for architecture, names, tower in _CLIPS
        for cls in ("VisionModel", "VisionTransformer")
    },
}

_VISION = Container(("vision_model",))
_PROJECTED = Container(("vision_model",), ("visual_projection",))
_BACKBONE = Container(("backbone",))


def _classifier(tower: str, head: Head = "prefix") -> Container:
    return Container((tower,), ("classifier",), head)


def _read(
    architecture: str, *classes: str, by: tuple[str, ...] = ("vision_model",), **more: Any
) -> tuple[list[str], Container]:
    """Classes that read a token for every patch, of a tower at one of these paths."""
    return _named(architecture, *classes), Container(by, full=True, **more)


_AVERAGED = _classifier("vision_model", head="mean")

CONTAINERS: dict[str, Container] = {
    name: container
    for names, container in (
        (_named("vit", "ViTForImageClassification"), _classifier("vit")),
        (_named("deit", "DeiTForImageClassification"), _classifier("deit")),
        (
            _named("deit", "DeiTForImageClassificationWithTeacher"),
            Container(("deit",), ("cls_classifier", "distillation_classifier"), "prefix"),
        ),
        (_named("vit_msn", "ViTMSNForImageClassification"), _classifier("vit")),
        (_named("ijepa", "IJepaForImageClassification"), _classifier("ijepa", head="mean")),
        (
            _named("audio_spectrogram_transformer", "ASTForAudioClassification"),
            _classifier("audio_spectrogram_transformer"),
        ),
        (
            _named("videomae", "VideoMAEForVideoClassification"),
            _classifier("videomae", head="mean"),
        ),
        (_named("vivit", "VivitForVideoClassification"), _classifier("vivit")),
        (_named("dinov2", "Dinov2ForImageClassification"), _classifier("dinov2", head="mean")),
        (
            _named(_REGISTERS, "Dinov2WithRegistersForImageClassification"),
            _classifier(_REGISTERS, head="mean"),
        ),
        (_named("clip", "CLIPModel", "CLIPVisionModelWithProjection"), _PROJECTED),
        (_named("clip", "CLIPForImageClassification"), _AVERAGED),
        (_named("metaclip_2", "MetaClip2Model", "MetaClip2VisionModelWithProjection"), _PROJECTED),
        (_named("metaclip_2", "MetaClip2ForImageClassification"), _AVERAGED),
        (_named("altclip", "AltCLIPModel"), _PROJECTED),
        (_named("chinese_clip", "ChineseCLIPModel"), _PROJECTED),
        (_named("clipseg", "CLIPSegModel"), _PROJECTED),
        (_named("owlvit", "OwlViTModel"), _PROJECTED),
        (_named("owlv2", "Owlv2Model"), _PROJECTED),
        (_named("aimv2", "Aimv2Model"), _PROJECTED),
        (_named("siglip", "SiglipModel"), _VISION),
        (_named("tipsv2", "Tipsv2Model"), _VISION),
        *(
            (_named(architecture, f"{names}VisionModel"), _VISION)
            for architecture, names, _ in _CLIPS
        ),
        (_named("siglip", "SiglipForImageClassification"), _AVERAGED),
        (_named("depth_anything", "DepthAnythingForDepthEstimation"), _BACKBONE),
        (_named("prompt_depth_anything", "PromptDepthAnythingForDepthEstimation"), _BACKBONE),
        (_named("vitpose", "VitPoseForPoseEstimation"), _BACKBONE),
        _read("dpt", "DPTForDepthEstimation", "DPTForSemanticSegmentation", by=("dpt", "backbone")),
        _read("clipseg", "CLIPSegForImageSegmentation", by=("clip.vision_model",)),
        _read("owlvit", "OwlViTForObjectDetection", by=("owlvit.vision_model",)),
        _read("owlv2", "Owlv2ForObjectDetection", by=("owlv2.vision_model",)),
        _read(
            "blip",
            "BlipForConditionalGeneration",
            "BlipForQuestionAnswering",
            "BlipForImageTextRetrieval",
        ),
        _read(
            "blip_2",
            "Blip2Model",
            "Blip2VisionModelWithProjection",
            "Blip2ForConditionalGeneration",
            "Blip2ForImageTextRetrieval",
        ),
        _read("instructblip", "InstructBlipModel", "InstructBlipForConditionalGeneration"),
        *(
            _read(
                architecture,
                f"{names}Model",
                f"{names}ForConditionalGeneration",
                by=("vision_tower", "model.vision_tower", "vision_model", "model.vision_model"),
                oldest="5.6",
            )
            for architecture, names in _LANGUAGE
        ),
        _read("colpali", "ColPaliForRetrieval", by=("vlm.vision_tower",), oldest="5.6"),
        _read(
            "pi0",
            "PI0Model",
            "PI0ForConditionalGeneration",
            by=("vlm.vision_tower", "model.vlm.vision_tower"),
        ),
        _read("vision_encoder_decoder", "VisionEncoderDecoderModel", by=("encoder",)),
    )
    for name in names
}


EntryT = TypeVar("EntryT")


def entry(table: Mapping[str, EntryT], model: nn.Module) -> EntryT | None:
    """What a table says of a model's class, None where it says nothing."""
    return next((table[name] for name in qualified_names(type(model)) if name in table), None)


_RECONSTRUCTS = "it reconstructs every patch, and merged patches have no tokens of their own"
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
        (_named("beit", "BeitModel", "BeitForImageClassification"), _PAIRS),
    )
    for name in names
}
