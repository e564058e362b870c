"""slot_attention on the CPU: every case of the table in every dtype, for the op as served and for the reference."""

from __future__ import annotations

import pytest
import torch

from setemb_kernels import slot_attention
from tests.kernels.slot_attention.cases import Case, Inputs, Results, cases, check, reference_results

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TABLE = [pytest.param(case, dtype, id=f"{case.name}-{str(dtype)[6:]}") for dtype in DTYPES for case in cases(dtype)]


def run_op(i: Inputs) -> Results:
    """Forward and backward through the public function and autograd."""
    q, k, v, bias = (None if t is None else t.detach().requires_grad_() for t in (i.q, i.k, i.v, i.bias))
    out = slot_attention(q, k, v, bias=bias, mask=i.mask, scale=i.scale, eps=i.eps, token_eps=i.token_eps)
    out.backward(i.grad)
    return out.detach(), *(t.grad for t in (q, k, v, bias) if t is not None)


@pytest.mark.parametrize(("case", "dtype"), TABLE)
def test_op(case: Case, dtype: torch.dtype) -> None:
    check(run_op, case, dtype)


@pytest.mark.parametrize(("case", "dtype"), TABLE)
def test_reference(case: Case, dtype: torch.dtype) -> None:
    check(reference_results, case, dtype)
