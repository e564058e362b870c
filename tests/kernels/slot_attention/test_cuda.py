"""The CUDA C++ kernels of slot_attention, run on the host: every case of the table, threads in several orders.

The kernels' source and the Python host code are those that a GPU would run. Each launch may read its inputs and write
its outputs, nothing else, and every element of an output exactly once.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from setemb_kernels import _cuda, _device, use_backend
from setemb_kernels.ops.slot_attention import cuda as backend
from setemb_kernels.ops.slot_attention import op, reference
from tests.kernels.cuda.emulate import ORDERS, Emulator, compiler, view
from tests.kernels.guarded_memory import guarded_memory  # noqa: F401
from tests.kernels.slot_attention.cases import (
    CASES,
    Case,
    Inputs,
    Results,
    cases,
    check,
    judge_in_tf32,
    reference_results,
    through,
)
from tests.kernels.tf32 import rounded_to_tf32

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

NAMED = {case.name: case for case in CASES}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TABLE = [pytest.param(case, dtype, id=f"{case.name}-{str(dtype)[6:]}") for dtype in DTYPES for case in cases(dtype)]
EACH_DTYPE = pytest.mark.parametrize("dtype", DTYPES, ids=str)
EACH_ARITHMETIC = pytest.mark.parametrize(
    ("dtype", "precision"), [*((dtype, "ieee") for dtype in DTYPES), (torch.float32, "tf32")], indirect=["precision"]
)


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
    monkeypatch.setattr(_cuda, "kernels", lambda: found)
    return found


@pytest.fixture
def precision(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch may use for products of float32; the judge does likewise."""
    monkeypatch.setattr(_device, "precision", lambda: request.param)
    if request.param == "tf32":
        judge_in_tf32(monkeypatch)


def run(i: Inputs) -> Results:
    return through(backend, i)


@pytest.mark.parametrize(("case", "dtype"), TABLE)
def test_table(case: Case, dtype: torch.dtype, kernels: Kernels) -> None:
    check(run, case, dtype)
    if case.B and case.H and case.K:
        assert {"slot_attention_weights", "slot_attention_gather", "slot_attention_spread"} <= set(kernels.launched)
        multiplied = case.T and max(case.Dk, case.Dv)
        assert bool(kernels.products) == bool(multiplied and dtype != torch.float32)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("precision", ["tf32"], indirect=True)
def test_tf32(case: Case, kernels: Kernels) -> None:
    """The judge is eager PyTorch in tf32: every product, forward and backward, of operands that are rounded."""
    check(run, case, torch.float32)
    assert bool(kernels.products) == bool(case.B and case.H and case.K and case.T and max(case.Dk, case.Dv))


@pytest.mark.usefixtures("precision")
@EACH_ARITHMETIC
@pytest.mark.parametrize(
    "case",
    [
        Case("several blocks of heads", 2, 5, 24, 40, 20, 36, shared=True, bias=True, mask="random"),
        Case("several blocks of heads, few slots", 1, 35, 2, 20, 16, 16, shared=True, mask="tail"),
        Case("48 rows", 2, 3, 16, 70, 24, 8, shared=True, bias=True),
        Case("64 slots, two heads", 1, 2, 64, 65, 40, 24, shared=True, mask="random"),
        Case("several blocks of features", 1, 2, 4, 70, 300, 150, shared=True, mask="random"),
        Case("more steps than stages", 1, 1, 5, 130, 264, 72, mask="tail"),
        Case("classic normalisation of what no token chose", 2, 2, 4, 33, 24, 24, norm=300.0, eps=0.0, token_eps=1e-8),
        Case("token_eps above 1", 2, 2, 4, 33, 24, 24, eps=0.0, token_eps=3.0),
    ],
    ids=lambda case: case.name,
)
def test_tiles(case: Case, dtype: torch.dtype, kernels: Kernels) -> None:
    """What tiles and ranges of this backend call for."""
    check(run, case, dtype)


