"""Models of transformers, from a folder, the cache or the hub."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from mergence.errors import CheckpointError, MissingExtraError, UnsupportedModelError
from mergence.models._loaded import Built, LoadedModel, source_of
from mergence.models._weights import first_line, read_weights, require_weights

if TYPE_CHECKING:
    from PIL.Image import Image

# What takes an image and nothing else, of what a checkpoint of image and text holds.
_TOWERS = {
    "CLIPModel": "CLIPVisionModelWithProjection",
    "MetaClip2Model": "MetaClip2VisionModelWithProjection",
    "ChineseCLIPModel": "ChineseCLIPVisionModel",
    "SiglipModel": "SiglipVisionModel",
}


def named(name: str, checkpoint: Path | None) -> Built:
    """`hf:NAME_OR_PATH`: the class that the checkpoint names, or the image tower of it.

    Raises:
        CheckpointError: There is no such checkpoint, or it lacks weights.
        UnsupportedModelError: It is no image model, or one for other than colour images.
        MissingExtraError: Pillow is not installed; transformers does not bring it.
    """
    if find_spec("PIL") is None:
        raise MissingExtraError("pillow", "transformers", f"Loading 'hf:{name}'")
    import transformers

    folder = Path(name).expanduser()
    place = str(folder) if folder.is_dir() else name
    if source_of(folder) == "local-dir":
        raise CheckpointError(f"'{folder}' holds a model of timm. Use 'local-dir:{name}'.")
    try:
        # False, because without it transformers asks at the terminal whether to run code.
        config: Any = transformers.AutoConfig.from_pretrained(place, trust_remote_code=False)
    except Exception as error:  # whatever transformers, the hub client and the network raise
        raise _unavailable(name, error) from error
    try:
        processor: Any = transformers.AutoImageProcessor.from_pretrained(
            place, trust_remote_code=False
        )
    except Exception as error:
        if not folder.is_dir():
            raise _unavailable(name, error) from error
        raise CheckpointError(
            f"'{folder}' has no image processor that transformers can load ({first_line(error)}). "
            "Put that of the original model there: "
            f"AutoImageProcessor.from_pretrained(ORIGINAL).save_pretrained('{folder}'). Code that "
            "comes with a model is never run."
        ) from error
    cls = _class(name, config)
    own: Any = cls.config_class.from_pretrained(place)
    if hasattr(config, "projection_dim"):  # of a tower: what the whole says, which its part may not
        own.projection_dim = config.projection_dim
    source: str | None = place
    options = {"config": own}
    if checkpoint is not None:
        # Through the library's own reader, because it saves under older names than it uses.
        source, options["state_dict"] = None, read_weights(checkpoint.expanduser(), f"hf:{name}")
    try:
        model, info = cls.from_pretrained(source, output_loading_info=True, **options)
    except Exception as error:
        raise _unavailable(name, error) from error
    require_weights(info, str(checkpoint or f"hf:{name}"), cls.__name__)
    # Those of BLIP do not say it.
    config = getattr(model.config, "backbone_config", None) or model.config
    channels = getattr(config, "num_channels", 3)
    if channels != 3:
        raise UnsupportedModelError(
            f"'hf:{name}' takes images of {channels} channels. Use one with 3 (RGB)."
        )
    return Built(model, None, partial(_describe, processor=processor))


def _class(name: str, config: Any) -> Any:
    import transformers

    from mergence.family import registry

    family = registry()["transformers"]
    saved = (getattr(config, "architectures", None) or ["?"])[0]
    covered = [
        f for f in registry().values() if any(m.rpartition(".")[2] == saved for m in f.models)
    ]
    if covered and family not in covered:
        raise UnsupportedModelError(
            f"'hf:{name}' was saved from the class {saved}, whose input is more than images of one "
            "size. Load it in Python and use mergence.apply."
        )
    if not covered:
        raise UnsupportedModelError(
            f"'hf:{name}' was saved from the class {saved}. Known: {family.supported}."
        )
    cls = getattr(transformers, _TOWERS.get(saved, saved))
    # transformers 4 does not say, and not all of 5 say of text.
    said = getattr(cls, "input_modalities", "image")
    takes = {said} if isinstance(said, str) else set(said)
    if signature(cls.forward).parameters.keys() & {"input_ids", "decoder_input_ids"}:
        takes.add("text")
    if takes != {"image"}:
        raise UnsupportedModelError(
            f"'hf:{name}' was saved from the class {saved}, which takes "
            f"{' and '.join(sorted(takes))}; what is loaded by name takes images alone. Load it in "
            "Python and use mergence.apply."
        )
    return cls


def _unavailable(name: str, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"The model 'hf:{name}' cannot be had: {first_line(error)} "
        "Pass a folder that save_pretrained wrote, model and image processor, or the name of a "
        "model in the hub or its cache. Code that comes with a model is never run."
    )


def _describe(model: Any, spec: str, *, processor: Any) -> LoadedModel:
    from PIL.Image import new

    config = model.config
    transform = partial(_pixels, processor=processor)
    try:
        channels, height, width = transform(new("RGB", (256, 256))).shape
    except Exception as error:  # as that of poses, which are looked for in boxes
        raise UnsupportedModelError(
            f"The image processor of '{spec}', a {type(processor).__name__}, makes no input of an "
            f"image alone: {first_line(error)} Load the model in Python and use mergence.apply."
        ) from error
    classifies = "ForImageClassification" in type(model).__name__
    names = [str(config.id2label[i]) for i in range(config.num_labels)] if classifies else []
    said = any(label != f"LABEL_{i}" for i, label in enumerate(names))
    normalised = getattr(processor, "do_normalize", False)
    return LoadedModel(
        model=model,
        name=spec,
        transform=transform,
        mode="RGB",
        label_names=tuple(names) if said else None,
        input_size=(channels, height, width),
        mean=tuple(processor.image_mean) if normalised else (0.0,) * 3,
        std=tuple(processor.image_std) if normalised else (1.0,) * 3,
        processor=processor,
    )


def _pixels(image: Image, *, processor: Any) -> Tensor:
    # Depth models would keep each image's proportions, and a batch is of one size.
    one_size = {"keep_aspect_ratio": False} if hasattr(processor, "keep_aspect_ratio") else {}
    pixels: Tensor = processor(images=image, return_tensors="pt", **one_size)["pixel_values"][0]
    return pixels
