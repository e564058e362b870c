"""The Triton kernels of smooth-Chamfer that pack operands and unpack gradients, and what all of them know of a call.

``stats`` holds that, in float32: PEAKS numbers that are 0 at first, of which a few are maxima over all sets (X_LONGEST
and so on; not raised without NEED_PEAKS); then of each set of x its weight, its longest vector and its exponent
``[3, x_sets]``; then those of y.
"""

from __future__ import annotations

import triton
import triton.language as tl

WEIGHT_EXPONENT = tl.constexpr(15)  # chunks of W hold |W| <= 2^15, whatever the upstream gradient: fits float16
PEAKS = tl.constexpr(16)
X_LONGEST = tl.constexpr(0)
X_EXPONENT = tl.constexpr(1)
Y_LONGEST = tl.constexpr(2)
Y_EXPONENT = tl.constexpr(3)
GRADIENT = tl.constexpr(4)  # the largest upstream gradient, without its sign


@triton.jit
def power_of_two(e):
    """2^e, exactly; e an int32 within [-126, 127], clamped to it."""
    e = tl.minimum(tl.maximum(e, -126), 127)
    return ((e + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def ldexp(v, e):
    """v 2^e in two steps, as 2^e alone may not be representable."""
    half = e >> 1
    return v * power_of_two(half) * power_of_two(e - half)


@triton.jit
def position(set_index, slot, SLOTS: tl.constexpr, GROUP: tl.constexpr):
    """Row of a packed operand that holds one vector: slot-major within groups of GROUP sets."""
    return (set_index // GROUP * SLOTS + slot) * GROUP + set_index % GROUP


@triton.jit
def _raise_peak(peak, v):
    """``peak = max(peak, v)`` for numbers >= 0, NaN above all: their bits are in order."""
    bits = tl.where(v == v, v, float("inf")).to(tl.int32, bitcast=True)
    tl.atomic_max(peak.to(tl.pointer_type(tl.int32), bitcast=True), bits)


@triton.jit
def _pack(
    v, mask, packed, valid, stats, longest_peak, exponent_peak, program, N, K, D, features, sets,
    stride_n, stride_k, stride_d, mask_stride_n, mask_stride_k,
    SLOTS: tl.constexpr, GROUP: tl.constexpr, SETS: tl.constexpr, BLOCK_D: tl.constexpr,
    LARGEST_EXPONENT: tl.constexpr, NEED_PEAKS: tl.constexpr,
):  # fmt: skip
    """Pack SETS sets. Sets past N are packed as sets without valid vectors."""
    n = program.to(tl.int64) * SETS + tl.arange(0, SETS)[:, None]  # [SETS, 1]
    slot = tl.arange(0, SLOTS)[None, :]  # [1, SLOTS]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    is_valid = slot < tl.where(n < N, K, 0)
    if mask is not None:
        is_valid = tl.load(mask + n * mask_stride_n + slot * mask_stride_k, mask=is_valid, other=0) != 0
    source = v + (n * stride_n + slot.to(tl.int64) * stride_k)[:, :, None]
    row = position(n, slot, SLOTS, GROUP)
    target = packed + (row * features)[:, :, None] + d

    largest = tl.zeros((SETS, SLOTS, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = is_valid[:, :, None] & (d < D - start)
        block = tl.load(source + (d + start).to(tl.int64) * stride_d, mask=inside, other=0).to(tl.float32)
        largest = tl.maximum(largest, tl.abs(block))
    bits = tl.max(tl.max(largest, 2), 1, keep_dims=True).to(tl.int32, bitcast=True)  # [SETS, 1]
    exponent = tl.maximum((bits >> 23) - 126 - LARGEST_EXPONENT, 0)
    factor = power_of_two(-exponent)[:, :, None]

    squares = tl.zeros((SETS, SLOTS, BLOCK_D), tl.float32)
    for start in range(0, features, BLOCK_D):
        inside = is_valid[:, :, None] & (d < D - start)
        block = tl.load(source + (d + start).to(tl.int64) * stride_d, mask=inside, other=0).to(tl.float32) * factor
        squares += block * block
        tl.store(target + start, block.to(packed.dtype.element_ty), mask=d < features - start)
    square = tl.sum(squares, 2)
    finite = tl.sum(square, 1, keep_dims=True) < float("inf")  # false for NaN
    count = tl.sum(is_valid.to(tl.float32), 1, keep_dims=True)
    weight = tl.where(count > 0, 0.5 / tl.maximum(count, 1), 0.0)
    longest = tl.sqrt(tl.max(square, 1, keep_dims=True)) * 1.001  # an upper bound, though squares were rounded
    longest = tl.where(finite & (exponent == 0), longest, float("inf"))
    exponent = exponent.to(tl.float32)
    if valid is not None:
        tl.store(valid + row, is_valid.to(tl.int8))
    tl.store(stats + n, tl.where(finite, weight, float("nan")))
    tl.store(stats + sets + n, longest)
    tl.store(stats + 2 * sets + n, exponent)
    if NEED_PEAKS:
        _raise_peak(longest_peak, tl.max(tl.max(longest, 1), 0))
        _raise_peak(exponent_peak, tl.max(tl.max(exponent, 1), 0))


@triton.jit(do_not_specialize=["x_programs", "y_programs", "N", "M", "x_sets", "y_sets", "rows", "columns"])
def pack_kernel(
    x, y,  # [N, K, D] and [M, L, D], any strides
    grad,  # [rows, columns], any strides, or None
    x_mask, y_mask,  # [N, K] and [M, L] bool, any strides, or None
    x_packed, y_packed,  # [x_sets * X_SLOTS, features], [y_sets * Y_SLOTS, features]
    x_valid, y_valid,  # [x_sets * X_SLOTS], [y_sets * Y_SLOTS] int8, or None
    stats, x_programs, y_programs, N, K, M, L, D, features, x_sets, y_sets,
    x_stride_n, x_stride_k, x_stride_d, y_stride_n, y_stride_k, y_stride_d,
    x_mask_stride_n, x_mask_stride_k, y_mask_stride_n, y_mask_stride_k,
    rows, columns, row_stride, column_stride,
    X_SLOTS: tl.constexpr, X_GROUP: tl.constexpr, X_SETS: tl.constexpr,
    Y_SLOTS: tl.constexpr, Y_GROUP: tl.constexpr, Y_SETS: tl.constexpr,
    X_BLOCK: tl.constexpr, Y_BLOCK: tl.constexpr, LARGEST_EXPONENT: tl.constexpr, NEED_PEAKS: tl.constexpr,
    GRAD_ROWS: tl.constexpr, GRAD_COLUMNS: tl.constexpr,
):  # fmt: skip
    """The first programs pack x, the next y, the rest look for the largest gradient: one launch for all of them."""
    program = tl.program_id(0)
    x_stats = stats + PEAKS
    if program < x_programs:
        _pack(
            x, x_mask, x_packed, x_valid, x_stats, stats + X_LONGEST, stats + X_EXPONENT, program, N, K, D, features,
            x_sets, x_stride_n, x_stride_k, x_stride_d, x_mask_stride_n, x_mask_stride_k,
            X_SLOTS, X_GROUP, X_SETS, X_BLOCK, LARGEST_EXPONENT, NEED_PEAKS,
        )  # fmt: skip
    elif program < x_programs + y_programs:
        _pack(
            y, y_mask, y_packed, y_valid, x_stats + 3 * x_sets, stats + Y_LONGEST, stats + Y_EXPONENT,
            program - x_programs, M, L, D, features,
            y_sets, y_stride_n, y_stride_k, y_stride_d, y_mask_stride_n, y_mask_stride_k,
            Y_SLOTS, Y_GROUP, Y_SETS, Y_BLOCK, LARGEST_EXPONENT, NEED_PEAKS,
        )  # fmt: skip
    else:
        if grad is not None:
            block = program - x_programs - y_programs
            across = tl.cdiv(columns, GRAD_COLUMNS)
            row = (block // across).to(tl.int64) * GRAD_ROWS + tl.arange(0, GRAD_ROWS)[:, None]
            column = (block % across).to(tl.int64) * GRAD_COLUMNS + tl.arange(0, GRAD_COLUMNS)[None, :]
            inside = (row < rows) & (column < columns)
            g = tl.load(grad + row * row_stride + column * column_stride, mask=inside, other=0).to(tl.float32)
            _raise_peak(stats + GRADIENT, tl.max(tl.max(tl.where(g == g, tl.abs(g), float("inf")), 1), 0))


@triton.jit
def gradient_exponent(stats):
    """e of ``max |grad| < 2^e``; 0 if that is not finite."""
    exponent = tl.load(stats + GRADIENT).to(tl.int32, bitcast=True) >> 23
    return tl.where(exponent < 255, exponent - 126, 0)


@triton.jit
def chunk_exponent(stats):
    """Of a chunk of W: what g ds/dc was multiplied by, as a power of two, times those of x and y."""
    peaks = tl.load(stats + X_EXPONENT) + tl.load(stats + Y_EXPONENT)
    return WEIGHT_EXPONENT - gradient_exponent(stats) - peaks.to(tl.int32)


@triton.jit
def _unpack(
    packed, mask, exponents, out, exponent_of_chunk, program, first, last, K, D, features, mask_stride_n, mask_stride_k,
    SLOTS: tl.constexpr, GROUP: tl.constexpr, SETS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    local = program.to(tl.int64) * SETS + tl.arange(0, SETS)[:, None]
    n = first + local
    slot = tl.arange(0, SLOTS)[None, :]
    d = tl.arange(0, BLOCK_D)[None, None, :]
    exists = slot < tl.where(n < last, K, 0)
    is_valid = exists
    if mask is not None:
        is_valid = tl.load(mask + n * mask_stride_n + slot * mask_stride_k, mask=exists, other=0) != 0
    exponent = tl.load(exponents + n, mask=n < last, other=0).to(tl.int32)
    shift = (-exponent_of_chunk - exponent)[:, :, None]
    source = packed + (position(local, slot, SLOTS, GROUP) * features)[:, :, None] + d
    target = out + ((n * K + slot) * D)[:, :, None] + d
    for start in range(0, D, BLOCK_D):
        inside = d < D - start
        block = tl.load(source + start, mask=is_valid[:, :, None] & inside, other=0)
        tl.store(target + start, ldexp(block, shift).to(out.dtype.element_ty), mask=exists[:, :, None] & inside)


@triton.jit(do_not_specialize=["x_programs", "first", "last", "M", "x_sets", "y_sets"])
def unpack_kernel(
    x_sums, y_sums,  # [rows, features] float32, in tile order; None where there is nothing to write
    x_mask, y_mask,  # [N, K] and [M, L] bool, or None
    stats,
    x_grad, y_grad,  # [N, K, D] and [M, L, D] contiguous
    x_programs, first, last,  # sets of x in the rows of x_sums; those of y are all there
    M, K, L, D, features, x_sets, y_sets, x_mask_stride_n, x_mask_stride_k, y_mask_stride_n, y_mask_stride_k,
    X_SLOTS: tl.constexpr, X_GROUP: tl.constexpr, X_SETS: tl.constexpr,
    Y_SLOTS: tl.constexpr, Y_GROUP: tl.constexpr, Y_SETS: tl.constexpr, X_BLOCK: tl.constexpr, Y_BLOCK: tl.constexpr,
):  # fmt: skip
    """The first programs write gradients of x, the others those of y. Out of range they become infinite, as of any
    other op."""
    program = tl.program_id(0)
    exponent_of_chunk = chunk_exponent(stats)
    x_exponents = stats + PEAKS + 2 * x_sets
    if program < x_programs:
        if x_sums is not None:
            _unpack(
                x_sums, x_mask, x_exponents, x_grad, exponent_of_chunk, program, first, last, K, D, features,
                x_mask_stride_n, x_mask_stride_k, X_SLOTS, X_GROUP, X_SETS, X_BLOCK,
            )  # fmt: skip
    else:
        if y_sums is not None:
            y_exponents = stats + PEAKS + 3 * x_sets + 2 * y_sets
            _unpack(
                y_sums, y_mask, y_exponents, y_grad, exponent_of_chunk, program - x_programs, 0, M, L, D, features,
                y_mask_stride_n, y_mask_stride_k, Y_SLOTS, Y_GROUP, Y_SETS, Y_BLOCK,
            )  # fmt: skip
