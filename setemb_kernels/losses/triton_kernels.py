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
    """The gradients of InfoNCE for the similarities of a tile, in their place; see `infonce`."""
    row, column, exists = _block(n, m, ROWS, COLUMNS)
    place = _pointers(s, row, column, stride)
    similarity = tl.load(place, mask=exists, other=0)
    z = similarity * tl.load(scale)
    positive = _positive(row, column, x_ids, y_ids, x_start, y_start, n, m, GROUPS)
    below = tl.load(row_lse + row * row_stride, mask=row < n, other=0)[:, None] - z
    share = tl.load(row_weight + row * row_stride, mask=row < n, other=0)[:, None]
    g = tl.where(positive, -tl.sigmoid(below), tl.exp(-below) * share)
    if SYMMETRIC:
        below = tl.load(column_lse + column * column_stride, mask=column < m, other=0)[None, :] - z
        share = tl.load(column_weight + column * column_stride, mask=column < m, other=0)[None, :]
        g += tl.where(positive, -tl.sigmoid(below), tl.exp(-below) * share)
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
    by_z = tl.where(positive, -tl.sigmoid(-z), tl.sigmoid(z)) * tl.load(weight)
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
