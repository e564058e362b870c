"""The CUDA C++ kernels of slot_attention, run on the host: every case of the table, threads in several orders.

The kernels' source and the Python host code are those that a GPU would run. Each launch may read its inputs and write
its outputs, nothing else, and every element of an output exactly once.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from setemb_kernels import _triton
from setemb_kernels.ops.slot_attention import cuda as backend
from setemb_kernels.ops.slot_attention import reference
from tests.kernels.cuda.emulate import ORDERS, Emulator, compiler, view
from tests.kernels.guarded_memory import guarded_memory  # noqa: F401
from tests.kernels.slot_attention.cases import CASES, Case, Inputs, Results, cases, check, reference_results, through

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

NAMED = {case.name: case for case in CASES}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TABLE = [pytest.param(case, dtype, id=f"{case.name}-{str(dtype)[6:]}") for dtype in DTYPES for case in cases(dtype)]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)


class Kernels:
    """What ``torch.ops.setemb_cuda`` is on a GPU."""

    def __init__(self, emulator: Emulator) -> None:
        self.emulator, self.order = emulator, 0
        self.launched: list[str] = []
        self.products = 0

    def slot_attention_weights(self, *arguments: Any) -> None:
        q, k, bias, mask, weights, sums = arguments[:6]
        self._call("slot_attention_weights", [q, k, bias, mask], [weights, sums], arguments)

    def slot_attention_logit_gradients(self, *arguments: Any) -> None:
        *inputs, weights, by_logit, sums = arguments[:12]
        self._call("slot_attention_logit_gradients", inputs, [weights, by_logit, sums], arguments)

    def slot_attention_gather(self, *arguments: Any) -> None:
        weights, tokens, mask, factors, sums, out, total, partial = arguments[:8]
        self._call("slot_attention_gather", [weights, tokens, mask, factors, sums], [out, total, partial], arguments)
        self.launched += ["slot_attention_combine"] * (partial is not None)

    def slot_attention_spread(self, *arguments: Any) -> None:
        weights, slots, mask, factors, out = arguments[:5]
        self._call("slot_attention_spread", [weights, slots, mask, factors], [out], arguments)

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
        phases, conflicts, products = self.emulator.counts()
        assert conflicts == 0, f"{name}: {conflicts} of {phases} reads of shared memory meet in a bank"
        self.launched.append(name)
        self.products += products


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator(Path(__file__).parents[1] / "cuda/slot_attention.cpp")


@pytest.fixture
def kernels(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    found = Kernels(emulator)
    monkeypatch.setattr(backend, "_kernels", lambda: found)
    return found


def run(i: Inputs) -> Results:
    return through(backend, i)


@pytest.mark.parametrize(("case", "dtype"), TABLE)
def test_table(case: Case, dtype: torch.dtype, kernels: Kernels) -> None:
    check(run, case, dtype)
    if case.B and case.H and case.K:
        assert {"slot_attention_weights", "slot_attention_gather", "slot_attention_spread"} <= set(kernels.launched)
        multiplied = case.T and max(case.Dk, case.Dv)
        assert bool(kernels.products) == bool(multiplied and dtype != torch.float32)
