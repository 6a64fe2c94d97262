"""`import mergence`, all its names used, loads torch and little else; its `--help` not even torch.

Times are processor times of fresh processes, the best of a few tries that end at the first good
one: on a busy machine a single wall-clock reading says nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src" / "mergence"
HEAVY = {
    "PIL",
    "accelerate",
    "datasets",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "open_clip",
    "rich",
    "timm",
    "torchvision",
    "transformers",
    "triton",
    "typer",
    "webdataset",
    "yaml",
}
IMPORT_SECONDS = 0.3  # on top of import torch
HELP_SECONDS = 1.0
TRIES = 5

needs_main = pytest.mark.skipif(
    not (SRC / "__main__.py").exists(), reason="there is no command line yet"
)


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter's run, with its output; a failure shows what it said."""
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, f"python {' '.join(arguments)}\n{done.stdout}{done.stderr}"
    return done


def best_of(tries: int, measure: Callable[[], float], enough: float) -> float:
    """The least of a few measurements; stops at the first that is below `enough`."""
    best = float("inf")
    for _ in range(tries):
        best = min(best, measure())
        if best < enough:
            break
    return best


def test_import_loads_no_heavy_library_and_costs_little_more_than_torch() -> None:
    code = """
import json, sys, time, torch
before = set(sys.modules)  # what torch itself brings is not ours to judge
start = time.process_time()
import mergence
for name in mergence.__all__:
    getattr(mergence, name)  # they may be loaded when first used
seconds = time.process_time() - start
print(json.dumps([seconds, [name.partition(".")[0] for name in set(sys.modules) - before]]))
"""

    def measure() -> float:
        seconds, loaded = json.loads(python("-c", code).stdout)
        heavy = sorted(HEAVY.intersection(loaded))
        assert not heavy, f"import mergence loads {heavy}: import them inside functions"
        return float(seconds)

    cost = best_of(TRIES, measure, IMPORT_SECONDS)
    assert cost < IMPORT_SECONDS, (
        f"import mergence and its names take {cost:.2f} s on top of import torch"
    )


@needs_main
def test_help_does_not_import_torch() -> None:
    done = python("-X", "importtime", "-m", "mergence", "--help")
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "mergence" in loaded, "the list of imports could not be read"
    assert "torch" not in loaded, "mergence --help imports torch: import it inside the commands"
    assert "Usage" in done.stdout


@needs_main
def test_help_is_quick() -> None:
    def measure() -> float:
        before = os.times()
        python("-m", "mergence", "--help")
        after = os.times()
        return sum(after[2:4]) - sum(before[2:4])  # of the child, user and system

    cost = best_of(TRIES, measure, HELP_SECONDS)
    assert cost < HELP_SECONDS, f"mergence --help takes {cost:.2f} s of processor time"
