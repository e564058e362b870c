"""Rows of slot_attention: the op beside the plain products it contains, the modules beside what they replace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benchmarks.harness import ROWS, Function, Row, measure
from benchmarks.memory import in_a_process_of_its_own
from benchmarks.peers import ProjectedEachIteration, eager_slot_attention
from setemb.modules import SetPrediction, SlotAttention
from setemb_kernels import slot_attention

F32 = torch.float32
OP = "slot_attention"


def op_row(
    benchmark: BenchmarkFixture,
    B: int,
    K: int,
    T: int,
    D: int,
    limit: float | None,
    *,
    backward: bool,
) -> Row:
    q, k, v = (torch.randn(B, 1, n, D).requires_grad_(backward) for n in (K, T, T))
    upstream, weights = torch.randn(B, 1, K, D), torch.rand(B, 1, K, T)

    def forward_products() -> None:
        with torch.no_grad():
            q @ k.transpose(-1, -2), weights @ v

    def backward_products() -> None:
        with torch.no_grad():
            q @ k.transpose(-1, -2), upstream @ v.transpose(-1, -2), weights @ k
            weights.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ upstream

    def step(function: Callable[..., Tensor]) -> Function:
        if not backward:
            return lambda: function(q, k, v)
        out = function(q, k, v)
        return lambda: torch.autograd.grad(out, (q, k, v), upstream, retain_graph=True)

    what = "backward" if backward else "forward"
    row = Row(
        OP,
        f"{what} B{B} K{K} T{T} D{D} float32 cpu",
        limit,
        "five products" if backward else "two products",
    )
    compiled = torch.compile(eager_slot_attention, dynamic=False)
    peers = {"eager": step(eager_slot_attention), "compiled": step(compiled)}
    return measure(
        benchmark,
        row,
        ours=step(slot_attention),
        floor=backward_products if backward else forward_products,
        peers=peers,
        operations=(10.0 if backward else 4.0) * B * K * T * D,
        rounds=15,
    )


@pytest.mark.parametrize(("B", "K", "T", "D"), [(8, 8, 4096, 128), (1, 8, 4096, 128), (16, 7, 1024, 64)])
def test_op_forward(benchmark: BenchmarkFixture, B: int, K: int, T: int, D: int) -> None:
    op_row(benchmark, B, K, T, D, 1.3 if T == 4096 else None, backward=False)


@pytest.mark.parametrize(("B", "K", "T", "D"), [(8, 8, 4096, 128), (1, 8, 4096, 128), (16, 7, 1024, 64)])
def test_op_backward(benchmark: BenchmarkFixture, B: int, K: int, T: int, D: int) -> None:
    op_row(benchmark, B, K, T, D, 1.4 if T == 4096 else None, backward=True)


def module_row(
    benchmark: BenchmarkFixture,
    name: str,
    ours: nn.Module,
    theirs: nn.Module,
    tokens: Tensor,
    limit: float,
    *,
    backward: bool,
) -> Row:
    def step(module: nn.Module) -> Function:
        if not backward:
            return torch.no_grad()(lambda: module(tokens))
        inputs = tokens.clone().requires_grad_()
        leaves = [inputs, *module.parameters()]

        def run() -> None:
            out = module(inputs)
            torch.autograd.grad(out, leaves, torch.ones_like(out))

        return run

    what = "forward + backward" if backward else "forward"
    row = Row(OP, f"{name}, {what}", limit, "as published")
    return measure(benchmark, row, ours=step(ours), floor=step(theirs), peers={}, operations=0.0, rounds=7)


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward + backward"])
def test_classic_module(benchmark: BenchmarkFixture, backward: bool) -> None:
    package = pytest.importorskip("slot_attention", reason="the package slot-attention is not installed")
    torch.manual_seed(0)
    theirs, ours = package.SlotAttention(4, 1024, iters=4), SlotAttention(4, 1024, iterations=4)
    ours.load_state_dict(theirs.state_dict())
    tokens = torch.randn(32, 64, 1024)
    module_row(benchmark, "classic module B32 T64 D1024 K4 x4", ours, theirs, tokens, 1 / 1.4, backward=backward)


def paper_modules() -> tuple[nn.Module, nn.Module]:
    """Ours and the same from operations as published, with the same parameters; both without dropout."""
    torch.manual_seed(0)
    ours = SetPrediction(1024, 1024, 1024, heads=4, dim_head=512).eval()
    return _Embeddings(ours), _Embeddings(ProjectedEachIteration(ours))


class _Embeddings(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, tokens: Tensor) -> Tensor:
        out: Tensor = self.module(tokens, tokens[:, 0]).embeddings
        return out


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward + backward"])
def test_paper_module(benchmark: BenchmarkFixture, backward: bool) -> None:
    ours, theirs = paper_modules()
    tokens = torch.randn(128, 36, 1024)
    torch.testing.assert_close(ours(tokens[:4]), theirs(tokens[:4]), rtol=1e-4, atol=1e-4)
    name = "paper's module B128 T36 D1024 4x512 K4 x4"
    module_row(benchmark, name, ours, theirs, tokens, 1 / 2.5, backward=backward)


OP_MEMORY = """
import sys, torch
from benchmarks.memory import peak_beyond_inputs_and_results
from setemb_kernels import slot_attention
q, k, v = (torch.randn(8, 1, n, 128).requires_grad_() for n in (8, 4096, 4096))
def step(*leaves):
    out = slot_attention(*leaves)
    return out, *torch.autograd.grad(out, leaves, torch.ones_like(out))
step(*(t[:1, :, :64] for t in (q, k, v)))
print(peak_beyond_inputs_and_results(lambda: step(q, k, v)))
"""

MODULE_MEMORY = """
import sys, torch
from benchmarks.memory import peak_beyond_inputs_and_results
from benchmarks.test_slot_attention import paper_modules
module = paper_modules()[int(sys.argv[1])]
tokens = torch.randn(128, 36, 1024).requires_grad_()
def step(tokens):
    out = module(tokens)
    return out, *torch.autograd.grad(out, [tokens, *module.parameters()], torch.ones_like(out))
step(tokens[:2])
print(peak_beyond_inputs_and_results(lambda: step(tokens)))
"""


def test_op_peak_memory() -> None:
    row = Row(OP, "peak memory, forward + backward B8 K8 T4096 D128 float32 cpu", None, "")
    row.memory_mib, row.limit_mib = in_a_process_of_its_own(OP_MEMORY), 32.0
    ROWS.append(row)


def test_paper_module_peak_memory() -> None:
    published = Row(OP, "peak memory, paper's module as published, forward + backward", None, "")
    published.memory_mib = in_a_process_of_its_own(MODULE_MEMORY, "1")
    ours = Row(OP, "peak memory, paper's module, forward + backward", None, "")
    ours.memory_mib, ours.limit_mib = in_a_process_of_its_own(MODULE_MEMORY, "0"), published.memory_mib / 2
    ROWS.extend((published, ours))
