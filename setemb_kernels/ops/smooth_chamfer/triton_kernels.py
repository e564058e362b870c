"""The Triton kernels of smooth-Chamfer. `triton` beside this file launches them and says how they fit together.

Names: ``scale`` is alpha log2(e), so that ``exp(alpha c) = exp2(scale c)``; ``c`` scores; ``p``, ``q`` softmaxes
over l and k. The pairs of a part of a tile have the axes ``[block, group, m]``, their scores ``[block, k, group, l,
m]``: set n = block * GROUP + group of x with set m of y.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from setemb_kernels.ops.smooth_chamfer.triton_packing import (
    PEAKS,
    X_LONGEST,
    Y_LONGEST,
    chunk_exponent,
    gradient_exponent,
    ldexp,
    power_of_two,
)

# A @triton.jit function may read a module's constants only as tl.constexpr.
_LOG2_E = tl.constexpr(1 / math.log(2))
_FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)
_FLOAT32_SMALLEST = tl.constexpr(1.1754943508222875e-38)
UNSHIFTED = tl.constexpr(
    56.0
)  # 2^-56 <= exp(alpha c) <= 2^56 needs no shift: sums and their inverses are normal numbers
_INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


# --- arithmetic


@triton.jit
def saturate(v, LIMIT: tl.constexpr):
    """v within [-LIMIT, LIMIT]; NaN stays."""
    v = tl.where(v > LIMIT, LIMIT, v)
    return tl.where(v < -LIMIT, -LIMIT, v)


@triton.jit
def _multiply(a, b):
    return a * b


@triton.jit
def _log2(v):
    """Absolute error 2^-22 for v near 1, relative 2^-22 elsewhere, in one instruction (tl.log2 takes twenty)."""
    if _INTERPRETED:
        result = tl.log2(v)
    else:
        result = tl.inline_asm_elementwise(
            "lg2.approx.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
        )
    return result


@triton.jit
def reciprocal(v):
    """1 / v of a normal v, relative error 2^-23, in one instruction (a division takes ten)."""
    if _INTERPRETED:
        result = 1.0 / v
    else:
        result = tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [v], dtype=tl.float32, is_pure=True, pack=1
        )
    return result


@triton.jit
def _add_multiply(exponent_a, mantissa_a, exponent_b, mantissa_b):
    return exponent_a + exponent_b, mantissa_a * mantissa_b


@triton.jit
def log2_of_product(v, axis: tl.constexpr):
    """``log2(prod(v, axis))`` of up to 64 positive normal v: exponents are added, exactly, and mantissas multiplied."""
    bits = v.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True)
    exponent, mantissa = tl.reduce((bits >> 23, mantissa), axis, _add_multiply)
    return (exponent - 127 * v.shape[axis]).to(tl.float32) + _log2(mantissa)


@triton.jit
def sum_of_log2(v, axis: tl.constexpr):
    """``sum(log2(v), axis)`` by one logarithm."""
    if _INTERPRETED or v.shape[axis] > 64:  # noqa: SIM108 -- interpreted, a reduction by our function takes seconds
        result = tl.sum(_log2(v), axis)
    else:
        result = log2_of_product(v, axis)
    return result


@triton.jit
def sharpness(alpha, ALPHA_ON_DEVICE: tl.constexpr):
    """alpha log2(e) and its inverse, both within the range of float32."""
    if ALPHA_ON_DEVICE:
        alpha = tl.load(alpha).to(tl.float32)
    scale = alpha * _LOG2_E
    inverse = tl.minimum(tl.div_rn(1.0, scale), _FLOAT32_MAX)
    return tl.minimum(tl.maximum(scale, _FLOAT32_SMALLEST), _FLOAT32_MAX), inverse


# --- tiles of scores


@triton.jit
def tile_position(tile, row_tiles, column_tiles, TILES: tl.constexpr):
    """Row and column of a tile: down TILES tiles before one to the right, to find operands in the cache."""
    band = tile // (TILES * column_tiles)
    first = band * TILES
    height = tl.minimum(row_tiles - first, TILES)
    within = tile - band * TILES * column_tiles
    return first + within % height, within // height


@triton.jit
def _load(operand, row, d, features, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BULK: tl.constexpr):
    """``[ROWS, BLOCK_D]`` of a packed operand, given as a descriptor for the bulk copy engine or as a pointer."""
    if BULK:
        block = operand.load([row, d])
    else:
        rows = row + tl.arange(0, ROWS)
        block = tl.load(operand + rows.to(tl.int64)[:, None] * features + (d + tl.arange(0, BLOCK_D))[None, :])
    return block


@triton.jit
def tile_scores(
    x, y, row, column, features,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_D: tl.constexpr, BULK: tl.constexpr,
):  # fmt: skip
    """``c [ROWS, COLUMNS]`` of two packed operands."""
    c = tl.zeros((ROWS, COLUMNS), tl.float32)
    for d in range(0, features, BLOCK_D):
        a = _load(x, row, d, features, ROWS, BLOCK_D, BULK)
        b = _load(y, column, d, features, COLUMNS, BLOCK_D, BULK)
        c = tl.dot(a, b.T, c)
    return c


@triton.jit
def tile_pointers(array, i, j, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers to tile (i, j) of an array ``[_, columns]`` of fewer than 2^31 elements, as any chunk is."""
    row = i * ROWS + tl.arange(0, ROWS)
    column = j * COLUMNS + tl.arange(0, COLUMNS)
    return array + row[:, None] * columns + column[None, :]


