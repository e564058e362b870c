"""The Triton kernels of the losses. `triton_tiles` and `triton_pairs` beside this file launch them.

A tile of similarities ``s [n, m]`` is float32, its rows ``stride`` apart; a program handles a block ``[ROWS, COLUMNS]``
of it and reads it once. What is reduced over rows or columns is written for each block, ``[blocks, items]``, and
combined by a second kernel: no atomics, so the same result each time.

Pairs are positive if their ids are equal: with GROUPS ``x_ids [n]`` and ``y_ids [m]``, else their places in the batch,
which begin at ``x_start`` and ``y_start``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from setemb_kernels._triton_products import add_product

_INFINITY = tl.constexpr(float("inf"))
_FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
_LARGEST = tl.constexpr(0x7FFFFFFF)
_NOTHING = tl.constexpr(-0x7FFFFFFFFFFFFFFF)  # below every candidate

# --- blocks of a tile


@triton.jit
def _block(n, m, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows and columns of a program's block, and which pairs of them there are."""
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    return row, column, (row < n)[:, None] & (column < m)[None, :]


@triton.jit
def _pointers(s, row, column, stride):
    return s + row.to(tl.int64)[:, None] * stride + column[None, :]


@triton.jit
def _positive(row, column, x_ids, y_ids, x_start, y_start, n, m, GROUPS: tl.constexpr):
    """bool ``[ROWS, COLUMNS]``"""
    if GROUPS:
        x = tl.load(x_ids + row, mask=row < n, other=0).to(tl.int64)
        y = tl.load(y_ids + column, mask=column < m, other=0).to(tl.int64)
    else:
        x = row + x_start
        y = column + y_start
    return x[:, None] == y[None, :]


@triton.jit
def _finite_or_0(v):
    """v, but 0 for what would make inf - inf of a shift; NaN stays."""
    return tl.where(tl.abs(v) == _INFINITY, 0.0, v)


@triton.jit
def _own_part():
    """Where a program writes what it summed up over its block."""
    return tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)


# --- log-sum-exp over negatives


