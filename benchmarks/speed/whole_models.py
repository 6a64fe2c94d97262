"""Whole models of transformers, and the towers in them alone, dense and reduced, in turns.

    python benchmarks/speed/whole_models.py --threads 2
    python benchmarks/speed/whole_models.py owlv2 blip --dtype bfloat16

Models have the sizes of a known checkpoint and random weights. The share of the MACs is that of the
tower; what reads its tokens comes on top, dense and reduced.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor

import mergence
from mergence.benchmark import take_turns

TOKENS = 20
"""Words that a model writes, each the likeliest."""


@dataclass(frozen=True)
class Whole:
    """A model around a tower.

    Attributes:
        like: The checkpoint that it is as large as.
        build: Makes it, with random weights.
        tower: The path of its tower, "" where that is the model itself.
        size: Height and width of its images.
        call: What is timed.
        alone: What is timed of the tower.
    """

    like: str
    build: Callable[[], Any]
    tower: str
    size: tuple[int, int]
    call: Callable[[Any, Tensor], Any] = lambda model, images: model(images)
    alone: Callable[[Any, Tensor], Any] = lambda tower, images: tower(images)


def depth_anything() -> Any:
    """Depth on DINOv2."""
    backbone = {
        "model_type": "dinov2",
        "hidden_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 6,
        "image_size": 518,
        "patch_size": 14,
        "out_indices": [3, 6, 9, 12],
        "reshape_hidden_states": False,
        "apply_layernorm": True,
    }
    config = transformers.DepthAnythingConfig(backbone_config=backbone)
    return transformers.DepthAnythingForDepthEstimation(config)


def owlv2() -> Any:
    """Detection by words."""
    config = transformers.Owlv2Config(vision_config={"image_size": 960, "patch_size": 16})
    return transformers.Owlv2ForObjectDetection(config)


def blip() -> Any:
    """Captions."""
    return transformers.BlipForConditionalGeneration(transformers.BlipConfig())


def vitpose() -> Any:
    """Poses, in crops of one person."""
    backbone = transformers.VitPoseBackboneConfig(out_indices=[12])
    config = transformers.VitPoseConfig(backbone_config=backbone, num_labels=17)
    return transformers.VitPoseForPoseEstimation(config)


def trocr() -> Any:
    """Lines of text."""
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        transformers.ViTConfig(image_size=384), transformers.TrOCRConfig()
    )
    return transformers.VisionEncoderDecoderModel(config)


def sizes(width: int, hidden: int, depth: int, heads: int, **more: Any) -> dict[str, Any]:
    """A transformer's, as configurations call them."""
    return {
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
        **more,
    }


def internvl() -> Any:
    """Answers about an image of one tile."""
    text = {"model_type": "qwen2", "num_key_value_heads": 2, "vocab_size": 151674}
    config = transformers.InternVLConfig(text_config=sizes(896, 4864, 24, 14, **text))
    return transformers.InternVLForConditionalGeneration(config)


def smolvlm() -> Any:
    """Answers about an image in tiles."""
    text = {"model_type": "llama", "num_key_value_heads": 5, "vocab_size": 49280}
    config = transformers.SmolVLMConfig(
        vision_config=sizes(768, 3072, 12, 12, image_size=512, patch_size=16),
        text_config=sizes(960, 2560, 32, 15, **text),
        scale_factor=4,
        image_token_id=49190,
    )
    return transformers.SmolVLMForConditionalGeneration(config)


def gemma3() -> Any:
    """Answers about an image."""
    vision = {"image_size": 896, "patch_size": 14, "vision_use_head": False}
    config = transformers.Gemma3Config(
        vision_config=sizes(1152, 4304, 27, 16, **vision),
        text_config=sizes(2560, 10240, 34, 8, num_key_value_heads=4),
    )
    return transformers.Gemma3ForConditionalGeneration(config)


