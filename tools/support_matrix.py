"""Write docs/families/README.md: what every family covers, read from the registry.

python tools/support_matrix.py
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

from torch import nn

from mergence import family
from mergence.family import Family

PAGE = Path(__file__).resolve().parents[1] / "docs" / "families" / "README.md"
LIBRARIES = ("timm", "transformers", "torchvision", "open_clip_torch", "torch")
# NumPy below 2.4 is for the interpreter of that Triton, which only tests use.
OTHERS = (
    "once also with torch 2.15.0 (torchvision 0.29.2) and 2.9.1 (0.24.1, NumPy below 2.4); "
    "transformers also 4.57.6, 5.2.0, 5.8.1 and 5.17.0"
)
CHECKPOINTING = ("set_grad_checkpointing", "gradient_checkpointing_enable")


def table() -> str:
    """One row for each kind of model that the contract tests build."""
    head = (
        "| family | kind tested | class | prefix tokens | looks at places | coarse patches "
        "| answers with | gradient checkpointing |\n|---|---|---|---|---|---|---|---|\n"
    )
    rows = [
        _row(one, kind, build())
        for one in family.registry().values()
        for kind, build in one.tiny().items()
    ]
    return head + "".join(rows)


def _row(one: Family, kind: str, model: nn.Module) -> str:
    spec = one.inspect(model)
    cells = (
        one.name,
        kind,
        f"`{type(model).__name__}`",
        spec.cost.prefix,
        "yes" if spec.cost.placed else "",
        "yes" if spec.coarse else "",
        "class scores" if spec.classes else "features",
        "yes" if any(hasattr(model, name) for name in CHECKPOINTING) else "not in the library",
    )
    return f"| {' | '.join(map(str, cells))} |\n"


def page() -> str:
    """The whole page."""
    families = family.registry().values()
    covered = "".join(f"- `{f.name}`: {f.supported}\n" for f in families)
    refused = "".join(f"- `{cls}`: {why}\n" for f in families for cls, why in f.refused.items())
    tested = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return f"""# What is covered

Made by `python tools/support_matrix.py` from the registry. `mergence list families` shows the same.

{covered}
Every kind below passes the contract tests: keep-all bit-identical to the library's own forward, \
`remove` exact, prefix tokens and token counts as scheduled, a batch equal to its images one by \
one, copies and pickles, threads, half precision and autocast, gradients, `torch.compile` in one \
graph; `torch.export` and ONNX for a part of them. *Coarse patches*: \
[four patches can be read as one](../coarse.md). Tested with {tested}; {OTHERS}.

{table()}
## What is refused

What is not listed is refused by name, with the list of what is covered: windowed, hierarchical \
and convolutional models, which have no sequence of tokens to reduce, and blocks, attentions and \
stems of another class than those that are restated (post-norm, parallel, hybrid). These classes \
look as if they were covered and are refused with a reason of their own; timm {version("timm")} \
has neither LV-ViT nor T2T-ViT.

{refused}"""


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
