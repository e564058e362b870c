"""The Triton kernel that makes gradients of set similarities; names as in `triton_kernels`."""

from __future__ import annotations

import triton
import triton.language as tl

from setemb_kernels.ops.set_similarity.triton_kernels import (
    HARD,
    NONE,
    SIGMOID,
    SOFT,
    _number,
    _scores,
    _set,
    _sharpness,
    _sigmoid,
    _tile,
    _weight,
)

WAYS = tl.constexpr(256)  # parts that a search cuts a range into: two steps find one of 65536 sets


@triton.jit
def _owner(offsets, sets, block, OWN: tl.constexpr):
    """The set that owns a block of OWN rows, and which of its blocks it is; `sets` for rows of no set, which come last.

    Set s owns the blocks from ``offsets[s] // OWN + s`` on, one more than there are multiples of OWN within it. So it
    has enough whatever its size, some of them without a row, and nothing has to be summed up over the sets before. The
    set is looked for by each program, since a launch that writes all of them down takes the host longer.
    """
    first = sets - sets
    end = sets + 1
    while end - first > 1:
        step = tl.cdiv(end - first, WAYS)
        s = first + tl.arange(0, WAYS) * step
        begins = tl.load(offsets + s, mask=s < end, other=0) // OWN + s
        reached = tl.sum(((s < end) & (begins <= block)).to(tl.int32), 0)
        first += (tl.maximum(reached, 1) - 1) * step
        end = tl.minimum(end, first + step)
    return first.to(tl.int64), (block - tl.load(offsets + first) // OWN - first).to(tl.int32)


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
    candidates, order, bounds,  # [N, J] or None; pairs by set of y, and from where to where
    grad, state,  # as in state_kernel; state is None for SIGMOID
    out,  # [splits, own_rows, D]; unless ADD every row is written, 0 to those of no set
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
    owner, nth = _owner(own_offsets, own_sets, block, OWN)
    begin = tl.load(own_offsets + owner)
    rows = (tl.load(own_offsets + owner + 1, mask=owner < own_sets, other=own_rows) - begin).to(tl.int32)
    is_owned = (owner < own_sets) & (nth * OWN < rows)  # a block without a row meets nobody
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
    count = tl.where(is_owned, rows, 0)
    local = nth * OWN + tl.arange(0, OWN)
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
        if HOW != SIGMOID:
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
    inside = (local < (count if ADD else rows))[:, None] & (d < D)[None, :]
    if ADD:
        sums += tl.load(target, mask=inside, other=0)
    tl.store(target, sums.to(out.dtype.element_ty), mask=inside)