@triton.jit
def tiles_served(tiles, scale, stats, SHIFTED: tl.constexpr, ALONE: tl.constexpr):
    """All tiles, or none where it is for the other variant of a kernel to serve; the unshifted one serves where
    |alpha c| is bounded."""
    if not ALONE:
        bounded = scale * tl.load(stats + X_LONGEST) * tl.load(stats + Y_LONGEST) <= UNSHIFTED  # false for NaN
        tiles = tl.where(bounded != SHIFTED, tiles, 0)
    return tiles


@triton.jit
def largest(c):
    """|c| at most, infinite for NaN."""
    size = tl.where(c == c, tl.abs(c), float("inf"))
    return tl.max(tl.max(size, 1), 0)


@triton.jit
def _is_bounded(peak, x_exponent, y_exponent, scale):
    """Whether scores of at most `peak` need no shift: alike for a tile or for a part of one."""
    exponents = tl.max(tl.ravel(x_exponent), 0) + tl.max(tl.ravel(y_exponent), 0)
    return (peak * scale <= UNSHIFTED) & (exponents == 0)


@triton.jit
def without_invalid(c, x_valid, y_valid):
    """Scores with -inf where one of the two vectors is masked or does not exist."""
    row_valid = tl.load(x_valid + tl.arange(0, c.shape[0])) != 0
    column_valid = tl.load(y_valid + tl.arange(0, c.shape[1])) != 0
    return tl.where(row_valid[:, None] & column_valid[None, :], c, float("-inf"))


@triton.jit
def parts_of(c, PART: tl.constexpr):
    """A tile cut into one or two parts of PART columns: what is summed up at a time has to fit into registers."""
    if c.shape[1] > PART:  # noqa: SIM108
        parts = tl.split(tl.permute(tl.reshape(c, (c.shape[0], 2, PART)), (0, 2, 1)))
    else:
        parts = (c,)
    return parts


@triton.jit
def sets_of(i, j, BLOCKS: tl.constexpr, GROUP: tl.constexpr, Y_SETS: tl.constexpr):
    """Which sets the pairs of part (i, j) are of: ``n [block, group, 1]``, ``m [1, 1, m]``."""
    n = tl.reshape(tl.arange(0, BLOCKS * GROUP), (BLOCKS, GROUP, 1))
    m = tl.reshape(tl.arange(0, Y_SETS), (1, 1, Y_SETS))
    return i * (BLOCKS * GROUP) + n, j * Y_SETS + m


