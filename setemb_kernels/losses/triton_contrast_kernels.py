"""The Triton kernel that makes W of InfoNCE and of the sigmoid loss straight from the scores. `triton_contrast` beside
this file launches it; `contrast` says what the losses are, `ops.smooth_chamfer.triton_kernels` what the names are."""

from __future__ import annotations

import triton
import triton.language as tl

from setemb_kernels.losses.triton_kernels import infonce_slope, sigmoid_slope
from setemb_kernels.ops.smooth_chamfer.triton_kernels import (
    exponentials,
    pair_scale,
    parts_of,
    saturate,
    sets_of,
    sharpness,
    similarity_of,
    similarity_shifted,
    stats_of,
    tile_pointers,
    tile_position,
    tile_scores,
    tiles_served,
    weights_of,
    weights_shifted,
    without_invalid,
)
from setemb_kernels.ops.smooth_chamfer.triton_packing import chunk_exponent, ldexp

_FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _slope(s, n, m, N, M, x_ids, y_ids, rows, columns, scale, bias):
    """h ``[block, group, m]`` of sets n of x with sets m of y, whose similarities are s."""
    x = n
    y = m
    if x_ids is not None:
        x = tl.load(x_ids + n, mask=n < N, other=0)
        y = tl.load(y_ids + m, mask=m < M, other=0)
    positive = x == y
    z = s * scale
    if rows is not None:
        h = _one_way(z, positive, rows, n, N)
        if columns is not None:
            h += _one_way(z, positive, columns, m, M)
    else:
        h = sigmoid_slope(z + bias, positive)
    return h


@triton.jit
def _one_way(z, positive, state, i, count):
    """What rows, or columns, i with log-sum-exps and weights ``[2, count]`` add to h. A negative is below the sum that
    it is in; but that was made by another kernel, whose z is rounded otherwise."""
    lse = tl.load(state + i, mask=i < count, other=0)
    weight = tl.load(state + count + i, mask=i < count, other=0)
    z = tl.where((z > lse) & (positive == 0), lse, z)  # NaN stays
    return infonce_slope(z, positive, lse, weight)


