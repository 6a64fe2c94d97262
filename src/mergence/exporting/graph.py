"""What is in an ONNX graph, and what must not be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mergence.errors import ExportError

DATA_DEPENDENT = {"NonZero", "Compress", "Unique", "NonMaxSuppression", "Loop", "If", "Scan"}
"""Operators whose output shapes, or whose very execution, depend on values."""
SCATTER = {"ScatterElements", "ScatterND", "Scatter"}


def operators(path: Path) -> dict[str, int]:
    """The operators of a graph with how often each is there, most frequent first."""
    return dict(Counter(node.op_type for node in _nodes(path)).most_common())


def check(path: Path) -> None:
    """Refuse a graph that runtimes cannot run well, or not at all.

    A scatter with a reduction is slow on most runtimes and wrong on some; shapes that depend on
    values end static memory planning and are refused by TensorRT and by NPU compilers.

    Raises:
        ExportError: There is one; the message says which and where.
    """
    wrong = [
        f"{node.op_type} '{node.name}'"
        for node in _nodes(path)
        if node.op_type in DATA_DEPENDENT or (node.op_type in SCATTER and _reduces(node))
    ]
    if wrong:
        raise ExportError(
            f"The graph would have {len(wrong)} operators that scatter with a reduction or whose "
            f"shapes depend on values ({', '.join(wrong[:3])}), which many runtimes run slowly, "
            "wrongly or not at all. A method of your own should plan with top-k, comparison and "
            "gather, as those in mergence.planning do. Nothing was written."
        )


def _reduces(node: Any) -> bool:
    return any(a.name == "reduction" and a.s not in (b"", b"none") for a in node.attribute)


def _nodes(path: Path) -> Iterator[Any]:
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    yield from _walk(model.graph.node)
    for function in model.functions:
        yield from _walk(function.node)


def _walk(nodes: Any) -> Iterator[Any]:
    for node in nodes:
        yield node
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                yield from _walk(graph.node)
