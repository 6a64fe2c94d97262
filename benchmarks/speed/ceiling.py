"""What a device allows: tokens that vanish at no cost, beside reductions to the same counts.

    python benchmarks/speed/ceiling.py deit_small_patch16_224 --batch-sizes 1 8 --budgets 0.67 0.5

The free model cuts its tokens off by a slice between attention and MLP, where a reduction merges
them: no importance, no plan, no merge, no mask. How far it stays below its share of the MACs is
what smaller matrices cost on this device; no reduction with the same attention can be faster.
Prints, for both, the speed-up against the dense model times the share of the MACs. And the time of
images of one patch, which is about what no token has to do with: reading the weights, and beginning
every operator.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Sequence
from types import MethodType
from typing import Any

import timm
import torch
from torch import Tensor, nn

import mergence
from mergence.benchmark import MODES, call_in, take_turns
from mergence.families._coarse import as_product
from mergence.macs import count
from mergence.program import program_of


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a model of timm's VisionTransformer")
    parser.add_argument("--methods", nargs="+", default=["mergence", "evit"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.67, 0.5])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each batch size")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--mode", choices=MODES, default="eager")
    arguments = parser.parse_args()
    place = {"device": arguments.device, "dtype": getattr(torch, arguments.dtype)}
    dense = timm.create_model(arguments.model).eval().to(**place)
    models: dict[str, tuple[nn.Module, float]] = {"dense": (dense, 1.0)}
    for budget in arguments.budgets:
        for method in arguments.methods:
            reduced = mergence.apply(copy.deepcopy(dense), method, macs=budget)
            program = program_of(reduced)
            models[f"{method}@{budget:g}"] = reduced, mergence.describe(reduced).macs_ratio
            macs = count(program.cost, program.patches, program.tokens()).total
            free = _free(copy.deepcopy(dense), program.tokens())
            models[f"{method}@{budget:g}, free"] = free, macs / program.macs(dense=True).total
    side = dense.patch_embed.patch_size[0]
    one = timm.create_model(arguments.model, img_size=side).eval().to(**place)
    for batch in arguments.batch_sizes:
        images = torch.randn(batch, *dense.pretrained_cfg["input_size"], **place)
        calls = {name: call_in(model, arguments.mode) for name, (model, _) in models.items()}
        alone = call_in(one, arguments.mode)
        calls["one patch"] = lambda images, alone=alone: alone(images[..., :side, :side])
        with torch.inference_mode():
            times = take_turns(calls, images, arguments.seconds, arguments.rounds)
        median = {name: statistics.median(taken) for name, taken in times.items()}
        for name, (_, share) in models.items():
            ideal = median["dense"] / median[name] * share
            print(f"batch {batch:3d}  {name:22s} {median[name]:9.2f} ms  {ideal:.3f}")
        print(f"batch {batch:3d}  {'one patch':22s} {median['one patch']:9.2f} ms")


def _free(model: Any, tokens: Sequence[int]) -> nn.Module:
    """Cut tokens off: those that enter the first block, and those left after each."""
    prefix = model.num_prefix_tokens
    if model.patch_embed.proj.weight.dtype != torch.float32:
        model.patch_embed.proj._conv_forward = as_product  # as reduced models do
    model.norm_pre.register_forward_hook(lambda _, __, x: x[:, : prefix + tokens[0]])
    for block, left in zip(model.blocks, tokens[1:], strict=True):

        def forward(self: Any, x: Tensor, *_: Any, left: int = left, **__: Any) -> Tensor:
            x = x + self.ls1(self.attn(self.norm1(x)))
            x = x[:, : prefix + left]
            y: Tensor = x + self.ls2(self.mlp(self.norm2(x)))
            return y

        block.forward = MethodType(forward, block)
    return model


if __name__ == "__main__":
    main()