def places(*sections: int) -> dict[str, Any]:
    """The rotary positions of Qwen's language models, in sections of time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}
    return {"rope_parameters": rope, "vocab_size": 151936}


def qwen3_vl() -> Any:
    """Answers about an image of any size."""
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "num_heads": 16}
    vision |= {"out_hidden_size": 2048, "deepstack_visual_indexes": [5, 11, 17]}
    text = {"num_key_value_heads": 8, "head_dim": 128} | places(24, 20, 20)
    config = transformers.Qwen3VLConfig(
        vision_config=vision, text_config=sizes(2048, 6144, 28, 16, **text)
    )
    return transformers.Qwen3VLForConditionalGeneration(config)


def qwen25_vl() -> Any:
    """The same, by a tower that attends within windows."""
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    vision |= {"out_hidden_size": 2048, "fullatt_block_indexes": [7, 15, 23, 31]}
    text = {"num_key_value_heads": 2} | places(16, 24, 24)
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision, text_config=sizes(2048, 11008, 36, 16, **text)
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def qwen2_vl() -> Any:
    """The same, without windows."""
    text = {"num_key_value_heads": 2} | places(16, 24, 24)
    config = transformers.Qwen2VLConfig(
        vision_config={"hidden_size": 1536}, text_config=sizes(1536, 8960, 28, 12, **text)
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


def lighton_ocr() -> Any:
    """Text in an image of any size, by the tower of Mistral's models."""
    return transformers.LightOnOcrForConditionalGeneration(transformers.LightOnOcrConfig())


def vjepa2() -> Any:
    """What happens in a video."""
    config = transformers.VJEPA2Config(frames_per_clip=16, num_labels=174)
    return transformers.VJEPA2ForVideoClassification(config)


def detected(model: Any, images: Tensor) -> Any:
    """Boxes for two phrases."""
    words = torch.ones(2 * len(images), 16, dtype=torch.long, device=images.device)
    return model(words, images)


def prompts(model: Any, images: Tensor, tokens: int) -> Tensor:
    """So many tokens of each image, and 16 words."""
    prompt = [model.config.image_token_id] * tokens + [9] * 16
    return torch.tensor([prompt] * len(images), device=images.device)


def begun(model: Any, images: Tensor, tokens: int = 256) -> Any:
    """The first word of an answer to 16 words and so many tokens of each image."""
    words = prompts(model, images, tokens)
    return model(input_ids=words, pixel_values=images, logits_to_keep=1)


def begun_in_tiles(model: Any, images: Tensor) -> Any:
    """The same of images of 17 tiles, of which each has 64 tokens."""
    return begun(model, images.unsqueeze(1).repeat(1, 17, 1, 1, 1), 17 * 64)


