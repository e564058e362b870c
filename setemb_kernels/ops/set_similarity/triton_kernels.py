"""The Triton kernels that reduce scores of set similarities. `triton` beside this file says how all fit together;
`triton_gradient_kernels` has the one that makes gradients.

Names: pair (n, j) is set n of x with set m of y, which is j or ``candidates[n, j]``. Of a pair in one *direction*, `a`
is the side whose vectors are the rows of the scores ``c``, `b` the side whose vectors are the columns, over which HOW
reduces: HARD a maximum, SOFT a log-sum-exp, SIGMOID a sum. For SOFT ``scale`` is alpha log2(e), so that
``exp(alpha c) = exp2(scale c)``.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from setemb_kernels._triton_products import add_product

HARD = tl.constexpr(0)
SOFT = tl.constexpr(1)
SIGMOID = tl.constexpr(2)
NONE = tl.constexpr(-1)  # the state of a row whose maximum gets no gradient

_LOG2_E = tl.constexpr(1 / math.log(2))
_FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
_FLOAT32_SMALLEST = tl.constexpr(1.1754943508222875e-38)
_LARGEST_INT = tl.constexpr(2**31 - 1)

# Numbers of sets and of vectors, and strides of them, are do_not_specialize: for others nothing is compiled anew.


# --- arithmetic


@triton.jit
def _sharpness(alpha, ON_DEVICE: tl.constexpr):
    """alpha log2(e) and its inverse, both within the range of float32."""
    if ON_DEVICE:
        alpha = tl.load(alpha).to(tl.float32)
    scale = alpha * _LOG2_E
    inverse = tl.minimum(tl.div_rn(1.0, scale), _FLOAT32_MAX)
    return tl.minimum(tl.maximum(scale, _FLOAT32_SMALLEST), _FLOAT32_MAX), inverse


@triton.jit
def _number(v, ON_DEVICE: tl.constexpr):
    if ON_DEVICE:
        v = tl.load(v).to(tl.float32)
    return v


@triton.jit
def _larger(a, b):
    """The maximum; NaN stays."""
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _largest(v, axis: tl.constexpr):
    """The maximum over an axis; NaN stays."""
    is_nan = tl.max((v != v).to(tl.int32), axis) != 0
    return tl.where(is_nan, float("nan"), tl.max(v, axis))


@triton.jit
def _saturate(v, LIMIT: tl.constexpr):
    """v within [-LIMIT, LIMIT]; NaN stays."""
    v = tl.where(v > LIMIT, LIMIT, v)
    return tl.where(v < -LIMIT, -LIMIT, v)


@triton.jit
def _sigmoid(c, scale, bias):
    """``e = sigmoid(scale c + bias)`` and ``e (1 - e)``, which never comes of a difference."""
    z = c * scale + bias
    t = tl.exp2(-tl.abs(z) * _LOG2_E)
    of_one = tl.div_rn(1.0, 1 + t)
    return tl.where(z >= 0, 1.0, t) * of_one, t * of_one * of_one


# --- sets, tiles and pairs


@triton.jit
def _set(offsets, i):
    """First row (int64) and number of rows of set i."""
    begin = tl.load(offsets + i)
    return begin, (tl.load(offsets + i + 1) - begin).to(tl.int32)


@triton.jit
def _tile(v, row, exists, first, D, stride, stride_d, BLOCK_D: tl.constexpr):
    """``[rows, BLOCK_D]``, features from `first` on; 0 where there is nothing."""
    d = first + tl.arange(0, BLOCK_D)
    place = v + row[:, None] * stride + d[None, :].to(tl.int64) * stride_d
    return tl.load(place, mask=exists[:, None] & (d < D)[None, :], other=0.0)  # fp8 is not made of an int


@triton.jit
def _scores(
    first_tile, a, a_row, a_exists, b, b_row, b_exists, D, a_stride, a_stride_d, b_stride, b_stride_d,
    a_scale, b_scale, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``c [rows, columns]``. first_tile: the first BLOCK_D features of the rows; if WHOLE there are no others.

    Of int8 the products are summed in int32, exactly; of fp8 in float32, which has to be asked for. The scales, unless
    None, are of each row of a and of b.
    """
    SUM: tl.constexpr = tl.int32 if a.dtype.element_ty == tl.int8 else tl.float32
    c = tl.zeros((a_row.shape[0], b_row.shape[0]), SUM)
    if WHOLE:
        other = _tile(b, b_row, b_exists, 0, D, b_stride, b_stride_d, BLOCK_D)
        c = tl.dot(first_tile, other.T, c, input_precision=PRECISION, max_num_imprecise_acc=0, out_dtype=SUM)
    else:
        for first in range(0, D, BLOCK_D):
            tile = _tile(a, a_row, a_exists, first, D, a_stride, a_stride_d, BLOCK_D)
            other = _tile(b, b_row, b_exists, first, D, b_stride, b_stride_d, BLOCK_D)
            if tile.dtype == tl.float32:
                c = add_product(c, tile, other.T, PRECISION)
            else:
                c = tl.dot(tile, other.T, c, input_precision=PRECISION, max_num_imprecise_acc=0, out_dtype=SUM)
    c = c.to(tl.float32)
    # small scales first, so that a partial product does not leave the range of the result
    if a_scale is not None:
        first_scale = tl.load(a_scale + a_row, mask=a_exists, other=0)
        is_small = tl.abs(first_scale) <= 1
        c *= tl.where(is_small, first_scale, 1.0)[:, None]
    if b_scale is not None:
        c *= tl.load(b_scale + b_row, mask=b_exists, other=0)[None, :]
    if a_scale is not None:
        c *= tl.where(is_small, 1.0, first_scale)[:, None]
    return c