@triton.jit(do_not_specialize=["x_start", "y_start"])
def negatives_kernel(
    s, scale,  # [n, m], []
    x_ids, y_ids,
    row_parts, column_parts,  # [2, column blocks, n], [2, row blocks, m]
    n, m, stride, x_start, y_start,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The maximum and ``sum exp(z - maximum)`` of ``z = scale s`` over the negatives in each row and column."""
    row, column, exists = _block(n, m, ROWS, COLUMNS)
    z = tl.load(_pointers(s, row, column, stride), mask=exists, other=0) * tl.load(scale)
    z = tl.where(exists & ~_positive(row, column, x_ids, y_ids, x_start, y_start, n, m, GROUPS), z, -_INFINITY)
    top = tl.max(z, 1)
    total = tl.sum(tl.exp(z - _finite_or_0(top)[:, None]), 1)
    target = row_parts + tl.program_id(0).to(tl.int64) * n + row
    tl.store(target, top, mask=row < n)
    tl.store(target + tl.num_programs(0).to(tl.int64) * n, total, mask=row < n)
    top = tl.max(z, 0)
    total = tl.sum(tl.exp(z - _finite_or_0(top)[None, :]), 0)
    target = column_parts + tl.program_id(1).to(tl.int64) * m + column
    tl.store(target, top, mask=column < m)
    tl.store(target + tl.num_programs(1).to(tl.int64) * m, total, mask=column < m)


@triton.jit
def _combine(parts, blocks, out, items, ITEMS: tl.constexpr, PARTS: tl.constexpr):
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    before = tl.load(out + item, mask=item < items, other=0)
    top = before
    for first in range(0, blocks, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        source = parts + part.to(tl.int64) * items + item[None, :]
        inside = (part < blocks) & (item < items)[None, :]
        top = tl.maximum(top, tl.max(tl.load(source, mask=inside, other=-_INFINITY), 0))
    shift = _finite_or_0(top)
    total = tl.exp(before - shift)
    for first in range(0, blocks, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        source = parts + part.to(tl.int64) * items + item[None, :]
        inside = (part < blocks) & (item < items)[None, :]
        tops = tl.load(source, mask=inside, other=-_INFINITY)
        totals = tl.load(source + blocks.to(tl.int64) * items, mask=inside, other=0)
        total += tl.sum(totals * tl.exp(tops - shift[None, :]), 0)
    tl.store(out + item, shift + tl.log(total), mask=item < items)


@triton.jit(do_not_specialize=["row_blocks", "column_blocks"])
def combine_kernel(
    row_parts, column_parts,  # [2, column blocks, n], [2, row blocks, m]
    rows, columns,  # [n], [m]: log-sum-exps so far, which these are added to
    n, m, row_blocks, column_blocks,
    ITEMS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Programs (i, 0) combine rows, (i, 1) columns."""
    if tl.program_id(1) == 0:
        _combine(row_parts, column_blocks, rows, n, ITEMS, PARTS)
    else:
        _combine(column_parts, row_blocks, columns, m, ITEMS, PARTS)


@triton.jit(do_not_specialize=["x_start", "y_start"])
def take_kernel(
    s, scale, rows, columns,  # [n, m], []; [count] places in the batch
    out,  # [count]
    count, n, m, stride, x_start, y_start,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``scale s`` of those listed pairs that this tile has."""
    p = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows + p, mask=p < count, other=-1) - x_start
    column = tl.load(columns + p, mask=p < count, other=-1) - y_start
    inside = (p < count) & (row >= 0) & (row < n) & (column >= 0) & (column < m)
    z = tl.load(s + row * stride + column, mask=inside, other=0) * tl.load(scale)
    tl.store(out + p, z, mask=inside)


@triton.jit
def infonce_slope(z, positive, lse, weight):
    """What the costs of a row, or of a column, add to h of a pair with logit z; see `contrast`."""
    below = lse - z
    return tl.where(positive, -tl.sigmoid(below), tl.exp(-below) * weight)


@triton.jit(do_not_specialize=["x_start", "y_start"])
def infonce_gradient_kernel(
    s,  # [n, m], becomes g
    scale, weight,  # []
    x_ids, y_ids,
    row_lse, row_weight, column_lse, column_weight,  # [n], [n], [m], [m]
    parts,  # [blocks]: sums of g s
    n, m, stride, x_start, y_start, row_stride, column_stride,
    GROUPS: tl.constexpr, SYMMETRIC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The gradients of InfoNCE for the similarities of a tile, in their place; see `contrast`, whose weight comes times
    the scale."""
    row, column, exists = _block(n, m, ROWS, COLUMNS)
    place = _pointers(s, row, column, stride)
    similarity = tl.load(place, mask=exists, other=0)
    z = similarity * tl.load(scale)
    positive = _positive(row, column, x_ids, y_ids, x_start, y_start, n, m, GROUPS)
    lse = tl.load(row_lse + row * row_stride, mask=row < n, other=0)[:, None]
    share = tl.load(row_weight + row * row_stride, mask=row < n, other=0)[:, None]
    g = infonce_slope(z, positive, lse, share)
    if SYMMETRIC:
        lse = tl.load(column_lse + column * column_stride, mask=column < m, other=0)[None, :]
        share = tl.load(column_weight + column * column_stride, mask=column < m, other=0)[None, :]
        g += infonce_slope(z, positive, lse, share)
    g *= tl.load(weight)
    tl.store(place, g, mask=exists)
    tl.store(parts + _own_part(), tl.sum(tl.sum(tl.where(exists, g * similarity, 0.0), 1), 0))


# --- the pairwise sigmoid loss


@triton.jit
def log1p_of_unit(u):
    """``log(1 + u)`` for u within [0, 1], to float32's digits: 2 atanh t, t = u / (2 + u) <= 1/3, by its series."""
    t = u / (2.0 + u)
    q = t * t
    series = 1.0 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7 + q * (1 / 9 + q * (1 / 11 + q * (1 / 13))))))
    return 2.0 * t * series


