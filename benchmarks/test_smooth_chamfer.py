"""Rows of smooth_chamfer: beside the plain product of the flattened operands, eager and compiled PyTorch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import ROWS, Function, Row, measure
from benchmarks.peers import eager_similarity
from setemb.modules.linear import HAS_ONEDNN, linear
from setemb_kernels import smooth_chamfer

ALPHA = 16.0
F32, BF16 = torch.float32, torch.bfloat16


def unit_sets(n: int, k: int, d: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(n, k, d, device=device), dim=-1).to(dtype)


def forward_row(
    benchmark: BenchmarkFixture,
    n: int,
    K: int,
    L: int,
    D: int,
    dtype: torch.dtype,
    limit: float | None,
    device: str = "cpu",
) -> Row:
    x, y = unit_sets(n, K, D, dtype, device), unit_sets(n, L, D, dtype, device)
    x_flat, y_flat = x.flatten(0, 1), y.flatten(0, 1)
    row = Row("smooth_chamfer", f"forward {n}x{n} K{K} L{L} D{D} {_name(dtype)} {device}", limit, "product")
    compiled = torch.compile(eager_similarity, dynamic=False)
    peers = _fitting(
        {"eager": lambda: eager_similarity(x, y), "compiled": lambda: compiled(x, y)}, n * n * K * L, device
    )
    if (
        dtype == F32 and device == "cpu" and HAS_ONEDNN
    ):  # torch's product is MKL's, which is not the fastest on every processor
        peers["onednn"] = lambda: linear(x_flat, y_flat)
    return measure(
        benchmark,
        row,
        ours=lambda: smooth_chamfer(x, y, alpha=ALPHA),
        floor=lambda: x_flat @ y_flat.T,
        peers=peers,
        operations=2.0 * n * n * K * L * D,
        device=device,
        rounds=9 if device == "cpu" else 30,
    )


def backward_row(
    benchmark: BenchmarkFixture, n: int, K: int, D: int, dtype: torch.dtype, limit: float | None, device: str = "cpu"
) -> Row:
    x, y = (unit_sets(n, K, D, dtype, device).requires_grad_() for _ in range(2))
    x_flat, y_flat = x.detach().flatten(0, 1), y.detach().flatten(0, 1)
    weights = torch.randn(n * K, n * K, device=device).to(dtype)
    upstream = torch.randn(n, n, device=device).to(dtype)

    def step(similarity: object) -> Function:
        return lambda: torch.autograd.grad(similarity(x, y), (x, y), upstream)  # type: ignore[operator]

    def three_products() -> None:
        x_flat @ y_flat.T, weights @ y_flat, weights.T @ x_flat

    row = Row(
        "smooth_chamfer", f"forward + backward {n}x{n} K{K} L{K} D{D} {_name(dtype)} {device}", limit, "three products"
    )
    return measure(
        benchmark,
        row,
        ours=step(lambda x, y: smooth_chamfer(x, y, alpha=ALPHA)),
        floor=three_products,
        peers=_fitting(
            {"eager": step(eager_similarity), "compiled": step(torch.compile(eager_similarity, dynamic=False))},
            4 * n * n * K * K,
            device,
        ),
        operations=6.0 * n * n * K * K * D,
        device=device,
        rounds=7 if device == "cpu" else 30,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _fitting(peers: dict[str, Function], scores: int, device: str) -> dict[str, Function]:
    """Leaves out peers whose stored scores would not fit (they hold several copies)."""
    room = 2 << 30 if device == "cpu" else torch.cuda.get_device_properties(0).total_memory // 8
    return peers if 4 * scores <= room else {}


@pytest.mark.parametrize(
    ("D", "dtype", "limit"), [(1024, F32, 1.10), (128, F32, 1.10), (1024, BF16, 1.35), (128, BF16, 2.0)], ids=str
)
def test_forward(benchmark: BenchmarkFixture, D: int, dtype: torch.dtype, limit: float) -> None:
    forward_row(benchmark, 1024, 4, 4, D, dtype, limit)


@pytest.mark.parametrize(("K", "L"), [(1, 1), (2, 2), (3, 3), (5, 5), (8, 8), (16, 16), (4, 7)])
def test_forward_set_sizes(benchmark: BenchmarkFixture, K: int, L: int) -> None:
    forward_row(benchmark, 1024, K, L, 256, F32, 1.35)


@pytest.mark.parametrize(
    ("D", "dtype", "limit"), [(1024, F32, 1.25), (128, F32, None), (1024, BF16, None), (128, BF16, None)], ids=str
)
def test_forward_and_backward(benchmark: BenchmarkFixture, D: int, dtype: torch.dtype, limit: float | None) -> None:
    backward_row(benchmark, 1024, 4, D, dtype, limit)


MEMORY = """
import sys, torch
from benchmarks.memory import peak_beyond_inputs_and_results
from setemb_kernels import smooth_chamfer
n, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
x, y = (torch.randn(n, 4, 1024).div_(32).to(dtype).requires_grad_() for _ in range(2))
upstream = torch.ones(n, n, dtype=dtype)
def step(x=x, y=y, upstream=upstream):
    s = smooth_chamfer(x, y)
    return s, *torch.autograd.grad(s, (x, y), upstream)
step(x[:64], y[:64], upstream[:64, :64])
print(peak_beyond_inputs_and_results(step))
"""


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("n", [1024, 4096])
def test_peak_memory(n: int, dtype: str) -> None:
    command = [sys.executable, "-c", MEMORY, str(n), dtype]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
    assert run.returncode == 0, run.stderr
    row = Row("smooth_chamfer", f"peak memory, forward + backward {n}x{n} K4 D1024 {dtype} cpu", None, "")
    row.memory_mib, row.limit_mib = float(run.stdout), 64.0
    ROWS.append(row)
