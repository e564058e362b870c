"""The CUDA C++ kernels of smooth_chamfer, run on the host: every case of the table, threads in several orders.

The kernels' source and the Python host code are those that a GPU would run; the plain products of the backward are
torch's on the CPU. Each launch may read its inputs and write its outputs, nothing else, and every element of an output
exactly once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from setemb_kernels.ops.smooth_chamfer import cuda as backend
from tests.kernels.cuda.emulate import ORDERS, Emulator, compiler, view
from tests.kernels.guarded_memory import guarded_memory  # noqa: F401
from tests.kernels.smooth_chamfer.cases import CASES, Case, Inputs, cases, check, reference_results

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

NAMED = {case.name: case for case in CASES}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FITS = {dtype: [c for c in cases(dtype) if max(c.K, c.L) <= backend.MAX_VECTORS] for dtype in DTYPES}
TABLE = [pytest.param(c, dtype, id=f"{c.name}-{str(dtype)[6:]}") for dtype in DTYPES for c in FITS[dtype]]


class Kernels:
    """What ``torch.ops.setemb_cuda`` is on a GPU."""

    def __init__(self, emulator: Emulator, order: int) -> None:
        self.emulator, self.order = emulator, order
        self.launches = 0

    def smooth_chamfer_pack(
        self, v: Tensor, mask: Tensor | None, rows: Tensor, valid: Tensor, stats: Tensor, *numbers: int
    ) -> None:
        self._call("smooth_chamfer_pack", [v, mask], [rows, valid, stats], [v, mask, rows, valid, stats, *numbers])

    def smooth_chamfer_forward(self, *arguments: Any) -> None:
        *operands, out, _, device_alpha = arguments[:9]
        self._call("smooth_chamfer_forward", [*operands, device_alpha], [out], arguments)

    def smooth_chamfer_weights(self, *arguments: Any) -> None:
        *inputs, chunk, alpha_parts, _, device_alpha = arguments[:12]
        x_first, y_first, x_groups, y_groups, _ = arguments[-5:]
        parts = None
        if alpha_parts is not None:
            parts = alpha_parts[x_first : x_first + x_groups, y_first : y_first + y_groups]
        self._call("smooth_chamfer_weights", [*inputs, device_alpha], [chunk, parts], arguments)

    def smooth_chamfer_unpack(self, *arguments: Any) -> None:
        sums, mask, stats, exponents, out, _, first, last, _, _ = arguments
        self._call("smooth_chamfer_unpack", [sums, mask, stats, exponents], [out[first:last]], arguments)

    def _call(self, name: str, inputs: list[Tensor | None], outputs: list[Tensor | None], arguments: Any) -> None:
        self.emulator.reset(self.order)
        for t in inputs:
            self.emulator.register(t)
        for t in outputs:
            self.emulator.register(t, writable=True)
        self.emulator.call(name, *(view(a) if a is None or isinstance(a, Tensor) else a for a in arguments))
        for t in outputs:
            if t is not None and t.numel():
                covers = t.numel() == 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
                assert self.emulator.writes(t) == (int(covers), 1), f"{name}: not every element is written once"
        phases, conflicts, _ = self.emulator.counts()
        assert conflicts == 0, f"{name}: {conflicts} of {phases} reads of shared memory meet in a bank"
        self.launches += 1


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator(Path(__file__).parents[1] / "cuda/smooth_chamfer.cpp")


@pytest.fixture
def kernels(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    found = Kernels(emulator, 0)
    monkeypatch.setattr(backend, "_kernels", lambda: found)
    return found


def run(i: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (i.x, i.y, i.alpha, i.x_mask, i.y_mask)
    return backend.forward(*arguments), *backend.backward(i.grad, *arguments, True, True, True)


def without_alpha(i: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Where alpha needs no gradient, W may come without shifts."""
    arguments = (i.x, i.y, i.alpha, i.x_mask, i.y_mask)
    grad_x, grad_y, none = backend.backward(i.grad, *arguments, True, True, False)
    assert none.shape == (0,)
    return backend.forward(*arguments), grad_x, grad_y, reference_results(i)[3]


@pytest.mark.parametrize(("case", "dtype"), TABLE)
def test_table(case: Case, dtype: torch.dtype, kernels: Kernels) -> None:
    check(run, case, dtype)
    check(without_alpha, case, dtype)
    assert kernels.launches or 0 in (case.N, case.M, case.K, case.L)


@pytest.mark.parametrize("order", ORDERS[1:])
@pytest.mark.parametrize("name", ["odd sizes", "empty sets among others", "K 64 L 5", "K 2 L 7", "one far outlier"])
def test_every_order_of_threads_gives_the_same(name: str, order: int, kernels: Kernels) -> None:
    inputs = NAMED[name].build(torch.bfloat16)
    forwards = run(inputs)
    kernels.order = order
    for got, expected in zip(run(inputs), forwards, strict=True):
        assert torch.equal(got, expected)