@triton.jit
def stats_of(stats, n, m, x_sets, y_sets):
    """Weights and exponents of sets n of x and m of y."""
    x = stats + PEAKS + n
    y = stats + PEAKS + 3 * x_sets + m
    return tl.load(x), tl.load(x + 2 * x_sets).to(tl.int32), tl.load(y), tl.load(y + 2 * y_sets).to(tl.int32)


@triton.jit
def pair_scale(scale, x_exponent, y_exponent):
    """The scale of the scores of each pair, for `_shifted`: ``[block, 1, group, 1, m]``."""
    scale = tl.minimum(scale * power_of_two(x_exponent) * power_of_two(y_exponent), _FLOAT32_MAX)
    return scale[:, None, :, None, :]


@triton.jit
def _shifted(c, axis: tl.constexpr, scale):
    """``z = scale (c - max)``, ``exp2(z)``, its sum and max over one axis; sum 1 and max 0 where no slot is valid."""
    top = tl.max(c, axis, keep_dims=True)
    top = tl.where(top == float("-inf"), 0.0, top)
    z = (c - top) * scale
    e = tl.exp2(z)
    total = tl.sum(e, axis, keep_dims=True)
    return z, e, tl.where(total == 0, 1.0, total), top


@triton.jit
def exponentials(c, scale, MASKED: tl.constexpr):
    """``exp2(scale c)`` of bounded scores ``c [block, k, group, l, m]``, and its sums over l and over k, 1 where no
    vector is valid: one exp for both."""
    e = tl.exp2(c * scale)
    by_row = tl.sum(e, 3, keep_dims=True)
    by_column = tl.sum(e, 1, keep_dims=True)
    if MASKED:
        by_row = tl.where(by_row == 0, 1.0, by_row)
        by_column = tl.where(by_column == 0, 1.0, by_column)
    return e, by_row, by_column


@triton.jit
def similarity_of(c, by_row, by_column, x_weight, y_weight, inverse):
    """``s [block, group, m]`` of bounded scores, from the sums of `exponentials`; not of one vector with one, where a
    logarithm over a small alpha would leave few digits."""
    pairs: tl.constexpr = (c.shape[0], c.shape[2], c.shape[4])
    if c.shape[1] == 1 and c.shape[3] == 1:
        return tl.reshape(c, pairs) * (x_weight + y_weight)
    of_rows = x_weight * tl.reshape(sum_of_log2(by_row, 1), pairs)
    return (of_rows + y_weight * tl.reshape(sum_of_log2(by_column, 3), pairs)) * inverse


@triton.jit
def similarity_unshifted(c, x_weight, y_weight, scale, inverse, MASKED: tl.constexpr):
    """The same from the scores alone."""
    _, by_row, by_column = exponentials(c, scale, MASKED)
    return similarity_of(c, by_row, by_column, x_weight, y_weight, inverse)


@triton.jit
def similarity_shifted(c, x_weight, y_weight, x_exponent, y_exponent, scale, inverse):
    """The similarity of any finite scores, shifted by the maximum of each row and of each column, with exponents."""
    pairs: tl.constexpr = (c.shape[0], c.shape[2], c.shape[4])
    unit = pair_scale(scale, x_exponent, y_exponent)
    _, _, total, top = _shifted(c, 3, unit)  # [block, k, group, 1, m]
    s = tl.reshape(tl.sum(top * x_weight[:, None, :, None, :], 1), pairs)
    log = tl.reshape(sum_of_log2(total, 1), pairs) * x_weight
    _, _, total, top = _shifted(c, 1, unit)  # [block, 1, group, l, m]
    s += tl.reshape(tl.sum(top * y_weight[:, None, :, None, :], 3), pairs)
    log += tl.reshape(sum_of_log2(total, 3), pairs) * y_weight
    log *= inverse * power_of_two(-x_exponent) * power_of_two(-y_exponent)
    return (s + log) * power_of_two(x_exponent) * power_of_two(y_exponent)


