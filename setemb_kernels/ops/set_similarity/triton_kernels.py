"""The Triton kernels of set similarities. `triton` beside this file launches them and says how they fit together.

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


@triton.jit(
    do_not_specialize=["J", "first_n", "sets_n", "sets_j", "pairs", "splits"], do_not_specialize_on_alignment=["parts"]
)
def similarity_kernel(
    a, b,  # [rows, D], any strides
    a_offsets, b_offsets,  # [sets + 1] int64
    candidates,  # [N, J] int64 or None
    a_scale, b_scale,  # [rows] float32 or None
    parts,  # [splits, N, J] float32
    alpha, bias, factor, J, first_n, sets_n, sets_j, pairs, splits, D, a_stride, a_stride_d, b_stride, b_stride_d,
    SWAP: tl.constexpr, HOW: tl.constexpr, BEST: tl.constexpr, MEAN: tl.constexpr,
    ALPHA_ON_DEVICE: tl.constexpr, BIAS_ON_DEVICE: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, BAND: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Similarity of one pair in one direction, of every splits-th block of rows. `a` are sets of x, or of y if SWAP.

    With BEST the largest of all rows (of one split).
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
    tl.store(parts + split.to(tl.int64) * pairs + n * J + j, s)


@triton.jit(do_not_specialize=["A", "J", "first_n", "first_j", "sets_n", "sets_j", "splits", "plane", "grad_stride_n"])
def state_kernel(
    a, b, a_offsets, b_offsets, candidates,  # as in similarity_kernel
    grad,  # [N, J], any strides
    state,  # [pairs of a set of a in the window, A]: HARD int32, SOFT two planes of float32
    sums,  # [1 or 2, pairs in the window, splits] float32
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


@triton.jit
def _entry(t, owner, candidates, order, J, OWN_IS_X: tl.constexpr):
    """What an owning set meets as number t: the pair (n, j) and the other set, -1 for none."""
    t += tl.full((), 0, tl.int64)
    if order is not None and not OWN_IS_X:  # sets of x that have `owner` as a candidate
        pair = tl.load(order + t)
        n = pair // J
        j = pair % J
        other = n
    elif OWN_IS_X:
        n = owner
        j = t
        other = t
        if candidates is not None:
            other = tl.load(candidates + n * J + j)
    else:
        n = t
        j = owner
        other = t
    return n, j, other


@triton.jit(
    do_not_specialize=[
        "own_rows", "own_sets", "A", "J", "first_n", "first_j", "end_n", "end_j", "splits", "plane", "blocks",
        "grad_stride_n",
    ]
)  # fmt: skip
def gradient_kernel(
    own, other,  # [rows, D], any strides
    own_offsets, other_offsets,  # [sets + 1] int64
    block_sets,  # [blocks] int64: the set of each block of own rows, `own_sets` beyond the last
    block_ends,  # [own_sets] int64: blocks up to the last of each set
    candidates, order, bounds,  # [N, J] or None; pairs by set of y, and from where to where
    grad, state,  # as in state_kernel
    out,  # [splits, own_rows, D]
    alpha, bias, factor, own_rows, own_sets, A, J, first_n, first_j, end_n, end_j, splits, plane, blocks, D,
    own_stride, own_stride_d, other_stride, other_stride_d, grad_stride_n, grad_stride_j,
    OWN_IS_X: tl.constexpr, OWN_IS_A: tl.constexpr, HOW: tl.constexpr, MEAN: tl.constexpr,
    ALPHA_ON_DEVICE: tl.constexpr, BIAS_ON_DEVICE: tl.constexpr, ADD: tl.constexpr, FACTOR: tl.constexpr,
    OWN: tl.constexpr, OTHER: tl.constexpr, BLOCK_D: tl.constexpr, WHOLE: tl.constexpr, FEATURES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``sum over pairs of g w Y`` of a block of rows of one set: FEATURES features, every splits-th pair of a window.

    The window is sets first_n to end_n of x, and first_j to end_j of y or of the candidates. OWN_IS_A: the owned rows
    are those that were reduced, else the columns. Weights are at most 1, and times FACTOR: 16 bits hold small ones.
    """
    program = tl.program_id(0)
    block = program % blocks
    rest = program // blocks
    split = rest % splits
    d = rest // splits * FEATURES + tl.arange(0, FEATURES)
    owner = tl.load(block_sets + block)
    is_owned = owner < own_sets
    if OWN_IS_X:
        is_owned = is_owned & (owner >= first_n) & (owner < end_n)
        list_first = first_j
        list_end = end_j
    elif order is None:
        is_owned = is_owned & (owner >= first_j) & (owner < end_j)
        list_first = first_n
        list_end = end_n
    else:
        list_first = tl.load(bounds + owner, mask=is_owned, other=0).to(tl.int32)
        list_end = tl.load(bounds + owner + 1, mask=is_owned, other=0).to(tl.int32)
    list_end = tl.where(is_owned, list_end, list_first)
    before = tl.load(block_ends + owner - 1, mask=is_owned & (owner > 0), other=0)
    begin = tl.load(own_offsets + owner, mask=is_owned, other=0)
    count = (tl.load(own_offsets + owner + 1, mask=is_owned, other=0) - begin).to(tl.int32)
    local = (block - before).to(tl.int32) * OWN + tl.arange(0, OWN)
    exists = local < count
    row = begin + local
    if HOW == SIGMOID:
        scale = _number(alpha, ALPHA_ON_DEVICE)
        shift = _number(bias, BIAS_ON_DEVICE)
        factor = factor * scale
    elif HOW == SOFT:
        scale, _ = _sharpness(alpha, ALPHA_ON_DEVICE)
    first_tile = _tile(own, row, exists, 0, D, own_stride, own_stride_d, BLOCK_D)
    sums = tl.zeros((OWN, FEATURES), tl.float32)
    for t in range(list_first + split, list_end, splits):
        n, j, other_set = _entry(t, owner, candidates, order, J, OWN_IS_X)
        some = (n >= first_n) & (n < end_n) & (j >= first_j) & (j < end_j) & (other_set >= 0)
        other_begin, other_count = _set(other_offsets, tl.maximum(other_set, 0))
        some = some & (other_count > 0)
        other_count = tl.where(some, other_count, 0)
        g = tl.load(grad + n * grad_stride_n + j * grad_stride_j, mask=some, other=0).to(tl.float32)
        if OWN_IS_A:
            g *= _weight(count, tl.maximum(other_count, 1), factor, HOW, MEAN)
        else:
            g *= _weight(tl.maximum(other_count, 1), count, factor, HOW, MEAN)
        source = state + (j - first_j if OWN_IS_X == OWN_IS_A else n - first_n) * A
        has_state = local < tl.where(some, count, 0)
        if HOW == HARD and OWN_IS_A:
            index = tl.load(source + row, mask=has_state, other=NONE)
            chosen = index != NONE
            place = other + (other_begin + tl.maximum(index, 0))[:, None] * other_stride + d[None, :] * other_stride_d
            v = tl.load(place, mask=chosen[:, None] & (d < D)[None, :], other=0).to(tl.float32)
            sums += tl.where(chosen[:, None], g * v, 0.0)
        else:
            if HOW == SOFT and OWN_IS_A:
                top = tl.load(source + row, mask=has_state, other=0)[:, None]
                inverse = tl.div_rn(FACTOR, tl.load(source + plane + row, mask=has_state, other=1))[:, None]
            for first in range(0, other_count, OTHER):
                column = tl.arange(0, OTHER)
                is_column = column < other_count - first
                column = other_begin + first + column
                if HOW == HARD:
                    index = tl.load(source + column, mask=is_column, other=NONE)
                    w = tl.where(local[:, None] == index[None, :], 1.0, 0.0)
                else:
                    c = _scores(
                        first_tile, own, row, exists, other, column, is_column, D,
                        own_stride, own_stride_d, other_stride, other_stride_d, None, None, BLOCK_D, WHOLE, PRECISION,
                    )  # fmt: skip
                    if HOW == SIGMOID:
                        _, w = _sigmoid(c, scale, shift)
                        w *= FACTOR
                    else:
                        if not OWN_IS_A:
                            top = tl.load(source + column, mask=is_column, other=0)[None, :]
                            inverse = tl.load(source + plane + column, mask=is_column, other=1)
                            inverse = tl.div_rn(FACTOR, inverse)[None, :]
                        w = tl.exp2(tl.minimum(c - top, 0.0) * scale) * inverse  # c may be rounded otherwise than top
                    w = tl.where(exists[:, None] & is_column[None, :], w, 0.0)
                place = other + column[:, None] * other_stride + d[None, :] * other_stride_d
                v = tl.load(place, mask=is_column[:, None] & (d < D)[None, :], other=0)
                part = tl.dot(w.to(v.dtype), v, input_precision=PRECISION)
                sums += part * (g if HOW == HARD else g * (1 / FACTOR))
    target = out + (split.to(tl.int64) * own_rows + row)[:, None] * D + d[None, :]
    inside = exists[:, None] & (d < D)[None, :]
    if ADD:
        sums += tl.load(target, mask=inside, other=0)
    tl.store(target, sums.to(out.dtype.element_ty), mask=inside)