@triton.jit(do_not_specialize=["x_start", "y_start"])
def sigmoid_kernel(
    s, scale, bias,  # [n, m], [], []
    x_ids, y_ids,
    parts,  # [blocks]
    n, m, stride, x_start, y_start,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Sums over blocks of softplus(-t z)."""
    row, column, exists = _block(n, m, ROWS, COLUMNS)
    similarity = tl.load(_pointers(s, row, column, stride), mask=exists, other=0)
    z = similarity * tl.load(scale) + tl.load(bias)
    v = tl.where(_positive(row, column, x_ids, y_ids, x_start, y_start, n, m, GROUPS), -z, z)
    cost = tl.maximum(v, 0.0) + log1p_of_unit(tl.exp(-tl.abs(v)))
    tl.store(parts + _own_part(), tl.sum(tl.sum(tl.where(exists, cost, 0.0), 1), 0))


@triton.jit
def sigmoid_slope(z, positive):
    """h of a pair with logit z; see `contrast`."""
    return tl.where(positive, -tl.sigmoid(-z), tl.sigmoid(z))


@triton.jit(do_not_specialize=["x_start", "y_start"])
def sigmoid_gradient_kernel(
    s,  # [n, m], becomes g
    scale, bias, weight,  # []
    x_ids, y_ids,
    parts,  # [2, blocks]: sums of dL/dz s and of dL/dz
    n, m, stride, x_start, y_start,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """``dL/ds = scale dL/dz`` with ``dL/dz = -t sigmoid(-t z) weight``, in the place of s."""
    row, column, exists = _block(n, m, ROWS, COLUMNS)
    place = _pointers(s, row, column, stride)
    similarity = tl.load(place, mask=exists, other=0)
    factor = tl.load(scale)
    z = similarity * factor + tl.load(bias)
    positive = _positive(row, column, x_ids, y_ids, x_start, y_start, n, m, GROUPS)
    by_z = sigmoid_slope(z, positive) * tl.load(weight)
    tl.store(place, by_z * factor, mask=exists)
    by_z = tl.where(exists, by_z, 0.0)
    tl.store(parts + _own_part(), tl.sum(tl.sum(tl.where(exists, by_z * similarity, 0.0), 1), 0))
    blocks = tl.num_programs(0) * tl.num_programs(1)
    tl.store(parts + blocks + _own_part(), tl.sum(tl.sum(by_z, 1), 0))


# --- the most similar negatives


@triton.jit
def _ordered(v):
    """An int32 that is ordered as v is, NaN above all; `_from_ordered` undoes it."""
    bits = tl.where(v == 0, 0.0, v).to(tl.int32, bitcast=True)  # -0 = 0
    return tl.where(v != v, _LARGEST, tl.where(bits < 0, bits ^ _LARGEST, bits))


@triton.jit
def _from_ordered(key):
    return tl.where(key < 0, key ^ _LARGEST, key).to(tl.float32, bitcast=True)


@triton.jit(do_not_specialize=["x_start", "y_start"])
def candidates_kernel(
    s, x_ids, y_ids,
    row_parts, column_parts,  # [column blocks, n], [row blocks, m] int64
    n, m, stride, x_start, y_start,
    GROUPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The largest of the negatives in each row and column and where it is, the first of equals, as one integer whose
    maximum is both: above the value, below how far the place is from the last."""
    row, column, exists = _block(n, m, ROWS, COLUMNS)
    v = tl.load(_pointers(s, row, column, stride), mask=exists, other=0)
    v = tl.where(_positive(row, column, x_ids, y_ids, x_start, y_start, n, m, GROUPS), -_INFINITY, v)
    key = tl.where(exists, _ordered(v).to(tl.int64) << 32, _NOTHING)
    best = tl.max(key | (column ^ _LARGEST).to(tl.int64)[None, :], 1)
    tl.store(row_parts + tl.program_id(0).to(tl.int64) * n + row, best, mask=row < n)
    best = tl.max(key | (row ^ _LARGEST).to(tl.int64)[:, None], 0)
    tl.store(column_parts + tl.program_id(1).to(tl.int64) * m + column, best, mask=column < m)


@triton.jit
def _compare(parts, blocks, value, who, items, start, ITEMS: tl.constexpr, PARTS: tl.constexpr):
    item = tl.program_id(0) * ITEMS + tl.arange(0, ITEMS)
    best = tl.full((ITEMS,), _NOTHING, tl.int64)
    for first in range(0, blocks, PARTS):
        part = first + tl.arange(0, PARTS)[:, None]
        source = parts + part.to(tl.int64) * items + item[None, :]
        inside = (part < blocks) & (item < items)[None, :]
        best = tl.maximum(best, tl.max(tl.load(source, mask=inside, other=_NOTHING), 0))
    v = _from_ordered((best >> 32).to(tl.int32))
    index = ((best & _LARGEST) ^ _LARGEST) + start
    before = tl.load(value + item, mask=item < items, other=0)
    index_before = tl.load(who + item, mask=item < items, other=0)
    better = (item < items) & ((v > before) | ((v == before) & (index < index_before)))  # false for NaN
    tl.store(value + item, v, mask=better)
    tl.store(who + item, index, mask=better)


@triton.jit(do_not_specialize=["row_blocks", "column_blocks", "x_start", "y_start"])
def winners_kernel(
    row_parts, column_parts,
    row_value, row_who, column_value, column_who,  # [n], [n], [m], [m]: the best so far
    n, m, row_blocks, column_blocks, x_start, y_start,
    ITEMS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Let the candidates of all blocks compete with the best so far: programs (i, 0) of rows, (i, 1) of columns."""
    if tl.program_id(1) == 0:
        _compare(row_parts, column_blocks, row_value, row_who, n, y_start, ITEMS, PARTS)
    else:
        _compare(column_parts, row_blocks, column_value, column_who, m, x_start, ITEMS, PARTS)


# --- listed pairs, under smooth-Chamfer


@triton.jit
def _vectors(
    mask, index, wanted, vectors, stride_n, stride_k, mask_stride_n, mask_stride_k,
    HAS_MASK: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Where the vectors of sets `index` begin, and which there are: ``[sets, SLOTS]``."""
    slot = tl.arange(0, SLOTS)[None, :]
    valid = wanted[:, None] & (slot < vectors)
    if HAS_MASK:
        valid = tl.load(mask + index[:, None] * mask_stride_n + slot * mask_stride_k, mask=valid, other=0) != 0
    return index[:, None] * stride_n + slot.to(tl.int64) * stride_k, valid


@triton.jit
def _flat(v):
    return tl.reshape(v, (v.shape[0] * v.shape[1],))


@triton.jit
def _rows(source, offset, valid, start, D, stride_d, BLOCK_D: tl.constexpr):
    """``[vectors, BLOCK_D]``, 0 where there is none."""
    d = start + tl.arange(0, BLOCK_D)
    pointers = source + offset[:, None] + (d.to(tl.int64) * stride_d)[None, :]
    return tl.load(pointers, mask=valid[:, None] & (d < D)[None, :], other=0)


@triton.jit
def _softmax(c, valid, alpha, axis: tl.constexpr):
    """The largest along an axis, ``z = alpha (c - largest)``, ``exp(z)`` and its sum; 1 where nothing is valid."""
    top = tl.max(tl.where(valid, c, -_INFINITY), axis, keep_dims=True)
    top = tl.where(top == -_INFINITY, 0.0, top)
    z = tl.where(valid, alpha * (c - top), 0.0)
    e = tl.where(valid, tl.exp(z), 0.0)
    total = tl.sum(e, axis, keep_dims=True)
    return top, z, e, tl.where(total == 0, 1.0, total)


@triton.jit
def _sum(v):
    """Over all axes but the first."""
    return tl.sum(tl.sum(v, 2), 1)


@triton.jit
def pair_kernel(
    x, y, x_mask, y_mask,  # [N, K, D], [M, L, D], any strides; bool [N, K], [M, L]
    rows, columns,  # [count]: the sets of each pair; -1: none
    grad,  # [count], of BACKWARD
    out,  # the similarity [count], -inf where there is no pair; of BACKWARD grad ds/dc [count, X_SLOTS, Y_SLOTS]
    entropies,  # [count], with NEED_ALPHA
    alpha, count, K, L, D,
    x_stride_n, x_stride_k, x_stride_d, y_stride_n, y_stride_k, y_stride_d,
    x_mask_stride_n, x_mask_stride_k, y_mask_stride_n, y_mask_stride_k,
    X_MASKED: tl.constexpr, Y_MASKED: tl.constexpr, X_SLOTS: tl.constexpr, Y_SLOTS: tl.constexpr, PAIRS: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, ALPHA_ON_DEVICE: tl.constexpr,
    BACKWARD: tl.constexpr, NEED_ALPHA: tl.constexpr,
):  # fmt: skip
    """A program makes PAIRS pairs, by one product of all their vectors, of which it keeps what belongs together: so few
    scores cost less than to read the vectors."""
    if ALPHA_ON_DEVICE:
        alpha = tl.load(alpha).to(tl.float32)
    inverse = tl.minimum(tl.div_rn(1.0, alpha), _FLOAT32_MAX)
    alpha = tl.minimum(alpha, _FLOAT32_MAX)
    p = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    n = tl.load(rows + p, mask=p < count, other=-1)
    m = tl.load(columns + p, mask=p < count, other=-1)
    wanted = (n >= 0) & (m >= 0)
    if BACKWARD:
        g = tl.load(grad + p, mask=p < count, other=0)
        wanted = wanted & (g != 0)
    x_offset, x_valid = _vectors(
        x_mask, n, wanted, K, x_stride_n, x_stride_k, x_mask_stride_n, x_mask_stride_k, X_MASKED, X_SLOTS
    )  # fmt: skip
    y_offset, y_valid = _vectors(
        y_mask, m, wanted, L, y_stride_n, y_stride_k, y_mask_stride_n, y_mask_stride_k, Y_MASKED, Y_SLOTS
    )  # fmt: skip
    x_flat, x_there = _flat(x_offset), _flat(x_valid.to(tl.int32)) != 0
    y_flat, y_there = _flat(y_offset), _flat(y_valid.to(tl.int32)) != 0
    c = tl.zeros((PAIRS * X_SLOTS, PAIRS * Y_SLOTS), tl.float32)
    for start in range(0, D, BLOCK_D):
        a = _rows(x, x_flat, x_there, start, D, x_stride_d, BLOCK_D)
        b = _rows(y, y_flat, y_there, start, D, y_stride_d, BLOCK_D)
        c = add_product(c, a, b.T, PRECISION)
    c = tl.reshape(c, (PAIRS, X_SLOTS, PAIRS, Y_SLOTS))
    pair = tl.arange(0, PAIRS)
    c = tl.sum(tl.where(pair[:, None, None, None] == pair[None, None, :, None], c, 0.0), 2)
    valid = x_valid[:, :, None] & y_valid[:, None, :]
    c = tl.where(valid & (tl.abs(c) == _INFINITY), float("nan"), c)  # as inf - inf would be
    x_count = tl.sum(x_valid.to(tl.float32), 1)
    y_count = tl.sum(y_valid.to(tl.float32), 1)
    present = (x_count > 0) & (y_count > 0)
    x_weight = (0.5 / tl.maximum(x_count, 1.0))[:, None, None]
    y_weight = (0.5 / tl.maximum(y_count, 1.0))[:, None, None]
    top, z, e, total = _softmax(c, valid, alpha, 2)
    other_top, other_z, other_e, other_total = _softmax(c, valid, alpha, 1)
    if BACKWARD:
        w = x_weight * (e / total) + y_weight * (other_e / other_total)
        w = tl.where(present[:, None, None], w * g[:, None, None], 0.0)
        k = tl.arange(0, X_SLOTS)[None, :, None]
        target = out + ((p[:, None, None] * X_SLOTS + k) * Y_SLOTS + tl.arange(0, Y_SLOTS)[None, None, :])
        tl.store(target, w, mask=(p < count)[:, None, None])
        if NEED_ALPHA:
            mean = tl.sum(tl.where(e > 0, e * z, 0.0), 2, keep_dims=True) / total  # 0 * -inf
            other_mean = tl.sum(tl.where(other_e > 0, other_e * other_z, 0.0), 1, keep_dims=True) / other_total
            entropy = _sum(x_weight * (tl.log(total) - mean)) + _sum(y_weight * (tl.log(other_total) - other_mean))
            tl.store(entropies + p, tl.where(present, entropy, 0.0), mask=p < count)
    else:
        s = _sum(tl.where(x_valid[:, :, None], x_weight * (top + tl.log(total) * inverse), 0.0))
        s += _sum(tl.where(y_valid[:, None, :], y_weight * (other_top + tl.log(other_total) * inverse), 0.0))
        s = tl.where(s > _FLOAT32_MAX, _FLOAT32_MAX, tl.where(s < -_FLOAT32_MAX, -_FLOAT32_MAX, s))  # NaN stays
        s = tl.where(wanted, tl.where(present, s, 0.0), -_INFINITY)
        tl.store(out + p, s, mask=p < count)


@triton.jit
def pair_gradient_kernel(
    w, grad,  # [pairs, slots of x, slots of y]; [pairs], 0: w is not needed
    other, other_mask,  # [M, L, D], any strides; bool [M, L]
    partner,  # [pairs]: which set of the other side each pair has
    order, offsets,  # set i has the pairs order[offsets[i]:offsets[i + 1]]
    target,  # [N, K, D] float32, any strides
    K, L, D, w_stride_own, w_stride_other,
    stride_n, stride_k, stride_d, mask_stride_n, mask_stride_k, target_stride_n, target_stride_k, target_stride_d,
    MASKED: tl.constexpr, OWN: tl.constexpr, OTHER: tl.constexpr, PAIRS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Program (i, j) adds what the pairs of set i give to features j of its gradient: ``sum of w other``, in order."""
    own = tl.program_id(0).to(tl.int64)
    first = tl.load(offsets + own)
    last = tl.load(offsets + own + 1)
    if first < last:
        k = tl.arange(0, OWN)[:, None]
        d = (tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D))[None, :]
        total = tl.zeros((OWN, BLOCK_D), tl.float32)
        for start in range(first, last, PAIRS):
            for i in tl.static_range(PAIRS):  # unrolled: their loads do not wait for each other
                live = start + i < last
                pair = tl.load(order + start + i, mask=live, other=0)
                live = live & (tl.load(grad + pair, mask=live, other=0) != 0)
                who = tl.load(partner + pair, mask=live, other=0)
                for slot in tl.static_range(OTHER):
                    valid = live & (slot < L)
                    far = tl.full((), slot, tl.int64)
                    if MASKED:
                        place = other_mask + who * mask_stride_n + far * mask_stride_k
                        valid = tl.load(place, mask=valid, other=0) != 0
                    share = w + pair * (OWN * OTHER) + slot * w_stride_other + k * w_stride_own
                    vector = other + who * stride_n + far * stride_k + d.to(tl.int64) * stride_d
                    v = tl.load(vector, mask=d < tl.where(valid, D, 0), other=0).to(tl.float32)
                    total += tl.load(share, mask=k < tl.where(valid, K, 0), other=0) * v
        place = target + own * target_stride_n + k.to(tl.int64) * target_stride_k + d.to(tl.int64) * target_stride_d
        exists = (k < K) & (d < D)
        tl.store(place, tl.load(place, mask=exists, other=0) + total, mask=exists)
