"""The Triton kernels of smooth-Chamfer for few scores: sets as they lie in memory, nothing packed. `triton_light`
launches them.

Rows of a tile are set-major here, ``n K + k``, and columns ``m L + l``. Pairs and scores have the axes of
`triton_kernels`, with groups of one set.
"""

from __future__ import annotations

import triton
import triton.language as tl

from setemb_kernels.ops.smooth_chamfer.triton_kernels import (
    UNSHIFTED,
    largest,
    pair_scale,
    saturate,
    sharpness,
    similarity_shifted,
    similarity_unshifted,
    weights_shifted,
    weights_unshifted,
)
from setemb_kernels.ops.smooth_chamfer.triton_packing import power_of_two

WEIGHT_EXPONENT = tl.constexpr(-12)  # W holds 2^-12 of itself: no sum over 2^12 columns overflows before its end


@triton.jit
def _exponents(v, first, features, LARGEST_EXPONENT: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr,
               BLOCK_D: tl.constexpr):  # fmt: skip
    """For each row e >= 0, of its set, so that its vectors over 2^e have no dot product out of range."""
    peak = tl.zeros((ROWS,), tl.float32)
    for d in range(0, features, BLOCK_D):
        peak = tl.maximum(peak, tl.max(tl.abs(v.load([first, d]).to(tl.float32)), 1))
    peak = tl.max(tl.reshape(peak, (ROWS // SLOTS, SLOTS)), 1, keep_dims=True)
    bits = peak.to(tl.int32, bitcast=True)
    e = tl.maximum((bits >> 23) - 126 - LARGEST_EXPONENT, 0)
    return tl.reshape(tl.broadcast_to(e, (ROWS // SLOTS, SLOTS)), (ROWS,))


@triton.jit
def _load(v, first, d, e):
    """A tile of vectors, over 2^e."""
    block = v.load([first, d])
    return (block.to(tl.float32) * power_of_two(-e)[:, None]).to(block.dtype)


@triton.jit
def _scores(
    x, y, row, column, features,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    c = tl.zeros((ROWS, COLUMNS), tl.float32)
    for d in range(0, features, BLOCK_D):
        c = tl.dot(x.load([row, d]), y.load([column, d]).T, c)
    return c


@triton.jit
def _rescaled(
    c, x, y, row, column, features, peak, K: tl.constexpr, L: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, LARGEST_EXPONENT: tl.constexpr,
):  # fmt: skip
    """Scores in range, and the exponents of rows and columns; scores of vectors that are not finite are NaN."""
    x_exponent = tl.zeros((ROWS,), tl.int32)
    y_exponent = tl.zeros((COLUMNS,), tl.int32)
    if peak == float("inf"):
        x_exponent = _exponents(x, row, features, LARGEST_EXPONENT, K, ROWS, BLOCK_D)
        y_exponent = _exponents(y, column, features, LARGEST_EXPONENT, L, COLUMNS, BLOCK_D)
        c = tl.zeros((ROWS, COLUMNS), tl.float32)
        for d in range(0, features, BLOCK_D):
            c = tl.dot(_load(x, row, d, x_exponent), _load(y, column, d, y_exponent).T, c)
        c = tl.where(tl.abs(c) < float("inf"), c, float("nan"))
    return c, x_exponent, y_exponent


@triton.jit
def _axes(c, K: tl.constexpr, L: tl.constexpr):
    """``[block, k, 1, l, m]`` of ``[row, column]``."""
    c = tl.reshape(c, (c.shape[0] // K, K, 1, c.shape[1] // L, L))
    return tl.permute(c, (0, 1, 2, 4, 3))


@triton.jit
def _of_sets(x_exponent, y_exponent, K: tl.constexpr, L: tl.constexpr):
    """Exponents ``[block, 1, 1]`` and ``[1, 1, m]``."""
    x_exponent = tl.max(tl.reshape(x_exponent, (x_exponent.shape[0] // K, 1, 1, K)), 3)
    y_exponent = tl.max(tl.reshape(y_exponent, (1, 1, y_exponent.shape[0] // L, L)), 3)
    return x_exponent, y_exponent


@triton.jit
def _place(column_tiles, X_SETS: tl.constexpr, Y_SETS: tl.constexpr):
    """Row and column of a program's tile, and its sets ``n [block, 1, 1]``, ``m [1, 1, m]``."""
    i = tl.program_id(0) // column_tiles
    j = tl.program_id(0) % column_tiles
    n = i * X_SETS + tl.reshape(tl.arange(0, X_SETS), (X_SETS, 1, 1))
    m = j * Y_SETS + tl.reshape(tl.arange(0, Y_SETS), (1, 1, Y_SETS))
    return i, j, n, m


@triton.jit(do_not_specialize=["N", "column_tiles"])
def light_forward_kernel(
    x, y,  # descriptors of [N K, D] and [M L, D]
    out,  # [N, M]
    alpha, N, M, features, column_tiles,
    K: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
    ALPHA_ON_DEVICE: tl.constexpr, LIMIT: tl.constexpr, LARGEST_EXPONENT: tl.constexpr,
):  # fmt: skip
    """A tile of pairs. What bounds of vectors say elsewhere is read off its scores."""
    scale, inverse = sharpness(alpha, ALPHA_ON_DEVICE)
    i, j, n, m = _place(column_tiles, ROWS // K, COLUMNS // L)
    c = _scores(x, y, i * ROWS, j * COLUMNS, features, ROWS, COLUMNS, BLOCK_D)
    target = out + n.to(tl.int64) * M + m
    exists = (n < N) & (m < M)
    x_weight = tl.full((ROWS // K, 1, 1), 0.5 / K, tl.float32)
    y_weight = tl.full((1, 1, COLUMNS // L), 0.5 / L, tl.float32)
    peak = largest(c)
    if peak * scale <= UNSHIFTED:
        s = similarity_unshifted(_axes(c, K, L), x_weight, y_weight, scale, inverse, False)
        tl.store(target, saturate(s, LIMIT).to(out.dtype.element_ty), mask=exists)
    else:
        c, x_exponent, y_exponent = _rescaled(
            c, x, y, i * ROWS, j * COLUMNS, features, peak, K, L, ROWS, COLUMNS, BLOCK_D, LARGEST_EXPONENT
        )
        x_exponent, y_exponent = _of_sets(x_exponent, y_exponent, K, L)
        s = similarity_shifted(_axes(c, K, L), x_weight, y_weight, x_exponent, y_exponent, scale, inverse)
        tl.store(target, saturate(s, LIMIT).to(out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["N", "M", "column_tiles"])
def light_weights_kernel(
    x, y,  # as in light_forward_kernel
    grad,  # [N, M], any strides
    weights,  # descriptor of [N K, M L]
    alpha, N, M, features, column_tiles, stride_n, stride_m,
    K: tl.constexpr, L: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr,
    ALPHA_ON_DEVICE: tl.constexpr, LARGEST_EXPONENT: tl.constexpr,
):  # fmt: skip
    """A tile of W, times 2^WEIGHT_EXPONENT."""
    scale, _ = sharpness(alpha, ALPHA_ON_DEVICE)
    i, j, n, m = _place(column_tiles, ROWS // K, COLUMNS // L)
    source = grad + n.to(tl.int64) * stride_n + m.to(tl.int64) * stride_m
    g = tl.load(source, mask=(n < N) & (m < M), other=0).to(tl.float32) * power_of_two(WEIGHT_EXPONENT)
    c = _scores(x, y, i * ROWS, j * COLUMNS, features, ROWS, COLUMNS, BLOCK_D)
    peak = largest(c)
    if peak * scale <= UNSHIFTED:
        w = weights_unshifted(_axes(c, K, L), g * (0.5 / K), g * (0.5 / L), scale, False)
        w = tl.reshape(tl.permute(w, (0, 1, 2, 4, 3)), (ROWS, COLUMNS))
        weights.store([i * ROWS, j * COLUMNS], w.to(weights.dtype))
    else:
        c, x_exponent, y_exponent = _rescaled(
            c, x, y, i * ROWS, j * COLUMNS, features, peak, K, L, ROWS, COLUMNS, BLOCK_D, LARGEST_EXPONENT
        )
        x_exponent, y_exponent = _of_sets(x_exponent, y_exponent, K, L)
        unit = pair_scale(scale, x_exponent, y_exponent)
        w = weights_shifted(_axes(c, K, L), g * (0.5 / K), g * (0.5 / L), unit)
        w = tl.reshape(tl.permute(w, (0, 1, 2, 4, 3)), (ROWS, COLUMNS))
        weights.store([i * ROWS, j * COLUMNS], w.to(weights.dtype))
