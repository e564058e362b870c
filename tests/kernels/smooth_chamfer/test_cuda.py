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

from setemb_kernels import _cuda, _device, set_triplet_loss
from setemb_kernels.ops.smooth_chamfer import cuda as backend
from setemb_kernels.ops.smooth_chamfer.op import BACKENDS
from tests.kernels.cuda.emulate import ORDERS, Emulator, compiler, view
from tests.kernels.guarded_memory import guarded_memory  # noqa: F401
from tests.kernels.smooth_chamfer import cases as table
from tests.kernels.smooth_chamfer.cases import CASES, Case, Inputs, cases, check, check_wide, reference_results
from tests.kernels.tf32 import rounded_to_tf32

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

    def smooth_chamfer_hardest(self, *arguments: Any) -> None:
        *inputs, best_x, best_y, _, device_alpha = arguments[:12]
        self.emulator.reset(self.order)
        for t in (*inputs, device_alpha):
            self.emulator.register(t)
        for t in (best_x, best_y):
            self.emulator.register(t, writable=True)
        self._run("smooth_chamfer_hardest", arguments)

    def smooth_chamfer_weights(self, *arguments: Any) -> None:
        *inputs, chunk, alpha_parts, _, device_alpha = arguments[:12]
        x_first, y_first, x_groups, y_groups, *_ = arguments[-6:]
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
        self._run(name, arguments)
        for t in outputs:
            if t is not None and t.numel():
                covers = t.numel() == 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
                assert self.emulator.writes(t) == (int(covers), 1), f"{name}: not every element is written once"

    def _run(self, name: str, arguments: Any) -> None:
        self.emulator.call(name, *(view(a) if a is None or isinstance(a, Tensor) else a for a in arguments))
        phases, conflicts, _ = self.emulator.counts()
        assert conflicts == 0, f"{name}: {conflicts} of {phases} reads of shared memory meet in a bank"
        self.launches += 1


@pytest.fixture(scope="module")
def emulator() -> Emulator:
    return Emulator(Path(__file__).parents[1] / "cuda/smooth_chamfer.cpp")


