"""What a model answers, whatever its library wraps it in."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def answer(output: Any) -> Tensor:
    """Logits or image embedding of a model's output.

    timm, torchvision and open_clip return a tensor. transformers returns an output object, whose
    first entry are the logits or the projected embedding where there are any, and the tokens where
    not; these come with what was pooled from them. A backbone's answer is the last of its maps.
    """
    if isinstance(output, Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    found: Any = output[0] if pooled is None else pooled
    last: Tensor = found[-1] if isinstance(found, tuple) else found
    return last
