"""The kernels compile for NVIDIA GPUs, which needs none, and fit into the memory of a small one."""

from __future__ import annotations

from typing import Any

import pytest

CODE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from mergence.ops.kernels import attention, cosines, merging, splitting

SHARED = 64 * 1024  # bytes for one program on a T4
CAPABILITIES = {"bf16": 90, "fp16": 80, "fp32": 90}
OF_TOKENS = ("x", "merged", "q", "k", "v", "bias")
POINTERS = {"size": "fp32", "slot": "i64", "weight": "fp32", "merged_size": "fp32",
            "cosine": "fp32", "score": "fp32", "order": "i64", "place": "i64",
            "of": "i64", "among": "i64", "found": "i64"}

def compile(kernel, dtype, warps, **constants):
    def type_of(name):
        if name in constants:
            return "constexpr"
        if name in OF_TOKENS or (name == "out" and kernel is attention._attend):
            return "*" + dtype
        if name in ("scale", "out"):
            return "*fp32"
        return "*" + POINTERS[name] if name in POINTERS else "i32"
    source = ASTSource(kernel, {n: type_of(n) for n in kernel.arg_names}, constants)
    target = GPUTarget("cuda", CAPABILITIES[dtype], 32)
    done = triton.compile(source, target=target, options={"num_warps": warps})
    assert done.asm["cubin"] and done.metadata.shared <= SHARED, (kernel, dtype)

for dtype in ("bf16", "fp16", "fp32"):
    compile(merging._merge, dtype, 1, LENGTH=256, WIDTH=512, KEEP_NORM=True)
    compile(merging._merge, dtype, 4, LENGTH=2048, WIDTH=2048, KEEP_NORM=False)
    step = 32 if dtype == "fp32" else 64
    tile = {"ROWS": 64, "COLUMNS": 128, "INTERPRETED": False}
    compile(cosines._scales, dtype, 4, ROWS=8, WIDTH=2048)
    compile(cosines._nearest_above, dtype, 4, STEP=step, **tile)
    compile(cosines._nearest, dtype, 4, STEP=step, **tile)
    if dtype != "fp32":
        for dim in (64, 80):
            tile["COLUMNS"], width = 32, 64 if dim == 64 else 128
            compile(attention._attend, dtype, 4, SCALE=0.125, DIM=dim, WIDTH=width, **tile)
    for length, chunk in ((256, 64), (2048, 16)):
        options = {"SCALE": 0.125, "BIASED": True, "LENGTH": length, "CHUNK": chunk}
        compile(attention._attention_of_row, dtype, 8, **options)
compile(splitting._split, "fp32", 4, LENGTH=2048)
print("compiled")
"""


@pytest.mark.slow
def test_the_kernels_compile_and_fit(uninterpreted: Any) -> None:
    nvidia = pytest.importorskip("triton.backends.nvidia", reason="no Triton for NVIDIA here")
    assert nvidia
    done = uninterpreted(CODE)
    assert done.stdout.strip() == "compiled", done.stderr
