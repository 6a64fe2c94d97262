"""Patches that are alike can merge at no loss at all: the reduced model must equal the dense.

This goes through everything at once: the merge, the sizes, size attention and pooling by size.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import nn

import mergence
from mergence import family
from mergence.outputs import answer

# Equal patches are told apart by rotation, by a bias for pairs of places or by what pads the image;
# a video has two frames.
APART = (
    "timm_eva",
    "timm_beit",
    "timm_naflex-rope",
    "transformers-aimv2_native",
    "transformers-dinov3",
    "transformers-videomae",
    "transformers-vitpose_backbone",
    "transformers-vivit",
    "transformers_vjepa2",
)
ONE_KERNEL = ("open_clip", "torchvision")
FAST = {f"{f.name}-{kind}" for f in family.registry().values() for kind in [*f.tiny()][:1]}
CASES = [
    pytest.param(kind, kernel, marks=[] if kind in FAST else pytest.mark.slow)
    for kind in (f"{f.name}-{kind}" for f in family.registry().values() for kind in f.tiny())
    for kernel in (("sdpa",) if kind.startswith(ONE_KERNEL) else ("sdpa", "eager"))
    if not kind.startswith(APART)
]


@torch.no_grad()
@pytest.mark.parametrize(("kind", "kernel"), CASES)
def test_merging_equal_patches_changes_nothing(
    kind: str, kernel: str, fresh: Any, attend: Any
) -> None:
    model: nn.Module = fresh(kind).double()
    attend(model, kernel)
    for name, parameter in model.named_parameters():
        if re.search("pos(ition(al)?)?_embed|place", name):
            nn.init.zeros_(parameter)
    alike = torch.randn(2, 3, 16, 16, dtype=torch.float64).repeat(1, 1, 6, 6)
    # One patch is another, and stays by itself: only with its share do means stay the same.
    odd = alike.clone()
    odd[:, :, :16, :16] = torch.randn(2, 3, 16, 16)
    prefix = family.find(model).inspect(model).cost.prefix
    for image, methods in ((alike, ("mergence", "mstm", "tome", "evit")), (odd, ("mergence",))):
        expected = answer(model(image))
        for method in methods:
            mergence.apply(model, method, keep_rate=0.6, size_attention=True)
            # Sizes and weights are float32.
            torch.testing.assert_close(answer(model(image)), expected, rtol=1e-5, atol=1e-5)
            mergence.apply(model, method, keep_rate=0.6, size_attention=False)
            # Or there would be nothing to see: a merged token now draws too little attention.
            if prefix or image is odd:
                found = answer(model(image))
                assert not torch.allclose(found, expected, rtol=1e-3, atol=1e-4), method
        mergence.remove(model)
