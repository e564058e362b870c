"""set_similarity on the CPU: every case of the table, kind and dtype, for the op as served and for the reference."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.set_similarity.cases import Case, Inputs, Results, cases, check, check_wide, reference_results

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TABLE = [
    pytest.param(case, kind, dtype, id=f"{case.name}-{kind}-{str(dtype)[6:]}")
    for dtype in DTYPES
    for case, kind in cases(dtype)
]


def run_op(i: Inputs, wide: bool = False) -> Results:
    """Forward and backward through the op and autograd."""
    x, y, alpha, bias = (v.detach().requires_grad_() for v in (i.x, i.y, i.alpha, i.bias))
    s = torch.ops.setemb.set_similarity(x, i.x_offsets, y, i.y_offsets, i.candidates, alpha, bias, i.kind, i.mean, wide)
    s.backward(i.grad)
    assert x.grad is not None and y.grad is not None and alpha.grad is not None and bias.grad is not None
    return s.detach(), x.grad, y.grad, alpha.grad, bias.grad


@pytest.mark.parametrize(("case", "kind", "dtype"), TABLE)
def test_op(case: Case, kind: str, dtype: torch.dtype) -> None:
    check(run_op, case, kind, dtype)


@pytest.mark.parametrize(("case", "kind", "dtype"), [p for p in TABLE if p.values[2].itemsize == 2])
def test_16_bit_in_float32_out(case: Case, kind: str, dtype: torch.dtype) -> None:
    """The similarity is not rounded, nor is the upstream gradient."""
    check_wide(lambda i: run_op(i, wide=True), case, kind, dtype)


@pytest.mark.parametrize(("case", "kind", "dtype"), TABLE)
def test_reference(case: Case, kind: str, dtype: torch.dtype) -> None:
    check(reference_results, case, kind, dtype)