@pytest.mark.usefixtures("precision")
@EACH_ARITHMETIC
@pytest.mark.parametrize("name", ["many tokens", "bias, shared, masked", "heads first", "all masked, no eps", "Dv 1"])
def test_splits(name: str, dtype: torch.dtype, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """More blocks of threads than a small call has by itself: each takes a part of the tokens."""
    monkeypatch.setattr(_device, "processors", lambda x: (32, 90))
    monkeypatch.setattr(backend, "SPLIT_TOKENS", 1)
    check(run, replace(NAMED[name], T=300 if name == "many tokens" else 140), dtype)
    assert kernels.launched.count("slot_attention_combine") == 2  # out and q.grad


@EACH_DTYPE
@pytest.mark.parametrize("name", ["mask, shared", "bias", "heads first"])
def test_few_items_at_a_time(name: str, dtype: torch.dtype, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    case = NAMED[name]
    item = case.H * case.K * 64 * dtype.itemsize
    monkeypatch.setattr(backend, "WORKSPACE_BYTES", 5 * item)  # two items in the backward pass
    check(run, case, dtype)
    assert kernels.launched.count("slot_attention_logit_gradients") == -(-case.B // 2)


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("order", ORDERS[1:])
@EACH_ARITHMETIC
@pytest.mark.parametrize("name", ["odd sizes", "64 slots", "masked NaN and inf, shared", "sliced", "more steps"])
def test_every_order_of_threads_gives_the_same(
    name: str, dtype: torch.dtype, order: int, kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_device, "processors", lambda x: (32, 90))
    monkeypatch.setattr(backend, "SPLIT_TOKENS", 64)
    case = NAMED.get(name) or Case(name, 1, 2, 5, 200, 168, 72, shared=True, bias=True, mask="random")
    inputs = case.build(dtype)
    forwards = run(inputs)
    kernels.order = order
    for got, expected in zip(run(inputs), forwards, strict=True):
        assert torch.equal(got, expected)


@EACH_DTYPE
@pytest.mark.parametrize("layout", ["sliced", "transposed", "heads first"])
def test_a_layout_that_cannot_be_copied_in_chunks_gives_the_same(
    layout: str, dtype: torch.dtype, kernels: Kernels
) -> None:
    case = Case("chunks", 2, 3, 4, 70, 40, 24, shared=True, mask="random", bias=True)
    chunked, plain = case.build(dtype), replace(case, layout=layout).build(dtype)
    assert plain.q.stride() != chunked.q.stride()
    results, expected = run(plain), run(chunked)
    for n in (0, 3):  # the update and the gradient of v; torch's sum in the others depends on the layout
        assert torch.equal(results[n], expected[n])


@EACH_DTYPE
@pytest.mark.parametrize("which", ["q", "k", "v", "grad"])
@pytest.mark.parametrize("axis", [1, 2])
def test_strides_that_are_not_aligned(axis: int, which: str, dtype: torch.dtype, kernels: Kernels) -> None:
    """The first row is, and features are adjacent: only a stride says that others are not."""
    inputs = Case("", 2, 2, 4, 70, 24, 16).build(dtype)
    t = getattr(inputs, which)
    sizes = [t.shape[0], t.shape[1], t.shape[2], t.shape[3]]
    strides = list(t.stride())
    strides[axis] += 1
    strides[0] = sizes[1] * (strides[1] + sizes[2] * (axis == 2))
    strides[1] += sizes[2] * (axis == 2)
    memory = torch.full((sizes[0] * strides[0],), float("nan"), dtype=dtype)
    moved = memory.as_strided(sizes, strides).copy_(t)
    results, expected = run(inputs._replace(**{which: moved})), run(inputs)
    for n in (0, 3):
        assert torch.equal(results[n], expected[n])


@EACH_DTYPE
@pytest.mark.parametrize("needed", range(4))
def test_each_gradient_alone(needed: int, dtype: torch.dtype, kernels: Kernels) -> None:
    i = NAMED["bias, shared, masked"].build(dtype)
    out, total = backend.forward(*i[:-1])
    arguments = (i.grad, *i[:5], out, total, i.scale, i.token_eps)
    every = backend.backward(*arguments, True, True, True, True)
    some = backend.backward(*arguments, *(n == needed for n in range(4)))
    for n, (got, expected) in enumerate(zip(some, every, strict=True)):
        assert got.shape == (expected.shape if n == needed else (0,))
        if n == needed:
            assert torch.equal(got, expected)
    assert all(t.shape == (0,) for t in backend.backward(*arguments, False, False, False, False))


@pytest.mark.parametrize("name", ["heads first", "transposed", "paper", "expanded over items"])
def test_memory_order(name: str, kernels: Kernels) -> None:
    """As that of the reference, which is what tracing is told."""
    i = NAMED[name].build(torch.float32)
    out, total = backend.forward(*i[:-1])
    assert i.v is not None
    grad_q, grad_k, grad_v, _ = backend.backward(
        i.grad, *i[:5], out, total, i.scale, i.token_eps, True, True, True, False
    )
    assert out.stride() == reference.empty_like_slots(i.q, i.v.shape[3]).stride()
    assert grad_q.stride() == reference.empty_like_slots(i.q, i.q.shape[3]).stride()
    assert grad_k.is_contiguous() and grad_v.is_contiguous() and total.is_contiguous()
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, reference.forward(*i[:-1])[1])


@pytest.mark.usefixtures("precision")
@pytest.mark.parametrize("precision", ["ieee", "tf32"], indirect=True)
@pytest.mark.parametrize("name", ["paper", "paper, absorbed"])
@pytest.mark.parametrize("where", ["q", "k", "v", "grad"])
def test_nan_stays_with_its_item(name: str, where: str, kernels: Kernels) -> None:
    clean = NAMED[name].build(torch.float32)
    tokens = torch.ones(5, clean.k.shape[2], dtype=torch.bool)
    tokens[:, -1] = False
    i = clean._replace(mask=tokens, **{where: getattr(clean, where).clone()})
    getattr(i, where)[3, 0, 2, 5] = float("nan")
    results, expected = run(i), run(clean._replace(mask=tokens))
    others = torch.arange(5) != 3
    for n, (got, truth) in enumerate(zip(results, expected, strict=True)):
        assert torch.equal(got[others], truth[others])
        if n in (2, 3):  # those of k and v
            assert (got[:, :, -1] == 0).all()
    assert any(got[3].isnan().any() for got in results)


def test_tf32_rounds_operands_to_the_nearest(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor cores would cut them, which is a bias: logits and values of one sign show it."""
    i = Case("", 2, 2, 4, 70, 40, 24).build(torch.float32)
    assert i.v is not None
    i = i._replace(q=i.q.abs(), k=i.k.abs(), v=i.v.abs())
    monkeypatch.setattr(_device, "precision", lambda: "tf32")
    out, _ = backend.forward(*i[:-1])
    rounded = i._replace(q=rounded_to_tf32(i.q), k=rounded_to_tf32(i.k), v=rounded_to_tf32(i.v))
    truth, _ = reference.forward(*(t.double() if isinstance(t, Tensor) else t for t in rounded[:-1]))
    assert ((out - truth) / truth).mean().abs() < 2e-5  # weights are rounded, too, which leaves no bias
    assert ((out - truth) / truth).abs().max() < 2**-11


@pytest.mark.parametrize(("grad", "v", "q", "scale"), [(12, 3, 0, -12), (-12, -6, -8, 8)])
def test_logit_gradients_out_of_range(grad: int, v: int, q: int, scale: int, kernels: Kernels) -> None:
    """In float16, where the gradients of logits would overflow or vanish, but those of the inputs don't."""
    i = Case("", 2, 2, 4, 3, 16, 64).build(torch.float16)
    assert i.v is not None
    i = i._replace(grad=i.grad * 2.0**grad, v=i.v * 2.0**v, q=i.q * 2.0**q, scale=2.0**scale)
    _check_rows(i, range(4))


def test_slot_that_hardly_any_token_chose(kernels: Kernels) -> None:
    """Its mean is one of weights that float16 would round to 0. (Its gradients of q and bias are differences.)"""
    i = Case("", 2, 2, 4, 40, 16, 20, bias=True, eps=0.0).build(torch.float16)
    assert i.bias is not None
    i.bias[:, :, 1] = -18
    _check_rows(i, (0, 3))


def _check_rows(i: Inputs, which: Iterable[int]) -> None:
    """Compare with the reference slot by slot, or token by token: an error may be small beside another's values."""
    double = Inputs(*(t.double() if isinstance(t, Tensor) else t for t in i))
    results, truths = run(i), reference_results(double)
    for n in which:
        size = truths[n].abs().amax((0, 1, 3), keepdim=True)
        assert ((results[n].double() - truths[n]).abs() <= size * 2**-7).all()


def test_what_it_does_not_take() -> None:
    assert backend.refusal(torch.zeros(1, 1, 64, 4)) == ""
    assert backend.refusal(torch.zeros(1, 1, 65, 4)) == "q: expected at most 64 slots, got 65"
    double = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    assert backend.refusal(double) == "q: expected float32, bfloat16 or float16, got float64"


def test_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """It serves, or raises."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.import_module("setemb_kernels.backends"), "_CUDA", {"absent": ""})
    q: Any = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16, shape=(1, 1, 64, 8))
    with use_backend("slot_attention", implementation="cuda"):
        assert op.BACKENDS.implementation(reference, q) is backend
        q.shape = (1, 1, 65, 8)
        with pytest.raises(ValueError, match=r"CUDA C\+\+ kernel cannot serve: q: expected at most 64 slots, got 65"):
            op.BACKENDS.implementation(reference, q)
