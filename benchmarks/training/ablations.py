"""What each option of a training run gives: the same short run, changed in one thing each time.

Every run starts from the embedded model and sees the same images in the same order. Each is
validated with every reduction that it trains, and densely.

    python benchmarks/training/ablations.py train.zip test.zip --out R.json

The two archives are Fashion-MNIST, by examples/fashion-mnist/make_zip.py.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import fusions  # noqa: F401  (its methods)
import typer

from mergence.train import Config, fit

MACS = 0.33

RUNS: dict[str, dict[str, Any]] = {
    "labels": {},
    "labels, dense": {"macs": 1.0},
    "reduction_warmup 1": {"reduction_warmup": 1.0},
    "reduce_epochs 1": {"reduce_epochs": "1"},
    "reduce_epochs 2": {"reduce_epochs": "2"},
    "macs 0.33 0.5 0.67": {"macs": (MACS, 0.5, 0.67)},
    "distill 1, label_loss 0": {"distill": 1.0, "label_loss": 0.0},
    "the same, temperature 4": {"distill": 1.0, "label_loss": 0.0, "temperature": 4.0},
    "consistency 3": {"consistency": 3.0},
    "dense_loss 1": {"dense_loss": 1.0},
    "mstm": {"method": "mstm"},
    "mstm, fusion": {"method": "mstm", "set": {"fusion": True}, "learned_lr": 1e-3},
    "mstm-one-scale": {"method": "mstm-one-scale", "learned_lr": 1e-3},
    "mstm-cross-scale": {"method": "mstm-cross-scale", "learned_lr": 1e-3},
    "mstm-earlier-blocks": {"method": "mstm-earlier-blocks", "learned_lr": 1e-3},
    "mstm-after-embedding": {"method": "mstm-after-embedding", "learned_lr": 1e-3},
}


def main(
    train: str,
    val: str,
    out: Annotated[Path, typer.Option(help="JSON file; other runs in it are kept.")],
    only: Annotated[list[str] | None, typer.Option(help="Some of the runs, by name.")] = None,
    images: int = 6400,
    val_images: int = 3000,
    epochs: int = 2,
    lr: float = 1e-4,
    precision: str = "bf16",
    seed: int = 0,
) -> None:
    """Train each and print what came of it; `out` holds the runs so far."""
    rows: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    for name in only or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            values = {
                "model": "demo", "data": train, "val": val, "limit": images, "out": folder,
                "val_limit": val_images, "macs": MACS, "epochs": epochs, "batch_size": 64, "lr": lr,
                "weight_decay": 0.0, "clip_grad": 1.0, "crop_scale": 0.8, "precision": precision,
                "seed": seed,
            }  # fmt: skip
            summary = fit(Config.from_dict(values | RUNS[name]))
        rows[name] = {"options": RUNS[name], "epochs": summary.history}
        out.write_text(json.dumps(rows, indent=1) + "\n")
        print(f"{name:40}", *(f"{k} {v:.4f}" for k, v in summary.history[-1].items()), flush=True)


if __name__ == "__main__":
    typer.run(main)