@pytest.fixture
def kernels(emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Kernels:
    found = Kernels(emulator, 0)
    monkeypatch.setattr(_cuda, "kernels", lambda: found)
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


@pytest.mark.parametrize("name", ["odd sizes", "larger than a tile", "empty sets among others", "alpha 1e4", "no x"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_in_float32_out(name: str, dtype: torch.dtype, kernels: Kernels) -> None:
    def wide(i: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        arguments = (i.x, i.y, i.alpha, i.x_mask, i.y_mask)
        return backend.forward(*arguments, wide=True), *backend.backward(i.grad, *arguments, True, True, True)

    check_wide(wide, NAMED[name], dtype)


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


@pytest.mark.parametrize("name", ["odd sizes", "larger than a tile", "K 64 L 5", "masks", "alpha 1e4", "D 1031"])
def test_tf32(name: str, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge is eager PyTorch in tf32: in float32 arithmetic, on operands rounded to tf32."""
    monkeypatch.setattr(_device, "precision", lambda: "tf32")
    eager = table._eager_in_another_order

    def in_tf32(i: Inputs, order: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return eager(i._replace(x=rounded_to_tf32(i.x), y=rounded_to_tf32(i.y)), order)

    monkeypatch.setattr(table, "_eager_in_another_order", in_tf32)
    check(run, NAMED[name], torch.float32)
    check(without_alpha, NAMED[name], torch.float32)


def test_tf32_rounds_operands_to_the_nearest(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensor cores would cut them, which is a bias."""
    monkeypatch.setattr(_device, "precision", lambda: "tf32")
    i = NAMED["one vector a set"].build(torch.float32)
    scores = backend.forward(*i[:5])
    x, y = (rounded_to_tf32(v).double().flatten(1) for v in (i.x, i.y))
    steps = 9  # sums of 8 products, each cut below the last bit of a number up to 1
    torch.testing.assert_close(scores.double(), x @ y.T, rtol=0, atol=steps * 2**-23)
    assert (scores.double() - i.x.double().flatten(1) @ i.y.double().flatten(1).T).abs().max() > 1e-5


@pytest.mark.parametrize("name", ["larger than a tile", "many rows", "one against many", "masks"])
def test_several_chunks(name: str, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "WORKSPACE_BYTES", 1 << 17)
    monkeypatch.setattr(backend, "CHUNK_COLUMNS", 128)
    check(run, NAMED[name], torch.float16)
    assert kernels.launches > 10 or name in ("one against many", "masks")


def test_alpha_on_the_device(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value is read by the kernels, through a pointer."""
    monkeypatch.setattr(backend, "_on_host", lambda alpha: False)
    for name in ("masks", "alpha 1e30", "alpha 0.01"):
        check(run, NAMED[name], torch.float32)


NEEDS = [(True, False, False), (False, True, False), (False, False, True), (False, True, True), (True, True, False)]


@pytest.mark.parametrize("name", ["masks", "K 2 L 7", "paper"])
@pytest.mark.parametrize("needs", NEEDS)
def test_each_gradient_alone(needs: tuple[bool, bool, bool], name: str, kernels: Kernels) -> None:
    i = NAMED[name].build(torch.float32)
    arguments = (i.grad, i.x, i.y, i.alpha, i.x_mask, i.y_mask)
    every = backend.backward(*arguments, True, True, True)
    some = backend.backward(*arguments, *needs)
    for need, got, expected in zip(needs, some, every, strict=True):
        assert got.shape == (expected.shape if need else (0,))
        if need:
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("unit", [False, True], ids=["any norm", "unit vectors"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("K", "L"), [(3, 3), (1, 1), (16, 2)])
def test_what_is_not_finite_reaches_only_its_own_pairs(
    K: int, L: int, value: float, unit: bool, kernels: Kernels
) -> None:
    i = Case("", 5, 90, K, L, 16, unit=unit).build(torch.float32)
    clean = backend.forward(*i[:5])
    clean_grad, _, _ = backend.backward(i.grad, *i[:5], True, False, False)
    i.x[2, K - 1, 4] = value
    s = backend.forward(*i[:5])
    grad, grad_y, _ = backend.backward(i.grad, *i[:5], True, True, False)
    assert s[2].isnan().all() and grad[2].isnan().all() and grad_y.isnan().all()
    others = torch.arange(5) != 2
    torch.testing.assert_close(s[others], clean[others])
    torch.testing.assert_close(grad[others], clean_grad[others])


def test_nan_gradient_stays_with_its_pair(kernels: Kernels) -> None:
    i = NAMED["paper"].build(torch.float32)
    i.grad[2, 7] = float("nan")
    grad_x, grad_y, _ = backend.backward(i.grad, *i[:5], True, True, False)
    for got, hit in ((grad_x, 2), (grad_y, 7)):
        assert got[hit].isnan().all()
        assert got[torch.arange(len(got)) != hit].isfinite().all()


@pytest.mark.parametrize("K", range(1, 65, 3))
def test_every_size_of_set(K: int, kernels: Kernels) -> None:
    """Each of them is padded to one of the sizes that are compiled."""
    check(run, Case(f"K {K}", 5, 7, K, max(1, 40 - K), 20, x_mask="random"), torch.float16)


def test_what_is_refused() -> None:
    x = torch.zeros(2, 65, 4)
    assert "at most 64 vectors, got 65 and 3" in backend.refusal(x, x[:, :3])
    assert "at most 64 vectors, got 3 and 65" in backend.refusal(x[:, :3], x)
    assert "float32, bfloat16 or float16, got float64" in backend.refusal(x[:, :3].double(), x[:, :3].double())
    assert backend.refusal(x[:, :64], x[:, :1]) == ""


def test_what_is_not_finite_next_to_an_empty_set(kernels: Kernels) -> None:
    i = Case("", 4, 6, 3, 2, 16).build(torch.float32)
    i.x[1, 2, 0] = float("nan")
    mask = torch.ones(6, 2, dtype=torch.bool)
    mask[4] = False
    s = backend.forward(i.x, i.y, i.alpha, None, mask)
    assert s[1, 4] == 0 and s[1].isnan().sum() == 5


def test_long_vectors_next_to_short_ones(kernels: Kernels) -> None:
    """Their products are ordinary, though one side is scaled."""
    i = NAMED["paper"].build(torch.float32)
    arguments = (i.alpha, i.x_mask, i.y_mask)
    scaled = (i.x * 2.0**100, i.y * 2.0**-100)
    torch.testing.assert_close(backend.forward(*scaled, *arguments), backend.forward(i.x, i.y, *arguments))
    expected = backend.backward(i.grad, i.x, i.y, *arguments, True, True, False)
    gradients = backend.backward(i.grad, *scaled, *arguments, True, True, False)
    for got, want, factor in zip(
        gradients[:2],
        expected,
        (2.0**100, 2.0**-100),
        strict=False,
    ):
        torch.testing.assert_close(got * factor, want)


HARDEST = [
    "odd sizes",
    "paper",
    "larger than a tile",
    "one vector a set",
    "one against many",
    "many against one",
    "one element",
    "K 2 L 7",
    "K 64 L 5",
    "K 5 L 64",
    "masks",
    "empty sets among others",
    "all masked",
    "ties",
    "alpha 1e30",
    "overflowing products",
    "one far outlier",
    "no y",
]


@pytest.mark.parametrize("order", ORDERS[:3])
@pytest.mark.parametrize("groups", ["", "few", "one"])
@pytest.mark.parametrize("name", HARDEST)
def test_hardest(name: str, groups: str, order: int, kernels: Kernels) -> None:
    """What sorting the same kernels' similarities would give, to the bit.

    But not for sets of one vector each, which go by exponentials and logarithms here: 2.5 units 2^-22 of a
    logarithm and one rounding of a number up to 23, over alpha log2(e) = 23.
    """
    kernels.order = order
    i = NAMED[name].build(torch.float32)
    N, M = i.grad.shape
    generator = torch.Generator().manual_seed(3)
    kinds = {"": 0, "few": 4, "one": 1}[groups]
    ids = [torch.randint(kinds, (n,), generator=generator) - 2**40 if kinds else None for n in (N, M)]
    s = backend.forward(*i[:5])
    x, y = (torch.arange(n) if own is None else own for n, own in zip((N, M), ids, strict=True))
    s[x[:, None] == y] = -float("inf")
    for got, negatives in zip(backend.hardest(*i[:5], *ids), (s, s.T), strict=True):
        for value, who, row in zip(got.value, got.who, negatives, strict=True):
            best = row.max() if len(row) else torch.tensor(-float("inf"))
            if name == "one vector a set" and who >= 0:
                assert abs(value - best) <= 2**-22 and row[who] >= best - 2**-21
            else:
                assert value == best
                assert who == (-1 if best == -float("inf") else (row == best).nonzero()[0, 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hardest_is_compared_in_float32(dtype: torch.dtype, kernels: Kernels) -> None:
    """Similarities that are equal in a 16-bit dtype are told apart."""
    i = NAMED["one vector a set"].build(dtype)
    s = i.x.double().flatten(1) @ i.y.double().flatten(1).T
    s.fill_diagonal_(-float("inf"))
    rows, columns = backend.hardest(*i[:5])
    assert torch.equal(rows.who, s.argmax(1)) and torch.equal(columns.who, s.argmax(0))
    torch.testing.assert_close(rows.value.double(), s.amax(1), rtol=0, atol=6 * 2**-23)  # steps of 16 features, cut


def test_hardest_leaves_out_what_is_not_a_number(kernels: Kernels) -> None:
    i = NAMED["paper"].build(torch.float32)
    i.x[3, 1, 5] = float("nan")
    s = backend.forward(*i[:5]).masked_fill(torch.eye(20, 100, dtype=torch.bool), -float("inf"))
    rows, columns = backend.hardest(*i[:5])
    assert rows.who[3] == -1 and rows.value[3] == -float("inf")
    s[3] = -float("inf")
    assert torch.equal(columns.who, s.argmax(0)) and torch.equal(columns.value, s.amax(0))


@pytest.mark.parametrize("groups", [False, True])
def test_the_triplet_loss_takes_the_kernel(groups: bool, kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    i = NAMED["paper"].build(torch.float32)
    y = i.y[:20]
    options = {"x_group": torch.arange(20, dtype=torch.int32) % 7, "y_group": torch.arange(20) % 7} if groups else {}

    def loss_and_gradient() -> tuple[Tensor, Tensor]:
        x = i.x.clone().requires_grad_()
        loss = set_triplet_loss(x, y, margin=0.3, **options)
        loss.backward()
        assert x.grad is not None
        return loss.detach(), x.grad

    expected = loss_and_gradient()
    monkeypatch.setattr(BACKENDS, "implementation", lambda reference, *tensors: backend)
    for got, want in zip(loss_and_gradient(), expected, strict=True):
        torch.testing.assert_close(got, want)
    assert kernels.launches == 3  # two packed, one launched; the backward visits winners only
