"""What `test_triton` runs in a process of its own: the case table, and what only this backend has.

On a GPU, or interpreted: then in float32 and float16, as numpy has no bfloat16. Inputs inside larger buffers of NaN
("sliced") and `guarded_memory` show accesses out of bounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton")

import triton.language as tl  # noqa: E402

from setemb_kernels import _device  # noqa: E402
from setemb_kernels.ops.smooth_chamfer import (  # noqa: E402
    reference,
    triton_config,
    triton_kernels,
    triton_light,
    triton_packing,
    triton_plan,
)
from setemb_kernels.ops.smooth_chamfer import triton as backend  # noqa: E402
from tests.kernels.compiled import compiled  # noqa: E402
from tests.kernels.guarded_memory import guarded_memory  # noqa: E402, F401
from tests.kernels.smooth_chamfer.cases import CASES, Case, Inputs, cases, check, check_wide, reference_results  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else []))
TABLE = [pytest.param(case, dtype, id=f"{case.name}-{str(dtype)[6:]}") for dtype in DTYPES for case in cases(dtype)]
NAMED = {case.name: case for case in CASES}


@pytest.fixture(autouse=True)
def both_variants(monkeypatch: pytest.MonkeyPatch) -> None:
    """As of calls of more scores than of any case here."""
    monkeypatch.setattr(triton_config, "LARGEST_LIGHT", 0)
    monkeypatch.setattr(triton_config, "LARGEST_ALONE", 0)


def run(i: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    arguments = (i.x, i.y, i.alpha, i.x_mask, i.y_mask)
    return backend.forward(*arguments), *backend.backward(i.grad, *arguments, True, True, True)


@pytest.mark.parametrize(("case", "dtype"), TABLE)
def test_table(case: Case, dtype: torch.dtype) -> None:
    check(run, case, dtype, DEVICE)


@pytest.mark.parametrize("name", ["odd sizes", "larger than a tile", "empty sets among others", "alpha 1e4", "no x"])
@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype != torch.float32])
def test_16_bit_in_float32_out(name: str, dtype: torch.dtype) -> None:
    def wide(i: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        arguments = (i.x, i.y, i.alpha, i.x_mask, i.y_mask)
        return backend.forward(*arguments, wide=True), *backend.backward(i.grad, *arguments, True, True, True)

    check_wide(wide, NAMED[name], dtype, DEVICE)


@pytest.mark.parametrize("largest_alone", [0, 1 << 24])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in ("larger than a tile", "empty sets among others", "overflowing products", "D 1031")
        for dtype in (torch.float32, torch.float16)
        if NAMED[name] in cases(dtype)
    ],
)
def test_without_gradient_of_alpha(
    name: str, dtype: torch.dtype, largest_alone: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where alpha needs none, W may come from the kernel that does not shift; of few scores from the other."""
    monkeypatch.setattr(triton_config, "LARGEST_ALONE", largest_alone)

    def without(i: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        arguments = (i.x, i.y, i.alpha, i.x_mask, i.y_mask)
        grad_x, grad_y, none = backend.backward(i.grad, *arguments, True, True, False)
        assert none.shape == (0,)
        return backend.forward(*arguments), grad_x, grad_y, reference_results(i)[3]

    check(without, NAMED[name], dtype, DEVICE)


LIGHT_DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
LIGHT = [
    case.name
    for case in cases(LIGHT_DTYPE)
    if triton_light.serves(case.N, case.K, case.M, case.L, case.D, torch.bfloat16, 90, backward=True)
    and not (case.x_mask or case.y_mask or case.layout)
]


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As of calls of few scores."""
    triton_light._plan.cache_clear()
    monkeypatch.setattr(triton_config, "LARGEST_LIGHT", 1 << 24)
    if DEVICE == "cpu":  # numpy has no bfloat16
        monkeypatch.setattr(triton_light, "TYPES", {False: (torch.float16, torch.float32), True: (torch.float32,)})
    yield
    triton_light._plan.cache_clear()


@pytest.mark.usefixtures("light")
@pytest.mark.parametrize("name", LIGHT)
def test_few_scores(name: str) -> None:
    """Unpacked, by kernels of their own."""

    def unpacked(i: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        arguments = (i.x, i.y, float(i.alpha), i.x_mask, i.y_mask)
        s = triton_light.forward(*arguments, i.x.dtype)
        gradients = triton_light.backward(i.grad, *arguments, True, True)
        assert s is not None and gradients is not None
        whole = (i.x, i.y, i.alpha, i.x_mask, i.y_mask)
        assert torch.equal(backend.forward(*whole), s)
        for got, expected in zip(backend.backward(i.grad, *whole, True, True, False), gradients, strict=False):
            assert torch.equal(got, expected)
        return s, *gradients, reference_results(i)[3]

    check(unpacked, NAMED[name], LIGHT_DTYPE, DEVICE)


@pytest.mark.usefixtures("light")
def test_few_scores_forward_alone() -> None:
    """Of a number of vectors that W's rows could not have; alpha on the device."""
    i = Case("", 9, 5, 4, 1, 24).build(LIGHT_DTYPE, DEVICE)
    alpha = torch.tensor(7.0, device=DEVICE)
    s = triton_light.forward(i.x, i.y, alpha, None, None, torch.float32)  # not rounded: one bound for all devices
    assert s is not None and triton_light.backward(i.grad, i.x, i.y, alpha, None, None, True, True) is None
    expected = reference.forward(i.x.double(), i.y.double(), alpha.double(), None, None)
    torch.testing.assert_close(s.double(), expected, rtol=1e-5, atol=1e-6)


def test_launches_are_of_the_dtype_of_alpha(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that lies on the device is read by the kernel."""
    i = NAMED["paper"].build(LIGHT_DTYPE, DEVICE)
    monkeypatch.setattr(triton_plan, "_plan", plans := lru_cache(triton_plan.Plan))
    for dtype in (torch.float32, torch.float64):
        for _ in range(2):
            triton_plan.plan_of(i.x, i.y, None, None, i.alpha.to(dtype), out=i.x.dtype)
    assert plans.cache_info().currsize == 2


def test_alpha_gradient_alone_of_16_bit() -> None:
    i = NAMED["paper"].build(torch.float16, DEVICE)
    arguments = (i.grad, i.x, i.y, i.alpha, i.x_mask, i.y_mask)
    alone = backend.backward(*arguments, False, False, True)
    assert alone[0].shape == alone[1].shape == (0,)
    torch.testing.assert_close(alone[2], backend.backward(*arguments, True, True, True)[2])


@pytest.mark.usefixtures("light")
def test_nan_stays_with_its_set_of_few() -> None:
    i = NAMED["K 8 L 8"].build(LIGHT_DTYPE, DEVICE)
    arguments = (i.y, float(i.alpha), None, None)
    clean = triton_light.forward(i.x, *arguments, i.x.dtype)
    assert clean is not None
    for value in (float("nan"), float("inf"), -float("inf")):
        x = i.x.clone()
        x[3, 1, 5] = value
        s = triton_light.forward(x, *arguments, i.x.dtype)
        assert s is not None and s[3].isnan().all()
        others = torch.arange(len(s)) != 3
        torch.testing.assert_close(s[others], clean[others])


@pytest.mark.parametrize("name", ["larger than a tile", "sliced", "K 16 L 3"])
def test_pointers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on chips without a bulk copy engine: another way to load, a grid of one program a tile."""
    monkeypatch.setattr(_device, "processors", lambda x: (2, 80))
    check(run, NAMED[name], torch.float16, DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["larger than a tile", "many rows"])
def test_several_chunks(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "WORKSPACE_BYTES", 1 << 18)
    monkeypatch.setattr(backend, "CHUNK_COLUMNS", 256)
    check(run, NAMED[name], dtype, DEVICE)


def test_alpha_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value is read by the kernels, through a pointer."""
    monkeypatch.setattr(backend, "_on_host", lambda alpha: False)

    def on_device(i: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return run(i._replace(alpha=i.alpha.to(DEVICE)))

    check(on_device, NAMED["masks"], torch.float32, DEVICE)
    check(on_device, NAMED["alpha 1e30"], torch.float32, DEVICE)


@pytest.mark.parametrize(
    "needs", [(True, False, False), (False, True, False), (False, False, True), (False, True, True)]
)
def test_each_gradient_alone(needs: tuple[bool, bool, bool]) -> None:
    i = NAMED["masks"].build(torch.float32, DEVICE)
    arguments = (i.grad, i.x, i.y, i.alpha, i.x_mask, i.y_mask)
    every = backend.backward(*arguments, True, True, True)
    some = backend.backward(*arguments, *needs)
    for need, got, expected in zip(needs, some, every, strict=True):
        assert got.shape == (expected.shape if need else (0,))
        if need:
            torch.testing.assert_close(got, expected)


def test_nan_stays_with_its_set() -> None:
    i = NAMED["paper"].build(torch.float32, DEVICE)
    clean = backend.forward(*i[:5])
    i.x[3, 1, 5] = float("nan")
    s = backend.forward(*i[:5])
    assert s[3].isnan().all()
    others = torch.arange(len(s)) != 3
    torch.testing.assert_close(s[others], clean[others])


def test_nan_gradient_stays_with_its_pair() -> None:
    """A NaN in the upstream gradient reaches the two sets of its pair only."""
    i = NAMED["paper"].build(torch.float32, DEVICE)
    i.grad[2, 7] = float("nan")
    grad_x, grad_y, _ = backend.backward(i.grad, *i[:5], True, True, False)
    for got, hit in ((grad_x, 2), (grad_y, 7)):
        assert got[hit].isnan().all()
        assert got[torch.arange(len(got)) != hit].isfinite().all()


def test_sets_too_large_for_a_tile() -> None:
    x = torch.zeros(1, 257, 4, device=DEVICE)
    with pytest.raises(ValueError, match="at most 256 and 128 vectors on a GPU, got 257 and 3"):
        backend.forward(x, x[:, :3], torch.tensor(16.0), None, None)


if DEVICE == "cuda":

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("largest_light", [0, 1 << 24])
    def test_other_lengths_compile_nothing(
        dtype: torch.dtype, largest_light: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Where the number of sets of y is no multiple of 16, or is one, by more of whom rows are read at a time."""
        monkeypatch.setattr(triton_config, "LARGEST_LIGHT", largest_light)
        case = Case("lengths", 13, 18, 4, 4, 64)
        packing = triton_packing.pack_kernel, triton_packing.unpack_kernel
        scores = triton_kernels.forward_kernel, triton_kernels.weights_kernel
        light = triton_light.kernels.light_forward_kernel, triton_light.kernels.light_weights_kernel
        before = 0
        for N, M in ((13, 18), (1, 70), (60, 130), (77, 202)):
            i = replace(case, N=N, M=M).build(dtype, DEVICE)
            backend.forward(*i[:5])
            backend.backward(i.grad, *i[:5], True, True, False)
            before = before or compiled(*packing, *scores, *light)
        assert compiled(*packing, *scores, *light) == before > 0


@triton.jit
def _log2_of_product_kernel(v, out, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    block = tl.load(v + tl.arange(0, ROWS)[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :])
    tl.store(out + tl.arange(0, ROWS), triton_kernels.log2_of_product(block, 1))


def test_log2_of_product() -> None:
    """Which the interpreter is spared elsewhere, for its time."""
    v = torch.exp2(torch.empty(4, 64).uniform_(-62, 62, generator=torch.Generator().manual_seed(0))).to(DEVICE)
    out = torch.empty(4, device=DEVICE)
    _log2_of_product_kernel[(1,)](v, out, ROWS=4, COLUMNS=64)
    torch.testing.assert_close(out.double(), v.double().log2().sum(1), rtol=1e-6, atol=1e-4)
