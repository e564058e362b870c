"""Products in the Triton kernels of all ops."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_product(total, a, b, PRECISION: tl.constexpr):
    """``total + a b``. In float32 by blocks: one chain through all features has an error that grows with its length.

    ``fma``, as the compiler makes one chain of a sum.
    """
    if a.dtype == tl.float32 and PRECISION == "ieee":
        one = tl.full(total.shape, 1.0, tl.float32)
        total = tl.fma(tl.dot(a, b, input_precision=PRECISION), one, total)
    else:
        total = tl.dot(a, b, total, input_precision=PRECISION)
    return total