@triton.jit
def _store_weights(
    c, i, j, chunk_i, chunk_j, x_valid, y_valid, stats, chunk, chunk_columns, x_ids, y_ids, rows, columns, loss,
    exponent_of_chunk, scale, inverse, N, M, x_sets, y_sets,
    K: tl.constexpr, L: tl.constexpr, GROUP: tl.constexpr,
    BULK: tl.constexpr, SHIFTED: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """W of one part, from scores c to the chunk; h and h s of its pairs."""
    ROWS: tl.constexpr = c.shape[0]
    COLUMNS: tl.constexpr = c.shape[1]
    BLOCKS: tl.constexpr = ROWS // (K * GROUP)
    Y_SETS: tl.constexpr = COLUMNS // L
    if MASKED:
        c = without_invalid(c, x_valid + i * ROWS, y_valid + j * COLUMNS)
    c = tl.reshape(c, (BLOCKS, K, GROUP, L, Y_SETS))
    n, m = sets_of(i, j, BLOCKS, GROUP, Y_SETS)
    x_weight, x_exponent, y_weight, y_exponent = stats_of(stats, n, m, x_sets, y_sets)
    some = (x_weight != 0) & (y_weight != 0)
    exists = (n < N) & (m < M)
    if SHIFTED:
        s = similarity_shifted(c, x_weight, y_weight, x_exponent, y_exponent, scale, inverse)
    else:
        e, by_row, by_column = exponentials(c, scale, MASKED)
        s = similarity_of(c, by_row, by_column, x_weight, y_weight, inverse)
    s = tl.where(some, saturate(s, _FLOAT32_MAX), 0.0)
    h = _slope(s, n, m, N, M, x_ids, y_ids, rows, columns, tl.load(loss), tl.load(loss + 1))
    h = tl.where(exists, h, 0.0)
    g = tl.where(some, h, 0.0)
    if SHIFTED:
        g = ldexp(g * tl.load(loss + 2), exponent_of_chunk + x_exponent + y_exponent)
        w = weights_shifted(c, g * x_weight, g * y_weight, pair_scale(scale, x_exponent, y_exponent))
    else:
        g = ldexp(g * tl.load(loss + 2), exponent_of_chunk)
        w = weights_of(e, by_row, by_column, g * x_weight, g * y_weight)
    w = tl.reshape(w, (ROWS, COLUMNS))
    if BULK:
        chunk.store([chunk_i * ROWS, chunk_j * COLUMNS], w.to(chunk.dtype))
    else:
        tl.store(tile_pointers(chunk, chunk_i, chunk_j, chunk_columns, ROWS, COLUMNS), w.to(chunk.dtype.element_ty))
    return h, tl.where(h != 0, h * s, 0.0)


@triton.jit(
    do_not_specialize=[
        "N",
        "M",
        "x_sets",
        "y_sets",
        "first_row_tile",
        "first_column_tile",
        "row_tiles",
        "column_tiles",
    ]
)
def contrast_kernel(
    x, y, x_valid, y_valid, stats,  # as in `forward_kernel`; the largest gradient in stats is a bound
    chunk,  # [row_tiles ROWS, column_tiles COLUMNS], of the dtype of x: a descriptor if BULK
    sums,  # [2, programs] float32; of InfoNCE [1, programs]
    x_ids, y_ids,  # [N], [M] int64: positive pairs have equal ones; None: equal places
    rows, columns,  # [2, N], [2, M] float32: log-sum-exps and weights, None as in `Contrast`
    loss,  # [3] float32: scale, bias, and what h is times for the gradient of s
    alpha, N, M, features, x_sets, y_sets, first_row_tile, first_column_tile, row_tiles, column_tiles,
    K: tl.constexpr, L: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    TILES: tl.constexpr, FLATTEN: tl.constexpr, BULK: tl.constexpr,
    SHIFTED: tl.constexpr, ALONE: tl.constexpr, MASKED: tl.constexpr, ALPHA_ON_DEVICE: tl.constexpr,
):  # fmt: skip
    """One chunk of W, which `weights_kernel` makes of an upstream gradient, and over its pairs sums of h s and of h: a
    part of them for each program."""
    scale, inverse = sharpness(alpha, ALPHA_ON_DEVICE)
    exponent_of_chunk = chunk_exponent(stats)
    tiles = tiles_served(row_tiles * column_tiles, scale, stats, SHIFTED, ALONE)
    tl.assume(features > 0)
    by_scale = 0.0
    by_bias = 0.0
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        chunk_i, chunk_j = tile_position(tile, row_tiles, column_tiles, TILES)
        i = first_row_tile + chunk_i
        j = first_column_tile + chunk_j
        c = tile_scores(x, y, i * ROWS, j * COLUMNS, features, ROWS, COLUMNS, BLOCK_D, BULK)
        parts = parts_of(c, PART)
        for p in tl.static_range(COLUMNS // PART):
            h, hs = _store_weights(
                parts[p], i, j * (COLUMNS // PART) + p, chunk_i, chunk_j * (COLUMNS // PART) + p, x_valid, y_valid,
                stats, chunk, column_tiles * COLUMNS, x_ids, y_ids, rows, columns, loss, exponent_of_chunk, scale,
                inverse, N, M, x_sets, y_sets, K, L, GROUP, BULK, SHIFTED, MASKED,
            )  # fmt: skip
            by_scale += tl.sum(tl.ravel(hs), 0)
            if rows is None:
                by_bias += tl.sum(tl.ravel(h), 0)
    tl.store(sums + tl.program_id(0), by_scale)
    if rows is None:
        tl.store(sums + tl.num_programs(0) + tl.program_id(0), by_bias)
