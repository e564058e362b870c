"""Rows of the losses over sets: beside plain products of the flattened operands, and the largest batch that fits."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import ROWS, Function, Row, measure
from benchmarks.peers import eager_infonce, eager_sigmoid, eager_triplet
from benchmarks.test_smooth_chamfer import unit_sets
from setemb_kernels import set_infonce_loss, set_sigmoid_loss, set_triplet_loss

LOSSES = {  # ours, eager, and how many plain products it may be compared with
    "triplet": (set_triplet_loss, eager_triplet, 1),
    "infonce": (set_infonce_loss, eager_infonce, 4),
    "sigmoid": (set_sigmoid_loss, eager_sigmoid, 4),
}
B, K, D = 4096, 4, 256
ROOT = Path(__file__).parent.parent
GIB = 1 << 30


@pytest.mark.parametrize("name", LOSSES)
def test_forward_and_backward(benchmark: BenchmarkFixture, name: str) -> None:
    ours, eager, products = LOSSES[name]
    x, y = (unit_sets(B, K, D, torch.float32, "cpu").requires_grad_() for _ in range(2))
    x_flat, y_flat = x.detach().flatten(0, 1), y.detach().flatten(0, 1)
    piece = 2048  # rows: the products' results are not what is measured

    def floor() -> None:
        for _ in range(products):
            for start in range(0, B * K, piece):
                x_flat[start : start + piece] @ y_flat.T

    def step(loss: Callable[[Tensor, Tensor], Tensor]) -> Function:
        return lambda: torch.autograd.grad(loss(x, y), (x, y))

    row = Row(
        f"set_{name}_loss",
        f"forward + backward {B}x{B} K{K} D{D} float32 cpu",
        1.2,
        "one product" if products == 1 else "four products",
    )
    measure(
        benchmark,
        row,
        ours=step(ours),
        floor=floor,
        peers={"eager": step(eager), "compiled": step(torch.compile(eager, dynamic=False))},
        operations=2.0 * products * (B * K) ** 2 * D,
        rounds=5,
        peer_rounds=1,
    )


MEMORY = """
import sys, torch
from benchmarks.memory import peak_beyond_inputs_and_results
from benchmarks.test_losses import LOSSES
from benchmarks.test_smooth_chamfer import unit_sets
name, form, n, d = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
loss = LOSSES[name][form == "eager"]
def step(n):
    x, y = (unit_sets(n, 4, d, torch.float32, "cpu").requires_grad_() for _ in range(2))
    return (x, y), lambda: torch.autograd.grad(loss(x, y), (x, y))
step(64)[1]()
inputs, run = step(n)
print(peak_beyond_inputs_and_results(run))
"""


def _peak(*arguments: str) -> float:
    command = [sys.executable, "-c", MEMORY, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr
    return float(run.stdout)


@pytest.mark.parametrize("n", [4096, 16384])
@pytest.mark.parametrize("name", LOSSES)
def test_peak_memory(name: str, n: int) -> None:
    row = Row(f"set_{name}_loss", f"peak memory, forward + backward {n}x{n} K{K} D{D} float32 cpu", None, "")
    row.memory_mib, row.limit_mib = _peak(name, "ours", str(n), str(D)), 96.0
    ROWS.append(row)


LARGEST = """
import resource, sys, torch
from benchmarks.peers import eager_infonce
from benchmarks.test_smooth_chamfer import unit_sets
form, n, limit = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
loss = eager_infonce if form == "eager" else torch.compile(eager_infonce, dynamic=False)
x, y = (unit_sets(n, 4, 1024, torch.float32, "cpu").requires_grad_() for _ in range(2))
torch.autograd.grad(loss(x, y), (x, y))
"""


def _fits(form: str, n: int) -> bool:
    """Whether a step with batch n ends within 20 GiB."""
    command = [sys.executable, "-c", LARGEST, form, str(n), str(20 * GIB)]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0 or "memory" in run.stderr or run.returncode < 0, run.stderr
    return run.returncode == 0


def _largest(form: str, step: int = 512) -> int:
    """The largest multiple of `step` that fits: memory grows with the square, so one measurement says where to look."""
    peak = _peak("infonce", "eager", "2048", "1024") * (1 << 20)
    n = int(2048 * (20 * GIB / peak) ** 0.5) // step * step
    while not _fits(form, n):
        n -= step
    while _fits(form, n + step):
        n += step
    return n


@pytest.mark.slow
def test_largest_batch() -> None:
    """InfoNCE, forward and backward, K 4, D 1024, float32, in 20 GiB. Ours is inputs, gradients and the working memory
    that `test_peak_memory` finds flat; running it would take over ten minutes."""
    working = _peak("infonce", "ours", "4096", "1024") * (1 << 20)
    each = 2 * 2 * K * 1024 * 4  # two sides, vectors and gradients
    batches = {"eager": _largest("eager"), "compiled": _largest("compiled")}
    batches["ours"] = int((20 * GIB - working) // each)
    row = Row("set_infonce_loss", "largest batch in 20 GiB, K4 D1024 float32 cpu", None, "")
    row.batches = batches
    ROWS.append(row)
