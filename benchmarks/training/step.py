"""Time of a training step with reduction against the dense one, in turns, medians.

Forward, backward and optimiser, on random images, through the same parts as `mergence train`.

    python benchmarks/training/step.py local-dir:../shared/models/deit_small_tinyimagenet
"""

from __future__ import annotations

import tempfile
import time
from statistics import median

import torch
import typer

from mergence.devices import synchronise
from mergence.train import Config
from mergence.train.levels import Choice
from mergence.train.run import Run


def main(
    model: str,
    macs: float = 0.67,
    batch_size: int = 8,
    rounds: int = 5,
    precision: str = "no",
) -> None:
    """Print both medians and their ratio."""
    with tempfile.TemporaryDirectory() as out:
        config = Config.from_dict(
            {
                "model": model,
                "data": f"synthetic:{batch_size}",
                "macs": macs,
                "out": out,
                "precision": precision,
            }
        )
        run = Run(config)
    device = run.accelerator.device
    x = torch.randn(batch_size, *run.loaded.input_size, device=device)
    soft = torch.full((batch_size, len(run.class_names)), 1 / len(run.class_names), device=device)
    (name,) = run.recipes

    def step(strength: float) -> float:
        synchronise(device)
        start = time.perf_counter()
        with run.accelerator.autocast():
            loss = run.objective(run.model, x, soft, Choice(name, strength)).mean()
        run.accelerator.backward(loss)
        run.optimizer.step()
        run.optimizer.zero_grad()
        synchronise(device)
        return time.perf_counter() - start

    times = {strength: [step(strength)] for strength in (0.0, 1.0)}  # a warm-up
    for _ in range(rounds):
        for strength, found in times.items():
            found.append(step(strength))
    dense, reduced = (median(found[1:]) for found in times.values())
    print(f"dense {dense * 1e3:.0f} ms, {name} {reduced * 1e3:.0f} ms: {reduced / dense:.3f}")


if __name__ == "__main__":
    typer.run(main)