def begun_in_patches(model: Any, images: Tensor) -> Any:
    """The first word of an answer to 16 words and an image, which has a token for 2 x 2 patches."""
    side = 2 * model.config.vision_config.patch_size
    rows, columns = (length // side for length in images.shape[-2:])
    sizes = torch.tensor([images.shape[-2:]] * len(images), device=images.device)
    words = prompts(model, images, rows * columns)
    return model(input_ids=words, pixel_values=images, image_sizes=sizes, logits_to_keep=1)


def filmed(model: Any, images: Tensor) -> Any:
    """The scores of videos of 16 such frames."""
    return model(images.unsqueeze(1).repeat(1, 16, 1, 1, 1))


def packed(config: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """As many patches as images have, which is all that matters here, and their grids."""
    rows, columns = (side // config.patch_size for side in images.shape[-2:])
    grid = torch.tensor([[1, rows, columns]] * len(images), device=images.device)
    numbers = images.repeat(1, config.temporal_patch_size, 1, 1)
    return numbers.reshape(len(images) * rows * columns, -1), grid


def seen_packed(tower: Any, images: Tensor) -> Any:
    """What a tower of packed patches makes of them."""
    return tower(*packed(tower.config, images))


def begun_packed(model: Any, images: Tensor) -> Any:
    """The first word of an answer to 16 words and an image, which has a token for 2 x 2 patches."""
    patches, grid = packed(model.config.vision_config, images)
    tokens = int(grid[0].prod()) // model.config.vision_config.spatial_merge_size**2
    words = prompts(model, images, tokens)
    kinds = (words == model.config.image_token_id).int()
    return model(
        input_ids=words,
        pixel_values=patches,
        image_grid_thw=grid,
        mm_token_type_ids=kinds,
        logits_to_keep=1,
    )


def written(model: Any, images: Tensor) -> Any:
    """`TOKENS` words."""
    length = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
    start = {"decoder_start_token_id": 2} if hasattr(model, "encoder") else {}
    return model.generate(pixel_values=images, do_sample=False, **length, **start)


MODELS = {
    "depth-anything": Whole("Depth-Anything-V2-Small", depth_anything, "backbone", (518, 518)),
    "owlv2": Whole("owlv2-base-patch16", owlv2, "owlv2.vision_model", (960, 960), detected),
    "blip": Whole("blip-image-captioning-base", blip, "vision_model", (384, 384), written),
    "vitpose": Whole("vitpose-base", vitpose, "backbone", (256, 192)),
    "trocr": Whole("trocr-base", trocr, "encoder", (384, 384), written),
    "internvl": Whole("InternVL3-1B", internvl, "model.vision_tower", (448, 448), begun),
    "smolvlm": Whole(
        "SmolVLM-500M-Instruct", smolvlm, "model.vision_model", (512, 512), begun_in_tiles
    ),
    "gemma3": Whole("gemma-3-4b-it", gemma3, "model.vision_tower", (896, 896), begun),
    "qwen3-vl": Whole(
        "Qwen3-VL-2B-Instruct", qwen3_vl, "model.visual", (1024, 1024), begun_packed, seen_packed
    ),
    "qwen2.5-vl": Whole(
        "Qwen2.5-VL-3B-Instruct", qwen25_vl, "model.visual", (896, 896), begun_packed, seen_packed
    ),
    "qwen2-vl": Whole(
        "Qwen2-VL-2B-Instruct", qwen2_vl, "model.visual", (896, 896), begun_packed, seen_packed
    ),
    "lighton-ocr": Whole(
        "LightOnOCR-1B-1025", lighton_ocr, "model.vision_encoder", (560, 560), begun_in_patches
    ),
    "vjepa2": Whole("vjepa2-vitl-fpc16-256-ssv2", vjepa2, "", (256, 256), filmed, filmed),
}


def measure(whole: Whole, arguments: argparse.Namespace) -> None:
    """Time one of them and print."""
    torch.manual_seed(0)
    device, dtype = arguments.device, getattr(torch, arguments.dtype)
    torch.set_default_dtype(dtype)  # a language model may be larger than the memory in float32
    dense = whole.build().eval().to(device)
    torch.set_default_dtype(torch.float32)
    images = torch.randn(arguments.batch_size, 3, *whole.size, device=device, dtype=dtype)
    models = {"dense": dense}
    for share in arguments.macs:
        weights = {id(weight): weight for weight in (*dense.parameters(), *dense.buffers())}
        models[f"{share:g}"] = mergence.apply(deepcopy(dense, weights), macs=share)
    towers = {
        name: partial(whole.alone, model.get_submodule(whole.tower))
        for name, model in models.items()
    }
    for part, calls in (
        ("whole", {name: partial(whole.call, model) for name, model in models.items()}),
        *([("tower", towers)] if whole.tower else []),
    ):
        with torch.inference_mode():
            times = take_turns(calls, images, arguments.seconds, rounds=5)
        middle = {name: statistics.median(found) for name, found in times.items()}
        for name, ms in middle.items():
            faster = middle["dense"] / ms
            print(f"{whole.like:26} {part} {name:6} {ms:8.1f} ms   {faster:5.2f} times as fast")


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", choices=[[], *MODELS], default=[])
    parser.add_argument("--macs", type=float, nargs="*", default=[0.67, 0.5])
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=20.0)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    for name in arguments.models or MODELS:
        measure(MODELS[name], arguments)


if __name__ == "__main__":
    main()