@triton.jit
def _store_similarity(
    c, i, j, x_valid, y_valid, stats, out, scale, inverse, N, M, x_sets, y_sets,
    K: tl.constexpr, L: tl.constexpr, GROUP: tl.constexpr,
    SHIFTED: tl.constexpr, LOOK: tl.constexpr, MASKED: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """The similarities of one part, from scores c to memory. Part (i, j) starts at row i * ROWS, column j * PART.
    LOOK: shift only if these scores ask for it."""
    BLOCKS: tl.constexpr = c.shape[0] // (K * GROUP)
    Y_SETS: tl.constexpr = c.shape[1] // L
    if LOOK:
        peak = largest(c)
    if MASKED:
        c = without_invalid(c, x_valid + i * c.shape[0], y_valid + j * c.shape[1])
    c = tl.reshape(c, (BLOCKS, K, GROUP, L, Y_SETS))
    n, m = sets_of(i, j, BLOCKS, GROUP, Y_SETS)
    x_weight, x_exponent, y_weight, y_exponent = stats_of(stats, n, m, x_sets, y_sets)
    if LOOK:
        if _is_bounded(peak, x_exponent, y_exponent, scale):
            s = similarity_unshifted(c, x_weight, y_weight, scale, inverse, MASKED)
        else:
            s = similarity_shifted(c, x_weight, y_weight, x_exponent, y_exponent, scale, inverse)
    elif SHIFTED:
        s = similarity_shifted(c, x_weight, y_weight, x_exponent, y_exponent, scale, inverse)
    else:
        s = similarity_unshifted(c, x_weight, y_weight, scale, inverse, MASKED)
    s = tl.where((x_weight != 0) & (y_weight != 0), saturate(s, LIMIT), 0.0)  # 0 next to an empty set; NaN stays
    tl.store(out + n.to(tl.int64) * M + m, s.to(out.dtype.element_ty), mask=(n < N) & (m < M))


@triton.jit(
    do_not_specialize=["N", "x_sets", "y_sets", "first_row_tile", "first_column_tile", "row_tiles", "column_tiles"]
)
def forward_kernel(
    x, y,  # packed operands [rows, features]: descriptors if BULK, else pointers; None where there are scores
    scores,  # [row_tiles ROWS, column_tiles COLUMNS] float32: of a chunk, made before; or None
    x_valid, y_valid,  # [rows] int8; None unless MASKED
    stats,  # see `triton_packing`
    out,  # [N, M]
    alpha, N, M, features, x_sets, y_sets, first_row_tile, first_column_tile, row_tiles, column_tiles,
    K: tl.constexpr, L: tl.constexpr,  # powers of two
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    TILES: tl.constexpr, FLATTEN: tl.constexpr, BULK: tl.constexpr,
    SHIFTED: tl.constexpr, ALONE: tl.constexpr, MASKED: tl.constexpr, ALPHA_ON_DEVICE: tl.constexpr,
    LIMIT: tl.constexpr,
):  # fmt: skip
    """Persistent: a program takes tiles in turn, and fetches operands of the next one while it sums up the last."""
    scale, inverse = sharpness(alpha, ALPHA_ON_DEVICE)
    tiles = tiles_served(row_tiles * column_tiles, scale, stats, SHIFTED, ALONE)
    tl.assume(features > 0)  # else the compiler makes a second epilogue for tiles without products
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        chunk_i, chunk_j = tile_position(tile, row_tiles, column_tiles, TILES)
        i = first_row_tile + chunk_i
        j = first_column_tile + chunk_j
        if scores is not None:
            c = tl.load(tile_pointers(scores, chunk_i, chunk_j, column_tiles * COLUMNS, ROWS, COLUMNS))
        else:
            c = tile_scores(x, y, i * ROWS, j * COLUMNS, features, ROWS, COLUMNS, BLOCK_D, BULK)
        parts = parts_of(c, PART)
        for p in tl.static_range(COLUMNS // PART):
            _store_similarity(
                parts[p], i, j * (COLUMNS // PART) + p, x_valid, y_valid, stats, out,
                scale, inverse, N, M, x_sets, y_sets, K, L, GROUP, SHIFTED, scores is not None, MASKED, LIMIT,
            )  # fmt: skip


# --- backward


@triton.jit
def weights_of(e, by_row, by_column, gx, gy):
    """``W = p gx + q gy`` of `exponentials`; gx, gy ``[block, group, m]``: upstream gradient times weight."""
    of_rows = gx[:, None, :, None, :] * reciprocal(by_row)
    return e * (of_rows + gy[:, None, :, None, :] * reciprocal(by_column))


@triton.jit
def weights_unshifted(c, gx, gy, scale, MASKED: tl.constexpr):
    """The same from bounded scores alone."""
    e, by_row, by_column = exponentials(c, scale, MASKED)
    return weights_of(e, by_row, by_column, gx, gy)


@triton.jit
def weights_shifted(c, gx, gy, unit):
    """W of any finite scores."""
    _, e, total, _ = _shifted(c, 3, unit)
    w = e * (gx[:, None, :, None, :] / total)
    _, e, total, _ = _shifted(c, 1, unit)
    return w + e * (gy[:, None, :, None, :] / total)


@triton.jit
def _entropy(c, unit, axis: tl.constexpr):
    """``sum over the other slots of log2 sum e - sum p z``: the entropies, in bits, of the softmaxes over one axis."""
    pairs: tl.constexpr = (c.shape[0], c.shape[2], c.shape[4])
    z, e, total, _ = _shifted(c, axis, unit)
    mean = tl.sum(e * tl.maximum(z, -1e4), axis, keep_dims=True) / total
    other: tl.constexpr = 4 - axis
    return tl.reshape(sum_of_log2(total, other) - tl.sum(mean, other), pairs)


@triton.jit
def _store_weights(
    c, i, j, chunk_i, chunk_j, x_valid, y_valid, stats, grad, exponent, exponent_of_chunk, chunk, chunk_columns,
    alpha_part, scale, N, M, x_sets, y_sets, stride_n, stride_m,
    K: tl.constexpr, L: tl.constexpr, GROUP: tl.constexpr,
    BULK: tl.constexpr, SHIFTED: tl.constexpr, LOOK: tl.constexpr, MASKED: tl.constexpr, NEED_CHUNK: tl.constexpr,
    NEED_ALPHA: tl.constexpr,
):  # fmt: skip
    """W of one part, from scores c to the chunk. LOOK: shift only if these scores ask for it."""
    ROWS: tl.constexpr = c.shape[0]
    COLUMNS: tl.constexpr = c.shape[1]
    BLOCKS: tl.constexpr = ROWS // (K * GROUP)
    Y_SETS: tl.constexpr = COLUMNS // L
    if LOOK:
        peak = largest(c)
    if MASKED:
        c = without_invalid(c, x_valid + i * ROWS, y_valid + j * COLUMNS)
    c = tl.reshape(c, (BLOCKS, K, GROUP, L, Y_SETS))
    n, m = sets_of(i, j, BLOCKS, GROUP, Y_SETS)
    x_weight, x_exponent, y_weight, y_exponent = stats_of(stats, n, m, x_sets, y_sets)
    exists = (n < N) & (m < M) & (x_weight != 0) & (y_weight != 0)
    g = tl.load(grad + n.to(tl.int64) * stride_n + m.to(tl.int64) * stride_m, mask=exists, other=0).to(tl.float32)
    if SHIFTED:
        unit = pair_scale(scale, x_exponent, y_exponent)
        if NEED_ALPHA:
            entropy = x_weight * _entropy(c, unit, 3) + y_weight * _entropy(c, unit, 1)
            part = tl.where(exists, ldexp(g, -exponent) * entropy, 0.0)
            tl.store(alpha_part, tl.sum(tl.reshape(part, (part.numel,)), 0))
        if NEED_CHUNK:
            g = ldexp(g, exponent_of_chunk + x_exponent + y_exponent)
            if LOOK:
                if _is_bounded(peak, x_exponent, y_exponent, scale):
                    w = weights_unshifted(c, g * x_weight, g * y_weight, scale, MASKED)
                else:
                    w = weights_shifted(c, g * x_weight, g * y_weight, unit)
            else:
                w = weights_shifted(c, g * x_weight, g * y_weight, unit)
    else:
        g = ldexp(g, exponent_of_chunk)
        w = weights_unshifted(c, g * x_weight, g * y_weight, scale, MASKED)
    if NEED_CHUNK:
        w = tl.reshape(w, (ROWS, COLUMNS))
        if BULK:
            chunk.store([chunk_i * ROWS, chunk_j * COLUMNS], w.to(chunk.dtype))
        else:
            tl.store(tile_pointers(chunk, chunk_i, chunk_j, chunk_columns, ROWS, COLUMNS), w.to(chunk.dtype.element_ty))


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
        "all_parts",
    ]
)
def weights_kernel(
    x, y, scores, x_valid, y_valid, stats,  # as in forward_kernel
    grad,  # [N, M], any strides
    chunk,  # [row_tiles ROWS, column_tiles COLUMNS], of the dtype of x: a descriptor if BULK; or None. May be scores
    alpha_parts,  # [all row tiles, all column parts] float32, or None
    alpha, N, M, features, x_sets, y_sets, stride_n, stride_m,
    first_row_tile, first_column_tile, row_tiles, column_tiles, all_parts,
    K: tl.constexpr, L: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, PART: tl.constexpr, BLOCK_D: tl.constexpr, GROUP: tl.constexpr,
    TILES: tl.constexpr, FLATTEN: tl.constexpr, BULK: tl.constexpr,
    SHIFTED: tl.constexpr, ALONE: tl.constexpr, MASKED: tl.constexpr, ALPHA_ON_DEVICE: tl.constexpr,
    NEED_CHUNK: tl.constexpr, NEED_ALPHA: tl.constexpr,
):  # fmt: skip
    """One chunk of W, scaled so that |W| <= 2^WEIGHT_EXPONENT, and sums over its parts for the gradient of alpha."""
    scale, _ = sharpness(alpha, ALPHA_ON_DEVICE)
    LOOK: tl.constexpr = (scores is not None) and not NEED_ALPHA  # that of alpha takes shifted ones
    exponent = gradient_exponent(stats)
    exponent_of_chunk = chunk_exponent(stats)
    tiles = tiles_served(row_tiles * column_tiles, scale, stats, SHIFTED, ALONE)
    tl.assume(features > 0)
    for tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), flatten=FLATTEN):
        chunk_i, chunk_j = tile_position(tile, row_tiles, column_tiles, TILES)
        i = first_row_tile + chunk_i
        j = first_column_tile + chunk_j
        if scores is not None:
            c = tl.load(tile_pointers(scores, chunk_i, chunk_j, column_tiles * COLUMNS, ROWS, COLUMNS))
            tl.debug_barrier()  # W may take their place
        else:
            c = tile_scores(x, y, i * ROWS, j * COLUMNS, features, ROWS, COLUMNS, BLOCK_D, BULK)
        parts = parts_of(c, PART)
        for p in tl.static_range(COLUMNS // PART):
            part_j = j * (COLUMNS // PART) + p
            alpha_part = alpha_parts
            if NEED_ALPHA:
                alpha_part += i * all_parts + part_j
            _store_weights(
                parts[p], i, part_j, chunk_i, chunk_j * (COLUMNS // PART) + p, x_valid, y_valid, stats, grad,
                exponent, exponent_of_chunk, chunk, column_tiles * COLUMNS, alpha_part, scale, N, M, x_sets, y_sets,
                stride_n, stride_m, K, L, GROUP, BULK, SHIFTED, LOOK, MASKED, NEED_CHUNK, NEED_ALPHA,
            )  # fmt: skip