@triton.jit
def _pair(program, first_n, first_j, sets_n, sets_j, J, candidates, BAND: tl.constexpr):
    """Pair and set of y of a program, -1 for none: down BAND sets of x before the next of y, for the cache's sake."""
    width = sets_j.to(tl.int64) * BAND
    band = program // width
    top = band * BAND
    height = tl.minimum(sets_n - top, BAND)
    within = program - band * width
    n = (first_n + top + within % height).to(tl.int64)
    j = (first_j + within // height).to(tl.int64)
    m = j
    if candidates is not None:
        m = tl.load(candidates + n * J + j)
    return n, j, m


@triton.jit
def _counts(a_offsets, b_offsets, n, m, SWAP: tl.constexpr):
    """First row and number of rows of both sides; no rows if either side has none, or there is no pair."""
    some = m >= 0
    m = tl.maximum(m, 0)
    if SWAP:
        a_begin, a_count = _set(a_offsets, m)
        b_begin, b_count = _set(b_offsets, n)
    else:
        a_begin, a_count = _set(a_offsets, n)
        b_begin, b_count = _set(b_offsets, m)
    some = some & (a_count > 0) & (b_count > 0)
    return a_begin, tl.where(some, a_count, 0), b_begin, tl.where(some, b_count, 0)


@triton.jit
def _weight(a_count, b_count, factor, HOW: tl.constexpr, MEAN: tl.constexpr):
    """What a row's reduction counts for in the similarity. `factor`: of the direction."""
    if HOW == SIGMOID:
        factor = tl.div_rn(tl.div_rn(factor, a_count.to(tl.float32)), b_count.to(tl.float32))
    elif MEAN:
        factor = tl.div_rn(factor, a_count.to(tl.float32))
    return factor


# --- one reduction of rows: over all columns of the other set, a tile at a time


@triton.jit
def _maxima(
    a, a_row, a_exists, b, b_begin, b_count, D, a_stride, a_stride_d, b_stride, b_stride_d,
    a_scale, b_scale, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    INDEX: tl.constexpr,
):  # fmt: skip
    """Maxima ``[rows]``, NaN where a score is; if INDEX, for which NaN is the largest, also the first place of each."""
    column = tl.arange(0, COLUMNS)
    first_tile = _tile(a, a_row, a_exists, 0, D, a_stride, a_stride_d, BLOCK_D)
    best = tl.full((a_row.shape[0], COLUMNS), float("-inf"), tl.float32)
    place = tl.zeros((a_row.shape[0], COLUMNS), tl.int32)
    for first in range(0, b_count, COLUMNS):
        exists = column < b_count - first
        c = _scores(
            first_tile, a, a_row, a_exists, b, b_begin + first + column, exists, D,
            a_stride, a_stride_d, b_stride, b_stride_d, a_scale, b_scale, BLOCK_D, WHOLE, PRECISION,
        )  # fmt: skip
        c = tl.where(exists[None, :], c, float("-inf"))
        if INDEX:
            c = tl.where(c != c, float("inf"), c)
            place = tl.where(c > best, first, place)
        best = _larger(best, c)
    top = _largest(best, 1)
    index = tl.min(tl.where(best == top[:, None], place + column[None, :], _LARGEST_INT), 1)
    return top, index


@triton.jit
def _exponentials(
    a, a_row, a_exists, b, b_begin, b_count, scale, D, a_stride, a_stride_d, b_stride, b_stride_d,
    a_scale, b_scale, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    MOMENT: tl.constexpr,
):  # fmt: skip
    """Maxima ``[rows]``, with ``z = scale (c - maximum)`` the sums of ``exp2(z)`` and, if MOMENT, of ``z exp2(z)``."""
    column = tl.arange(0, COLUMNS)
    first_tile = _tile(a, a_row, a_exists, 0, D, a_stride, a_stride_d, BLOCK_D)
    top = tl.full((a_row.shape[0],), float("-inf"), tl.float32)
    total = tl.zeros((a_row.shape[0],), tl.float32)
    moment = tl.zeros((a_row.shape[0],), tl.float32)
    for first in range(0, b_count, COLUMNS):
        exists = column < b_count - first
        c = _scores(
            first_tile, a, a_row, a_exists, b, b_begin + first + column, exists, D,
            a_stride, a_stride_d, b_stride, b_stride_d, a_scale, b_scale, BLOCK_D, WHOLE, PRECISION,
        )  # fmt: skip
        c = tl.where(exists[None, :], c, float("-inf"))
        new = tl.maximum(top, tl.max(c, 1))
        base = tl.where(new == float("-inf"), 0.0, new)
        z = (c - base[:, None]) * scale
        e = tl.exp2(z)
        down = tl.maximum((top - base) * scale, -1e4)  # exp2 of which is 0
        keep = tl.exp2(down)
        if MOMENT:
            moment = keep * (moment + down * total) + tl.sum(e * tl.maximum(z, -1e4), 1)
        total = keep * total + tl.sum(e, 1)
        top = new
    return top, total, moment


@triton.jit
def _probabilities(
    a, a_row, a_exists, b, b_begin, b_count, scale, bias, D, a_stride, a_stride_d, b_stride, b_stride_d,
    a_scale, b_scale, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, PRECISION: tl.constexpr,
    SLOPE: tl.constexpr,
):  # fmt: skip
    """Sums over a block of rows: of probabilities; or, if SLOPE, of their derivatives by scale and by bias."""
    column = tl.arange(0, COLUMNS)
    first_tile = _tile(a, a_row, a_exists, 0, D, a_stride, a_stride_d, BLOCK_D)
    first_sum = tl.zeros((a_row.shape[0], COLUMNS), tl.float32)
    second_sum = tl.zeros((a_row.shape[0], COLUMNS), tl.float32)
    for first in range(0, b_count, COLUMNS):
        exists = column < b_count - first
        c = _scores(
            first_tile, a, a_row, a_exists, b, b_begin + first + column, exists, D,
            a_stride, a_stride_d, b_stride, b_stride_d, a_scale, b_scale, BLOCK_D, WHOLE, PRECISION,
        )  # fmt: skip
        e, slope = _sigmoid(c, scale, bias)
        inside = a_exists[:, None] & exists[None, :]
        if SLOPE:
            first_sum += tl.where(inside & (slope != 0), slope * c, 0.0)  # 0 * inf
            second_sum += tl.where(inside, slope, 0.0)
        else:
            first_sum += tl.where(inside, e, 0.0)
    return tl.sum(tl.sum(first_sum, 1), 0), tl.sum(tl.sum(second_sum, 1), 0)


# --- kernels


@triton.jit(do_not_specialize=["J", "first_n", "sets_n", "sets_j", "pairs", "splits", "first_part", "all_parts"])
def similarity_kernel(
    a, b,  # [rows, D], any strides
    a_offsets, b_offsets,  # [sets + 1] int64
    candidates,  # [N, J] int64 or None
    a_scale, b_scale,  # [rows] float32 or None
    out,  # [N, J]
    parts,  # [all_parts, N, J] float32
    alpha, bias, factor, J, first_n, sets_n, sets_j, pairs, splits, first_part, all_parts, D,
    a_stride, a_stride_d, b_stride, b_stride_d,
    SWAP: tl.constexpr, HOW: tl.constexpr, BEST: tl.constexpr, MEAN: tl.constexpr,
    ALPHA_ON_DEVICE: tl.constexpr, BIAS_ON_DEVICE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, BAND: tl.constexpr,
    PRECISION: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """Similarity of one pair in one direction, of every splits-th block of rows. `a` are sets of x, or of y if SWAP.

    With BEST the largest of all rows (of one split). Where that is all of the similarity it goes to `out`, else to
    `parts`: asked at run time, so that it makes no second kernel to compile.
    """
    program = tl.program_id(0)
    split = program % splits
    n, j, m = _pair(program // splits, first_n, 0, sets_n, sets_j, J, candidates, BAND)
    a_begin, a_count, b_begin, b_count = _counts(a_offsets, b_offsets, n, m, SWAP)
    if HOW == SIGMOID:
        scale = _number(alpha, ALPHA_ON_DEVICE)
        shift = _number(bias, BIAS_ON_DEVICE)
    elif HOW == SOFT:
        scale, inverse = _sharpness(alpha, ALPHA_ON_DEVICE)
    weight = _weight(tl.maximum(a_count, 1), tl.maximum(b_count, 1), factor, HOW, MEAN)
    s = tl.where((a_count > 0) & BEST, float("-inf"), 0.0)
    for first in range(split * ROWS, a_count, splits * ROWS):
        row = tl.arange(0, ROWS)
        exists = row < a_count - first
        row = a_begin + first + row
        if HOW == SIGMOID:
            value, _ = _probabilities(
                a, row, exists, b, b_begin, b_count, scale, shift, D, a_stride, a_stride_d, b_stride, b_stride_d,
                a_scale, b_scale, COLUMNS, BLOCK_D, WHOLE, PRECISION, False,
            )  # fmt: skip
            s += value * weight
        else:
            if HOW == SOFT:
                top, total, _ = _exponentials(
                    a, row, exists, b, b_begin, b_count, scale, D, a_stride, a_stride_d, b_stride, b_stride_d,
                    a_scale, b_scale, COLUMNS, BLOCK_D, WHOLE, PRECISION, False,
                )  # fmt: skip
                top += tl.log2(total) * inverse
            else:
                top, _ = _maxima(
                    a, row, exists, b, b_begin, b_count, D, a_stride, a_stride_d, b_stride, b_stride_d,
                    a_scale, b_scale, COLUMNS, BLOCK_D, WHOLE, PRECISION, False,
                )  # fmt: skip
            if BEST:
                s = _larger(s, _largest(tl.where(exists, top, float("-inf")), 0))
            else:
                s += tl.sum(tl.where(exists, top, 0.0) * weight, 0)
    if all_parts == 1:
        s = _saturate(s, LIMIT)
        if candidates is not None:
            s = tl.where(m < 0, float("-inf"), s)
        tl.store(out + n * J + j, s.to(out.dtype.element_ty))
    else:
        tl.store(parts + (first_part + split).to(tl.int64) * pairs + n * J + j, s)


@triton.jit(do_not_specialize=["count", "all_parts"])
def combine_kernel(
    parts,  # [all_parts, count] float32
    candidates,  # [count] or None: below 0 is no pair
    out,  # [count]
    count, all_parts,
    BEST: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The sum of all parts, in order, or with BEST the largest; within LIMIT, unless None."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = i < count
    s = tl.load(parts + i, mask=exists, other=0)
    for part in range(1, all_parts):
        v = tl.load(parts + tl.cast(part, tl.int64) * count + i, mask=exists, other=0)
        s = _larger(s, v) if BEST else s + v
    if LIMIT is not None:
        s = _saturate(s, LIMIT)
    if candidates is not None:
        s = tl.where(tl.load(candidates + i, mask=exists, other=0) < 0, float("-inf"), s)
    tl.store(out + i, s.to(out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["A", "J", "first_n", "first_j", "sets_n", "sets_j", "splits", "plane", "grad_stride_n"])
def state_kernel(
    a, b, a_offsets, b_offsets, candidates,  # as in similarity_kernel
    grad,  # [N, J], any strides
    state,  # [pairs of a set of a in the window, A]: HARD int32, SOFT two planes of float32; None unless STORE
    sums,  # [1 or 2, pairs in the window, splits] float32; None unless SUM
    alpha, bias, factor, A, J, first_n, first_j, sets_n, sets_j, splits, plane, D,
    a_stride, a_stride_d, b_stride, b_stride_d, grad_stride_n, grad_stride_j,
    SWAP: tl.constexpr, HOW: tl.constexpr, BEST: tl.constexpr, MEAN: tl.constexpr,
    ALPHA_ON_DEVICE: tl.constexpr, BIAS_ON_DEVICE: tl.constexpr, STORE: tl.constexpr, SUM: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, BAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What the backward pass has to know of each row of a pair (STORE), and its part of ds/dalpha, ds/dbias (SUM).

    HARD: the column of the maximum. SOFT: the maximum and the sum of exponentials. With BEST only the row of the
    largest maximum is written.
    """
    program = tl.program_id(0)
    split = program % splits
    n, j, m = _pair(program // splits, first_n, first_j, sets_n, sets_j, J, candidates, BAND)
    a_begin, a_count, b_begin, b_count = _counts(a_offsets, b_offsets, n, m, SWAP)
    if HOW == SIGMOID:
        scale = _number(alpha, ALPHA_ON_DEVICE)
        shift = _number(bias, BIAS_ON_DEVICE)
    elif HOW == SOFT:
        scale, _ = _sharpness(alpha, ALPHA_ON_DEVICE)
    if STORE:
        target = state + (n - first_n if SWAP else j - first_j) * A
    first_sum = 0.0
    second_sum = 0.0
    best = float("-inf")
    best_row = a_begin - a_begin
    best_index = NONE
    for first in range(split * ROWS, a_count, splits * ROWS):
        row = tl.arange(0, ROWS)
        exists = row < a_count - first
        row = a_begin + first + row
        if HOW == SIGMOID:
            by_scale, by_bias = _probabilities(
                a, row, exists, b, b_begin, b_count, scale, shift, D, a_stride, a_stride_d, b_stride, b_stride_d,
                None, None, COLUMNS, BLOCK_D, WHOLE, PRECISION, True,
            )  # fmt: skip
            first_sum += by_scale
            second_sum += by_bias
        elif HOW == SOFT:
            top, total, moment = _exponentials(
                a, row, exists, b, b_begin, b_count, scale, D, a_stride, a_stride_d, b_stride, b_stride_d,
                None, None, COLUMNS, BLOCK_D, WHOLE, PRECISION, SUM,
            )  # fmt: skip
            if STORE:
                tl.store(target + row, top, mask=exists)
                tl.store(target + plane + row, total, mask=exists)
            if SUM:
                first_sum += tl.sum(tl.where(exists, tl.log2(total) - moment / total, 0.0), 0)  # entropy in bits
        else:
            top, index = _maxima(
                a, row, exists, b, b_begin, b_count, D, a_stride, a_stride_d, b_stride, b_stride_d,
                None, None, COLUMNS, BLOCK_D, WHOLE, PRECISION, True,
            )  # fmt: skip
            if BEST:
                top = tl.where(exists, top, float("-inf"))
                block_best = tl.max(top, 0)
                place = tl.min(tl.where(exists & (top == block_best), tl.arange(0, ROWS), ROWS - 1), 0)
                index = tl.sum(tl.where(tl.arange(0, ROWS) == place, index, 0), 0)
                better = (block_best > best) | (best_index == NONE)
                best_row = tl.where(better, a_begin + first + place, best_row)
                best_index = tl.where(better, index, best_index)
                best = tl.where(better, block_best, best)
            else:
                tl.store(target + row, index, mask=exists)
    if BEST:
        tl.store(target + best_row, best_index, mask=best_index != NONE)
    if SUM:
        g = tl.load(grad + n * grad_stride_n + j * grad_stride_j, mask=a_count > 0, other=0).to(tl.float32)
        g *= _weight(tl.maximum(a_count, 1), tl.maximum(b_count, 1), factor, HOW, MEAN)
        tl.store(sums + program, tl.where(a_count > 0, g * first_sum, 0.0))
        if HOW == SIGMOID:
            tl.store(sums + tl.num_programs(0) + program, tl.where(a_count > 0, g * second_sum, 0.0))
