"""timm's models that look like plain Vision Transformers, and why they are not covered.

Read from timm 1.0.31, which has neither LV-ViT nor T2T-ViT.
"""

from __future__ import annotations

_FOLDS = (
    "it folds its tokens back into the grid of patches, for the projector of a language model, and "
    "merged tokens no longer fill that"
)
_NORMS = "its blocks have norms behind attention and MLP as well, which no family restates"

_REASONS = {
    "cait.Cait": (
        "its heads mix their attention maps before and after the softmax, and its class token "
        "joins the patches only after the blocks that they pass through"
    ),
    "convit.ConVit": (
        "its attention is a mixture with a second softmax over the distances of all places"
    ),
    "crossvit.CrossVit": (
        "it runs two sequences of patches of different sizes, which exchange class tokens"
    ),
    "deepseek_vit.DeepseekVitEncoder": _FOLDS,
    "deepseek_vit.DeepseekVitClassifier": _FOLDS,
    "gemma4_vit.Gemma4VitEncoder": _NORMS,
    "gemma4_vit.Gemma4VitClassifier": _NORMS,
    "mlp_mixer.MlpMixer": "it mixes patches by layers that are as wide as there are patches",
    "qwen3_vit.Qwen3VitEncoder": _FOLDS,
    "qwen3_vit.Qwen3VitClassifier": _FOLDS,
    "tnt.TNT": "each of its blocks adds to every patch what a sequence of its pixels has become",
    "vision_transformer_relpos.VisionTransformerRelPos": (
        "its attention adds a bias for every pair of places, which is gathered for merged tokens "
        "in Beit alone"
    ),
    "vision_transformer_sam.VisionTransformerSAM": (
        "its blocks keep the grid of patches, attend within windows of it, and add biases by row "
        "and column"
    ),
    "volo.VOLO": "it attends within windows of a grid and makes the grid smaller on the way",
    "xcit.Xcit": (
        "its attention is between channels instead of tokens, and its blocks convolve the grid of "
        "patches"
    ),
}
REFUSED = {f"timm.models.{name}": reason for name, reason in _REASONS.items()}
