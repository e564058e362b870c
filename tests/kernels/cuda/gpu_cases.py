"""What `make gpu` runs: the compiled CUDA C++ kernels of every op on a GPU, against the tables of cases.

Without a GPU the same, with emulated kernels behind the same binding: `test_gpu_cases` tries some of it. In a process
of its own, since ops can be registered once.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from setemb_kernels.ops.slot_attention import cuda as slot_attention
from setemb_kernels.ops.smooth_chamfer import cuda as smooth_chamfer
from tests.kernels.slot_attention import cases as slot_cases
from tests.kernels.smooth_chamfer import cases as set_cases

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(scope="module", autouse=True)
def registered() -> None:
    if DEVICE == "cpu":
        from tests.kernels.cuda.test_binding import register_emulated

        register_emulated()
    else:
        assert importlib.import_module("setemb_kernels.backends").cuda_absent() == ""


def table(cases: ModuleType, fits: Any) -> list[Any]:
    return [
        pytest.param(case, dtype, id=f"{case.name}-{str(dtype)[6:]}")
        for dtype in DTYPES
        for case in cases.cases(dtype)
        if fits(case)
    ]


def sets(i: set_cases.Inputs) -> tuple[Tensor, ...]:
    arguments = (i.x, i.y, i.alpha, i.x_mask, i.y_mask)
    return smooth_chamfer.forward(*arguments), *smooth_chamfer.backward(i.grad, *arguments, True, True, True)


def slots(i: slot_cases.Inputs) -> slot_cases.Results:
    return slot_cases.through(slot_attention, i)


@pytest.mark.parametrize(
    ("case", "dtype"), table(set_cases, lambda case: max(case.K, case.L) <= smooth_chamfer.MAX_VECTORS)
)
def test_smooth_chamfer(case: set_cases.Case, dtype: torch.dtype) -> None:
    set_cases.check(sets, case, dtype, DEVICE)


@pytest.mark.parametrize(("case", "dtype"), table(slot_cases, lambda case: case.K <= slot_attention.MAX_SLOTS))
def test_slot_attention(case: slot_cases.Case, dtype: torch.dtype) -> None:
    slot_cases.check(slots, case, dtype, DEVICE)


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", ["paper", "odd sizes", "masks"])
def test_hardest_negatives(name: str, grouped: bool) -> None:
    """Those that sorting the same kernels' similarities gives."""
    i = {case.name: case for case in set_cases.CASES}[name].build(torch.float32, DEVICE)
    x, y = (torch.arange(n, device=DEVICE) % (3 if grouped else n) for n in i.grad.shape)
    s = smooth_chamfer.forward(*i[:5]).masked_fill(x[:, None] == y, -torch.inf)
    for got, negatives in zip(smooth_chamfer.hardest(*i[:5], x, y), (s, s.T), strict=True):
        best = negatives.amax(1)
        assert torch.equal(got.value, best)
        first = (negatives == best[:, None]).int().argmax(1)
        assert torch.equal(got.who, torch.where(best.isfinite(), first, -1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", ["smooth_chamfer", "slot_attention"])
def test_the_same_bits_each_time(op: str, dtype: torch.dtype) -> None:
    if op == "smooth_chamfer":
        inputs: Any = set_cases.CASES[0].build(dtype, DEVICE)
        run: Any = sets
    else:
        inputs, run = slot_cases.Case("", 2, 2, 5, 200, 72, 40, shared=True, bias=True).build(dtype, DEVICE), slots
    first = run(inputs)
    for got, expected in zip(run(inputs), first, strict=True):
        assert torch.equal(got, expected)


if DEVICE == "cuda":

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("op", ["smooth_chamfer", "slot_attention"])
    def test_in_a_graph(op: str, dtype: torch.dtype) -> None:
        """Captured on a stream of its own, replayed on new values."""
        if op == "smooth_chamfer":
            inputs: Any = set_cases.CASES[0].build(dtype, DEVICE)
            others, run = set_cases.CASES[0].build(dtype, DEVICE, seed=1), sets
        else:
            case = slot_cases.Case("", 2, 2, 5, 200, 72, 40, shared=True, bias=True)
            inputs, others, run = case.build(dtype, DEVICE), case.build(dtype, DEVICE, seed=1), slots  # type: ignore
        run(inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = run(inputs)
        for t, other in zip(inputs, others, strict=True):
            if isinstance(t, Tensor) and t.device.type == "cuda":
                t.copy_(other)
        graph.replay()
        for got, expected in zip(results, run(others), strict=True):
            assert torch.equal(got, expected)
