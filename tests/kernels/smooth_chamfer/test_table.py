"""smooth_chamfer on the CPU: every case of the table in every dtype, for the op as served and for the reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from setemb_kernels import smooth_chamfer
from tests.kernels.smooth_chamfer.cases import Case, Inputs, cases, check, check_wide, reference_results

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TABLE = [pytest.param(case, dtype, id=f"{case.name}-{str(dtype)[6:]}") for dtype in DTYPES for case in cases(dtype)]


def run_op(i: Inputs, out_dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Forward and backward through the public function and autograd."""
    x, y, alpha = (v.detach().requires_grad_() for v in (i.x, i.y, i.alpha))
    s = smooth_chamfer(x, y, alpha=alpha, x_mask=i.x_mask, y_mask=i.y_mask, out_dtype=out_dtype)
    s.backward(i.grad)
    assert x.grad is not None and y.grad is not None and alpha.grad is not None
    return s.detach(), x.grad, y.grad, alpha.grad


@pytest.mark.parametrize(("case", "dtype"), TABLE)
def test_op(case: Case, dtype: torch.dtype) -> None:
    check(run_op, case, dtype)


@pytest.mark.parametrize(("case", "dtype"), [p for p in TABLE if p.values[1].itemsize == 2])
def test_16_bit_in_float32_out(case: Case, dtype: torch.dtype) -> None:
    """The similarity is not rounded, nor is the upstream gradient."""
    check_wide(lambda i: run_op(i, torch.float32), case, dtype)
    check_wide(lambda i: reference_results(i, wide=True), case, dtype)


@pytest.mark.parametrize(("case", "dtype"), TABLE)
def test_reference(case: Case, dtype: torch.dtype) -> None:
    check(reference_results, case, dtype)
