"""Similarities next to sets stored in another type: every case of the table, with few rows of x and with many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from setemb_kernels.ops.smooth_chamfer import mixed
from tests.kernels.judge import judge
from tests.kernels.smooth_chamfer.cases import CASES, Case, Inputs, _eager_in_another_order, reference_results

STORED = (torch.float32, torch.bfloat16, torch.float16, torch.int8)
FEW = 16
"""Rows of x that are compared without decoding y first."""


def stored(v: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """v in a dtype, and the scales of its vectors."""
    if dtype != torch.int8:
        return v.to(dtype), None
    scale = v.nan_to_num(0, 0, 0).abs().amax(2) / 127 if v.numel() else v.new_zeros(v.shape[:2])
    return (v / scale.clamp(min=torch.finfo(v.dtype).tiny)[..., None]).round().nan_to_num(7).to(torch.int8), scale


def operands(case: Case, dtype: torch.dtype, rows: str) -> tuple[Inputs, tuple[Any, ...]]:
    """What the op is given, and the same sets decoded."""
    i = case.build(torch.float32)
    x, x_mask, grad = i.x, i.x_mask, i.grad
    if rows != "all":
        n = max(1, FEW // max(1, x.shape[1]))
        x, x_mask, grad = x[:n], None if x_mask is None else x_mask[:n], grad[:n]
    if rows == "few, short":  # what the processor's products of bfloat16 serve
        x = x.bfloat16().float()
    y, scale = stored(i.y, dtype)
    decoded = y.float() if scale is None else y.float() * scale[..., None]
    if i.y.stride() != y.stride():
        y = torch.empty_strided(y.shape, i.y.stride(), dtype=y.dtype).copy_(y) if i.y.is_contiguous() else y
    return Inputs(x, decoded, i.alpha, x_mask, i.y_mask, grad), (x, y, i.alpha, x_mask, i.y_mask, scale)


TABLE = [
    pytest.param(case, dtype, rows, id=f"{case.name}-{str(dtype)[6:]}-{rows}")
    for case in CASES
    for dtype in STORED
    for rows in ("few", "few, short", "all")
    if not (case.wide and dtype == torch.float16) and (rows != "few, short" or dtype == torch.bfloat16)
]


@pytest.mark.parametrize(("case", "dtype", "rows"), TABLE)
def test_mixed_op(case: Case, dtype: torch.dtype, rows: str) -> None:
    decoded, arguments = operands(case, dtype, rows)
    got = torch.ops.setemb.smooth_chamfer_mixed(*arguments)
    double = Inputs(*(v.double() if v is not None and v.is_floating_point() else v for v in decoded))
    truth, ours = reference_results(double)[0], reference_results(decoded)[0]
    plain = [_eager_in_another_order(decoded, order)[0] for order in range(3)]
    assert got.dtype == torch.float32
    judge(f"{case.name}, {dtype}, {rows}", got, truth, plain, ours, torch.float32, saturates=True)
    without = mixed._decoded(*arguments)
    judge(f"{case.name}, {dtype}, {rows}, plain", without, truth, plain, ours, torch.float32, saturates=True)


@pytest.mark.parametrize("N", [2, 30], ids=["few", "many"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_only_its_own_pairs_mixed(value: float, N: int) -> None:
    x, y = (torch.nn.functional.normalize(torch.randn(n, 3, 40), dim=-1) for n in (N, 1000))
    clean = torch.ops.setemb.smooth_chamfer_mixed(x, y.bfloat16(), torch.tensor(16.0), None, None, None)
    y[[17, 900], 1, 39] = value
    s = torch.ops.setemb.smooth_chamfer_mixed(x, y.bfloat16(), torch.tensor(16.0), None, None, None)
    touched = torch.zeros(1000, dtype=torch.bool)
    touched[[17, 900]] = True
    assert torch.equal(s.isnan() | (s.abs() > 1e30), touched.expand_as(s))
    torch.testing.assert_close(s[:, ~touched], clean[:, ~touched])


def test_subnormal_queries_count() -> None:
    """The processor's products of bfloat16 would take them for 0."""
    x, y = torch.full((1, 1, 32), 2.0**-130), torch.full((3, 1, 32), 2.0**127).bfloat16()
    s = torch.ops.setemb.smooth_chamfer_mixed(x, y, torch.tensor(1.0), None, None, None)
    assert s.eq(32 * 2.0**-3).all()


@pytest.mark.parametrize("N", [2, 30], ids=["few", "many"])
def test_a_gallery_larger_than_what_is_decoded_at_a_time(N: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several parts, the last one smaller."""
    x, y = (torch.nn.functional.normalize(torch.randn(n, 2, 1000), dim=-1) for n in (N, 5000))
    codes, scale = stored(y, torch.int8)
    alpha = torch.tensor(16.0)
    got = torch.ops.setemb.smooth_chamfer_mixed(x, codes, alpha, None, None, scale)
    assert scale is not None
    decoded = codes.float() * scale[..., None]
    torch.testing.assert_close(got, torch.ops.setemb.smooth_chamfer(x, decoded, alpha), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({0: torch.zeros(2, 3, 4, dtype=torch.bfloat16)}, "x: expected float32"),
        ({1: torch.zeros(2, 3, 4, dtype=torch.int32)}, "y: expected float32, bfloat16, float16 or int8"),
        ({5: torch.ones(2, 3, dtype=torch.float64)}, "y_scale: expected float32"),
    ],
)
def test_errors_of_the_compiled_op(change: dict[int, Tensor], message: str) -> None:
    arguments: list[Any] = [torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.tensor(16.0), None, None, None]
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(ValueError, match=message):
        torch.ops.setemb.smooth_chamfer_mixed(*arguments)


def test_opcheck_mixed() -> None:
    x, y, scale = torch.randn(3, 2, 5), torch.randint(-100, 100, (4, 3, 5), dtype=torch.int8), torch.rand(4, 3)
    torch.library.opcheck(
        torch.ops.setemb.smooth_chamfer_mixed.default,
        (x, y, torch.tensor(16.0), None, torch.rand(4, 3) < 0.8, scale),
        test_utils=("test_schema", "test_faketensor"),
    )
