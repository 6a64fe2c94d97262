"""Speed of reduced models on one device: every table, one command.

    python benchmarks/speed/run.py --out benchmarks/speed/results/NAME.json

Takes the suite of the device that is there: on a CPU float32, and bfloat16 where the CPU has the
arithmetic for it; on CUDA bfloat16, with CUDA graphs as well. Weights are random, which changes no
time: the work of a reduced model depends on the schedule alone. In each setting the dense model and
all reductions take turns; at last all are profiled in eager mode. `render.py` turns the results
into docs/speed.md and the table of the README.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from rich.progress import Progress

import mergence
from mergence.benchmark import bench
from mergence.devices import emulated
from mergence.models import load_model
from mergence.recipe import make
from mergence.setting import multiple_on

BUDGETS = (0.67, 0.5)
METHODS = ("mergence", "mstm", "tome", "evit")


@dataclass(frozen=True)
class Case:
    """One table: a model at the batch sizes that people run it with."""

    model: str
    batches: tuple[int, ...]
    dtypes: tuple[torch.dtype, ...]
    modes: tuple[str, ...]


CPU = ((torch.float32, torch.bfloat16), ("eager", "compile"))
GPU = ((torch.bfloat16,), ("eager", "compile", "cudagraphs"))
SUITES: dict[str, tuple[Case, ...]] = {
    "cpu": (
        Case("deit_small_patch16_224", (1, 8, 32), *CPU),
        Case("vit_base_patch16_224", (1, 4), *CPU),
        Case("vit_small_patch14_dinov2", (1, 4), *CPU),
    ),
    "cuda": (
        Case("deit_small_patch16_224", (1, 8, 256), *GPU),
        Case("vit_base_patch16_224", (1, 8, 128), *GPU),
        Case("vit_large_patch16_384", (1, 8, 64), *GPU),
        Case("vit_large_patch14_dinov2", (1, 4, 16), *GPU),
    ),
}


def main() -> None:
    """Time, print, write the JSON after each table, so that an interrupted run keeps its tables."""
    arguments = _arguments()
    device = torch.device(arguments.device)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    result: dict[str, Any] = {
        "machine": platform.machine(),
        "capability": _capability(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "mergence": mergence.__version__,
        "align": arguments.align or multiple_on(device.type, torch.float32),
        "left_out": [],
        "tables": [],
    }
    for case in SUITES[device.type]:
        if arguments.models and case.model not in arguments.models:
            continue
        modes = [mode for mode in case.modes if mode in (arguments.modes or case.modes)]
        for dtype in case.dtypes:
            if arguments.dtypes and str(dtype).removeprefix("torch.") not in arguments.dtypes:
                continue
            if emulated(device, dtype):
                name = str(dtype).removeprefix("torch.")
                result["left_out"].append(f"{case.model}, {name}: emulated on this device")
                _write(result, arguments.out)
                continue
            torch.manual_seed(0)
            loaded = load_model(f"timm-random:{case.model}")
            with Progress() as bar:
                task = bar.add_task(case.model, total=(len(modes) + 1) * len(case.batches))
                table = bench(
                    loaded.model,
                    dict(_recipes(arguments.methods, arguments.align)),
                    input_size=loaded.input_size,
                    batches=case.batches,
                    dtypes=(dtype,),
                    modes=modes,
                    device=device,
                    seconds=arguments.seconds,
                    rounds=arguments.rounds,
                    profile=True,
                    model_name=case.model,
                    progress=lambda settings, bar=bar, task=task: bar.advance(task, settings),
                )
            align = arguments.align or multiple_on(device.type, dtype)
            result["tables"].append(table.to_dict() | {"align": align})
            _write(result, arguments.out)


def _capability(device: torch.device) -> str:
    if device.type == "cuda":
        return "compute capability {}.{}".format(*torch.cuda.get_device_capability(device))
    tiles, vectors = torch.cpu._is_amx_tile_supported(), torch.cpu._is_avx512_bf16_supported()
    beside = " with AMX" if tiles else " with bfloat16" if vectors else ""
    return torch.backends.cpu.get_cpu_capability() + beside


def _write(result: dict[str, Any], out: Path) -> None:
    out.write_text(json.dumps(result, indent=1) + "\n")


def _recipes(methods: Sequence[str], align: int | None) -> Iterator[tuple[str, mergence.Recipe]]:
    for budget in BUDGETS:
        for name in methods:
            yield f"{name}@{budget:g}", make(name, macs=budget, align=align)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="*", help="only these models of the suite")
    parser.add_argument("--modes", nargs="*", help="only these modes of the suite")
    parser.add_argument("--dtypes", nargs="*", help="only these types of the suite")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="others than these")
    parser.add_argument("--align", type=int, help="token counts in multiples of this")
    parser.add_argument("--seconds", type=float, default=5.0, help="for each setting, or longer")
    parser.add_argument("--rounds", type=int, default=7, help="turns in each setting at least")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


if __name__ == "__main__":
    main()
