"""What `make gpu` runs: the compiled CUDA C++ kernels of every op on a GPU, against the tables of cases.

Without a GPU the same, with emulated kernels behind the same binding: `test_gpu_cases` tries some of it. In a process
of its own, since ops can be registered once.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from setemb_kernels.ops.slot_attention import cuda as slot_attention
from setemb_kernels.ops.smooth_chamfer import cuda as smooth_chamfer
from tests.kernels.slot_attention import cases as slot_cases
from tests.kernels.smooth_chamfer import cases as set_cases
from tests.kernels.tf32 import rounded_to_tf32

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMED = {case.name: case for case in set_cases.CASES}
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])


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


def without_alpha(i: set_cases.Inputs) -> tuple[Tensor, ...]:
    arguments = (i.x, i.y, i.alpha, i.x_mask, i.y_mask)
    grad_x, grad_y, none = smooth_chamfer.backward(i.grad, *arguments, True, True, False)
    assert none.shape == (0,)
    return smooth_chamfer.forward(*arguments), grad_x, grad_y, set_cases.reference_results(i)[3]


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


@EACH_DTYPE
@pytest.mark.parametrize("name", ["masks", "larger than a tile", "empty sets among others", "long vectors", "D 1031"])
def test_without_gradient_of_alpha(name: str, dtype: torch.dtype) -> None:
    """Where alpha needs none, W comes without shifts wherever scores are bounded."""
    set_cases.check(without_alpha, NAMED[name], dtype, DEVICE)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["masks", "odd sizes", "larger than a tile", "empty sets among others", "alpha 1e4"])
def test_16_bit_in_float32_out(name: str, dtype: torch.dtype) -> None:
    def wide(i: set_cases.Inputs) -> tuple[Tensor, ...]:
        arguments = (i.x, i.y, i.alpha, i.x_mask, i.y_mask)
        s = smooth_chamfer.forward(*arguments, wide=True)
        return s, *smooth_chamfer.backward(i.grad, *arguments, True, True, True)

    set_cases.check_wide(wide, NAMED[name], dtype, DEVICE)


@EACH_DTYPE
@pytest.mark.parametrize("name", ["larger than a tile", "many rows", "one against many"])
def test_several_chunks(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of W, whose products are added up."""
    monkeypatch.setattr(smooth_chamfer, "WORKSPACE_BYTES", 1 << 17)
    monkeypatch.setattr(smooth_chamfer, "CHUNK_COLUMNS", 128)
    set_cases.check(sets, NAMED[name], dtype, DEVICE)


@pytest.mark.parametrize("name", ["masks", "alpha 1e30", "alpha 0.01"])
def test_alpha_on_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value is read by the kernels, through a pointer."""
    monkeypatch.setattr(smooth_chamfer, "_on_host", lambda alpha: False)
    for run in (sets, without_alpha):

        def on_device(i: set_cases.Inputs, run: Any = run) -> tuple[Tensor, ...]:
            results: tuple[Tensor, ...] = run(i._replace(alpha=i.alpha.to(DEVICE)))
            return results

        set_cases.check(on_device, NAMED[name], torch.float32, DEVICE)


@pytest.mark.parametrize(
    "needs",
    [(True, False, False), (False, True, False), (False, False, True), (False, True, True), (True, True, False)],
)
def test_each_gradient_alone(needs: tuple[bool, bool, bool]) -> None:
    i = NAMED["masks"].build(torch.float32, DEVICE)
    arguments = (i.grad, i.x, i.y, i.alpha, i.x_mask, i.y_mask)
    every = smooth_chamfer.backward(*arguments, True, True, True)
    for need, got, expected in zip(needs, smooth_chamfer.backward(*arguments, *needs), every, strict=True):
        assert got.shape == (expected.shape if need else (0,))
        if need:
            torch.testing.assert_close(got, expected)


@pytest.fixture
def tf32() -> Iterator[None]:
    """Torch may use it."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("run", [sets, without_alpha])
@pytest.mark.parametrize("name", ["masks", "odd sizes", "alpha 1e4"])
def test_tf32(name: str, run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge is eager PyTorch, which may use it too, on operands rounded to tf32."""
    eager = set_cases._eager_in_another_order

    def in_tf32(i: set_cases.Inputs, order: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return eager(i._replace(x=rounded_to_tf32(i.x), y=rounded_to_tf32(i.y)), order)

    monkeypatch.setattr(set_cases, "_eager_in_another_order", in_tf32)
    monkeypatch.setattr(set_cases, "on_cpu", lambda inputs: inputs)
    set_cases.check(run, NAMED[name], torch.float32, DEVICE)
    inputs = NAMED[name].build(torch.float32, DEVICE)[:5]
    here = smooth_chamfer.forward(*inputs)
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert not torch.equal(here, smooth_chamfer.forward(*inputs))


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize("name", ["mask, shared", "odd sizes", "bias, shared, masked", "D 1031", "many tokens"])
def test_slot_attention_in_tf32(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = next(case for case in slot_cases.CASES if case.name == name)
    slot_cases.judge_in_tf32(monkeypatch)
    monkeypatch.setattr(slot_cases, "on_cpu", lambda inputs: inputs)
    slot_cases.check(slots, case, torch.float32, DEVICE)
    inputs = case.build(torch.float32, DEVICE)
    here, _ = slot_attention.forward(*inputs[:-1])
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert not torch.equal(here, slot_attention.forward(*inputs[:-1])[0])


@EACH_DTYPE
@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", ["paper", "odd sizes", "masks"])
def test_hardest_negatives(name: str, grouped: bool, dtype: torch.dtype) -> None:
    """Those that sorting the same kernels' similarities gives, in float32."""
    i = NAMED[name].build(dtype, DEVICE)
    x, y = (torch.arange(n, device=DEVICE) % (3 if grouped else n) for n in i.grad.shape)
    s = smooth_chamfer.forward(*i[:5], wide=True).masked_fill(x[:, None] == y, -torch.inf)
    for got, negatives in zip(smooth_chamfer.hardest(*i[:5], x, y), (s, s.T), strict=True):
        best = negatives.amax(1)
        assert torch.equal(got.value, best)
        first = (negatives == best[:, None]).int().argmax(1)
        assert torch.equal(got.who, torch.where(best.isfinite(), first, -1))


@EACH_DTYPE
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

    @EACH_DTYPE
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
