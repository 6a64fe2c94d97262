"""Speed of reduced models in other runtimes on a CPU, beside the dense model there and in torch.

    python benchmarks/speed/in_runtimes.py onnxruntime deit_small_patch16_224 --types f32 int8
    python benchmarks/speed/in_runtimes.py openvino deit_small_patch16_224 --types f32 bf16
    python benchmarks/speed/in_runtimes.py executorch deit_small_patch16_224

All models take turns. Prints, for each type and batch size, the dense model's time in torch's eager
mode and in the runtime, how many times faster than the latter the reduced models are there, and in
brackets that times the share of the MACs.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

import mergence
from mergence.benchmark import DENSE, take_turns
from mergence.exporting.formats import FORMATS

TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}
"""And what torch runs beside them."""
Run = Callable[[Tensor], Any]


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runtime", choices=RUNTIMES)
    parser.add_argument("model", help="the name of one of timm's")
    parser.add_argument("--methods", nargs="+", default=["mergence", "evit"])
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.67, 0.5])
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--types", nargs="+", choices=TYPES, default=["f32"])
    parser.add_argument("--seconds", type=float, default=20.0, help="for each row")
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    dense = timm.create_model(arguments.model).eval()
    models: dict[str, tuple[nn.Module, float]] = {DENSE: (dense, 1.0)}
    for budget in arguments.budgets:
        for method in arguments.methods:
            reduced = mergence.apply(copy.deepcopy(dense), method, macs=budget)
            models[f"{method} {budget:g}"] = reduced, mergence.describe(reduced).macs_ratio
    converted = RUNTIMES[arguments.runtime]
    for kind in arguments.types:
        eager = copy.deepcopy(dense).to(TYPES[kind])
        for batch in arguments.batch_sizes:
            images = torch.randn(batch, *dense.pretrained_cfg["input_size"])
            runs = {name: converted(model, images, kind) for name, (model, _) in models.items()}
            times = take_turns(runs, images, arguments.seconds, arguments.rounds)
            # Not in turns with the others: its threads would still spin when the others' begin.
            alone = take_turns({DENSE: _in_torch(eager)}, images, 3.0, arguments.rounds)
            median = {name: statistics.median(taken) for name, taken in times.items()}
            in_torch = statistics.median(alone[DENSE])
            row = [f"{kind}, batch {batch}: dense {median[DENSE]:.1f} ms ({in_torch:.1f} in torch)"]
            for name, (_, share) in models.items():
                faster = median[DENSE] / median[name]
                if name != DENSE:
                    row.append(f"{name} {faster:.2f} ({faster * share:.2f})")
            print(", ".join(row), flush=True)


def _in_onnxruntime(model: nn.Module, images: Tensor, kind: str) -> Run:
    from onnxruntime.quantization import quantize_dynamic

    _only(kind, "f32", "int8")
    form = FORMATS["onnx"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        form.write(model, torch.cat((images, images)), file, 18)  # one image would be for ever
        if kind == "int8":
            quantize_dynamic(file, file)
        return form.open(file)


def _in_openvino(model: nn.Module, images: Tensor, kind: str) -> Run:
    import openvino

    _only(kind, "f32", "bf16")
    shape = [-1, *images.shape[1:]]
    graph = openvino.convert_model(model, example_input=images, input=shape)
    threads = torch.get_num_threads()
    options = {"INFERENCE_PRECISION_HINT": kind, "INFERENCE_NUM_THREADS": threads}
    run = openvino.Core().compile_model(graph, "CPU", {**options, "PERFORMANCE_HINT": "LATENCY"})
    return lambda images: run(images.numpy())


def _in_executorch(model: nn.Module, images: Tensor, kind: str) -> Run:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    _only(kind, "f32")
    with torch.no_grad():
        program = torch.export.export(model, (images,))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    loaded = Runtime.get().load_program(lowered.to_executorch().buffer)
    forward = loaded.load_method("forward")
    # A method needs its program to be there, and ExecuTorch takes as many threads as cores.
    return lambda images, _program=loaded: forward.execute([images])


def _only(kind: str, *known: str) -> None:
    if kind not in known:
        raise SystemExit(f"This runtime is timed with --types {' '.join(known)}, not {kind}.")


def _in_torch(model: nn.Module) -> Run:
    dtype = next(model.parameters()).dtype

    @torch.inference_mode()
    def run(images: Tensor) -> Any:
        return model(images.to(dtype))

    return run


RUNTIMES = {
    "onnxruntime": _in_onnxruntime,
    "openvino": _in_openvino,
    "executorch": _in_executorch,
}

if __name__ == "__main__":
    main()
