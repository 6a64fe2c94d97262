"""The operators as graphs see them: which ones are taken, and what torch knows of the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from mergence import ops
from mergence.ops import fused
from mergence.plan import MergePlan

UNSEEN = """
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from mergence.ops import operators
from test_operators import arguments, known

with FakeTensorMode():
    for name, given in arguments("cpu").items():
        print(name, known(getattr(operators, name)(*given)))
"""

COMPILED = """
import torch
from torch._dynamo.backends.common import aot_autograd
from mergence.ops import fused
from mergence.plan import MergePlan

def stop(graph, inputs):
    print([str(node.target) for node in graph.graph.nodes])
    raise SystemExit

size = torch.ones(1, 4)
plan = MergePlan(torch.tensor([[0, 1, 1, 0]]), size, 2, keep_norm=True)
backend = aot_autograd(fw_compiler=stop)
step = torch.compile(lambda x: fused.merge(x, size, plan, 1)[0], fullgraph=True, backend=backend)
step(torch.randn(1, 5, 16, requires_grad=True))
"""


def arguments(place: Any) -> dict[str, tuple[Any, ...]]:
    """Arguments for each operator."""
    tokens, size, score = (torch.rand(s, device=place) for s in ((2, 9, 16), (2, 8), (2, 9)))
    q = torch.rand(2, 9, 3, 16, device=place).transpose(1, 2)
    bias = torch.rand(2, 1, 1, 9, device=place)
    slot, of, among = (torch.arange(n, device=place).expand(2, n) % 4 for n in (8, 2, 3))
    return {
        "merge": (tokens, size, slot, size, 4, 1, True),
        "scales": (tokens,),
        "nearest_above": (tokens, score, score),
        "nearest": (tokens, score, of, among),
        "split": (score, 3),
        "attention_of_row": (q[:, :, :1], q, bias, 0.25),
        "attend": (q, q, q, bias),
    }


def known(found: Tensor | tuple[Tensor, ...]) -> list[Any]:
    """What a graph knows of the tensors that an operator returns."""
    found = found if isinstance(found, tuple) else (found,)
    return [(tuple(t.shape), t.stride(), str(t.dtype)) for t in found]


@pytest.mark.slow
def test_torch_knows_what_the_kernels_return(place: torch.device, uninterpreted: Any) -> None:
    from mergence.ops import kernels

    expected = [
        f"{name} {known(getattr(kernels, name)(*given))}"
        for name, given in arguments(place).items()
    ]
    done = uninterpreted(UNSEEN)
    assert done.stdout.splitlines() == expected, done.stderr


@pytest.mark.slow
def test_a_compiled_graph_holds_the_kernel_also_where_a_gradient_is_wanted(
    uninterpreted: Any,
) -> None:
    pytest.importorskip("triton", reason="Triton is not installed")
    done = uninterpreted(COMPILED)
    assert "triton_kernel_wrapper_functional" in done.stdout, done.stderr
    assert "mergence" not in done.stdout


@pytest.mark.slow
def test_torch_finds_nothing_wrong_with_the_operators(place: torch.device) -> None:
    from mergence.ops import operators

    # Kernels that are interpreted have no graph, so the checks that make one need a GPU.
    checks = ["test_schema", "test_autograd_registration"]
    if place.type == "cuda":
        checks += ["test_faketensor", "test_aot_dispatch_dynamic"]
    for name, given in arguments(place).items():
        if name == "merge":
            given[0].requires_grad_()
        torch.library.opcheck(getattr(operators, name), given, test_utils=checks)


@pytest.mark.slow
def test_the_merge_compiles_in_one_graph_with_gradients(place: torch.device) -> None:
    if place.type != "cuda":
        pytest.skip("kernels that are interpreted have no graph; this needs a GPU")
    slot = torch.tensor([[0, 1, 1, 0]], device=place)
    size = torch.ones(1, 4, device=place)
    plan = MergePlan(slot, size, 2, keep_norm=True)

    def step(x: Tensor) -> Tensor:
        return fused.merge(x * 2, size, plan, 1)[0].square().sum()

    torch.compiler.reset()
    x = torch.randn(1, 5, 16, device=place)
    grads = []
    for call in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        call(leaf).backward()
        grads.append(leaf.grad)
    torch.compiler.reset()
    assert torch.equal(grads[0], grads[1])  # type: ignore[arg-type]


def test_what_is_compiled_runs_the_operators_of_its_device() -> None:
    # torch 2.11 answers what it compiles that it is being exported.
    def taken(x: Tensor) -> bool:
        return ops._implementation(x) is ops.cpu

    compiled = torch.compile(taken, fullgraph=True, backend="eager")
    assert compiled(torch.zeros(1))
    torch.compiler.reset()


def test_what_is_exported_runs_the_operators_for_any_device() -> None:
    taken = []

    class Model(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            taken.append(ops._implementation(x))
            return x + 1

    torch.export.export(Model(), (torch.zeros(1),), strict=False)
    assert set(taken) == {ops.dense}


def test_forward_derivatives_are_those_of_a_mapped_function(place: torch.device) -> None:
    x, towards = torch.randn(2, 2, 5, 16, device=place).unbind()
    slot = torch.tensor([[0, 1, 1, 0]], device=place).expand(2, 4)
    size = torch.ones(2, 4, device=place)
    plan = MergePlan(slot, size, 2, keep_norm=True)

    def merged(x: Tensor) -> Tensor:
        return ops.merge(x, size, plan, 1)[0]

    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(merged(forward_ad.make_dual(x, towards))).tangent
    expected = torch.func.jvp(merged, (x,), (towards,))[1]
    assert found is not None
    torch.testing.assert_close(found, expected)
