"""Speed of reduced models in OpenVINO on a CPU, beside the dense model there and in torch.

    python benchmarks/speed/in_openvino.py deit_small_patch16_224 --batch-sizes 1 8

Every model is converted once for all batch sizes, and all take turns. Prints, for each type, the
dense model's time in torch's eager mode and in OpenVINO, how many times faster than the latter the
reduced models are there, and in brackets that times the share of the MACs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from collections.abc import Callable
from typing import Any

import openvino
import timm
import torch
from torch import Tensor, nn

import mergence
from mergence.benchmark import DENSE, take_turns


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="the name of one of timm's")
    parser.add_argument("--methods", nargs="+", default=["mergence", "evit"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.67, 0.5])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--types", nargs="+", default=["f32", "bf16"])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each row")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    dense = timm.create_model(arguments.model).eval()
    models: dict[str, tuple[nn.Module, float]] = {DENSE: (dense, 1.0)}
    for budget in arguments.budgets:
        for method in arguments.methods:
            reduced = mergence.apply(copy.deepcopy(dense), method, macs=budget)
            models[f"{method} {budget:g}"] = reduced, mergence.describe(reduced).macs_ratio
    size = dense.pretrained_cfg["input_size"]
    graphs = {
        name: openvino.convert_model(model, example_input=torch.zeros(1, *size), input=[-1, *size])
        for name, (model, _) in models.items()
    }
    for kind in arguments.types:
        runs = {name: _compiled(graph, kind) for name, graph in graphs.items()}
        eager = copy.deepcopy(dense).to(torch.bfloat16 if kind == "bf16" else torch.float32)
        for batch in arguments.batch_sizes:
            images = torch.randn(batch, *size)
            times = take_turns(runs, images, arguments.seconds, arguments.rounds)
            # Not in turns with the others: its threads would still spin when OpenVINO's begin.
            alone = take_turns({DENSE: _in_torch(eager)}, images, 3.0, arguments.rounds)
            median = {name: statistics.median(taken) for name, taken in times.items()}
            in_torch = statistics.median(alone[DENSE])
            row = [f"{kind}, batch {batch}: dense {median[DENSE]:.1f} ms ({in_torch:.1f} in torch)"]
            for name, (_, share) in models.items():
                faster = median[DENSE] / median[name]
                if name != DENSE:
                    row.append(f"{name} {faster:.2f} ({faster * share:.2f})")
            print(", ".join(row), flush=True)


def _compiled(graph: Any, kind: str) -> Callable[[Tensor], Any]:
    threads = torch.get_num_threads()
    options = {"INFERENCE_PRECISION_HINT": kind, "INFERENCE_NUM_THREADS": threads}
    run = openvino.Core().compile_model(graph, "CPU", {**options, "PERFORMANCE_HINT": "LATENCY"})
    return lambda images: run(images.numpy())


def _in_torch(model: nn.Module) -> Callable[[Tensor], Any]:
    dtype = next(model.parameters()).dtype

    @torch.inference_mode()
    def run(images: Tensor) -> Any:
        return model(images.to(dtype))

    return run


if __name__ == "__main__":
    main()
