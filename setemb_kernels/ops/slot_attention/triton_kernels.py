"""The Triton kernels of slot attention. `triton` beside this file launches them and says how they fit together.

Names: ``heads`` heads of q share a head of k and v, of which an item has ``groups``. ``item`` counts pairs of an item
of the batch and a group, ``row`` the ``heads * K`` slots of such a pair. ``padded``: T, rounded up to a multiple of 16.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from setemb_kernels._triton_products import add_product

# A @triton.jit function may read a module's constants only as tl.constexpr.
_LOG2_E = tl.constexpr(1 / math.log(2))


# --- tiles


@triton.jit
def _split(program, count):
    """A program's number as (number along the fastest axis, of ``count``; number along all others)."""
    return program % count, program // count


@triton.jit
def _valid_tokens(mask, b, t, end, mask_stride_b, mask_stride_t):
    """Which tokens t lie before `end` and are not masked."""
    valid = t < end
    if mask is not None:
        valid = tl.load(mask + b * mask_stride_b + t * mask_stride_t, mask=valid, other=0) != 0
    return valid


@triton.jit
def _products(
    rows, row_exists, tokens, token_valid, D, row_stride_d, token_stride_d,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Dot products ``[rows, tokens]`` of vectors that begin at pointers ``rows [rows]`` and ``tokens [tokens]``."""
    ROWS: tl.constexpr = rows.shape[0]
    TOKENS: tl.constexpr = tokens.shape[0]
    products = tl.zeros((ROWS, TOKENS), tl.float32)
    d = tl.arange(0, BLOCK_D)[None, :]
    for start in range(0, D, BLOCK_D):
        inside = d < D - start
        feature = (start + d).to(tl.int64)
        a = tl.load(rows[:, None] + feature * row_stride_d, mask=row_exists[:, None] & inside, other=0)
        b = tl.load(tokens[:, None] + feature * token_stride_d, mask=token_valid[:, None] & inside, other=0)
        products = add_product(products, a, b.T, PRECISION)
    return products


@triton.jit
def _attention(logits, slot_exists, SLOTS: tl.constexpr, GROUP: tl.constexpr):
    """The softmax over the slots of each head of ``logits [rows, tokens]``; 0 in slots that do not exist."""
    ROWS: tl.constexpr = logits.shape[0]
    TOKENS: tl.constexpr = logits.shape[1]
    z = tl.where(slot_exists[:, None], logits, float("-inf"))
    z = tl.reshape(z, (ROWS // (SLOTS * GROUP), SLOTS, GROUP, TOKENS))
    e = tl.exp2((z - tl.max(z, 1, keep_dims=True)) * _LOG2_E)
    return tl.reshape(e / tl.sum(e, 1, keep_dims=True), (ROWS, TOKENS))


@triton.jit
def _sum_over_slots(v, SLOTS: tl.constexpr, GROUP: tl.constexpr):
    """Sums ``[rows, tokens]`` over the slots of each head, and gives each of them the sum."""
    ROWS: tl.constexpr = v.shape[0]
    TOKENS: tl.constexpr = v.shape[1]
    heads = tl.reshape(v, (ROWS // (SLOTS * GROUP), SLOTS, GROUP, TOKENS))
    return tl.reshape(tl.broadcast_to(tl.sum(heads, 1, keep_dims=True), heads.shape), (ROWS, TOKENS))


@triton.jit
def _attention_tile(
    q, k, bias, mask, b, g, head_block, token_block, heads, K, T, D, scale,
    q_stride_b, q_stride_h, q_stride_k, q_stride_d, k_stride_b, k_stride_g, k_stride_t, k_stride_d,
    bias_stride_b, bias_stride_h, bias_stride_k, mask_stride_b, mask_stride_t,
    SLOTS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``A [ROWS, TOKENS]`` of a block of whole heads and one of tokens, and what and where they are.

    Rows are slot-major within blocks of 16 (GROUP heads of SLOTS slots), as in smooth-Chamfer: a tensor core leaves
    rows r and r + 8 to one thread.
    """
    r = tl.arange(0, ROWS)
    head = head_block * (ROWS // SLOTS) + r // (SLOTS * GROUP) * GROUP + r % GROUP
    slot = r // GROUP % SLOTS
    exists = (head < heads) & (slot < K)
    h = (g * heads + head).to(tl.int64)
    t = (token_block * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    valid = _valid_tokens(mask, b, t, T, mask_stride_b, mask_stride_t)
    logits = scale * _products(
        q + b * q_stride_b + h * q_stride_h + slot.to(tl.int64) * q_stride_k, exists,
        k + b * k_stride_b + g * k_stride_g + t * k_stride_t, valid, D, q_stride_d, k_stride_d, BLOCK_D, PRECISION,
    )  # fmt: skip
    if bias is not None:
        source = bias + b * bias_stride_b + h * bias_stride_h + slot.to(tl.int64) * bias_stride_k
        logits += tl.load(source, mask=exists, other=0).to(tl.float32)[:, None]
    return _attention(logits, slot < K, SLOTS, GROUP), h, slot, exists, t, valid


@triton.jit
def _divisor(total):
    """What to divide by so that the quotient is 0 where total is."""
    return tl.where(total > 0, total, float("inf"))[:, None]


# --- weights


@triton.jit(do_not_specialize=["token_blocks", "T", "mask_stride_b"])
def weights_kernel(
    q,  # [B, H, K, D], any strides, as all inputs
    k,  # [B, groups, T, D]
    bias,  # [B, H, K] or None
    mask,  # [B, T] bool or None
    weights,  # [B, H, K, padded], of the dtype of q
    sums,  # [B, H, K, token_blocks] float32
    head_blocks, token_blocks, groups, heads, K, T, D, padded, scale, token_eps, factor,
    q_stride_b, q_stride_h, q_stride_k, q_stride_d, k_stride_b, k_stride_g, k_stride_t, k_stride_d,
    bias_stride_b, bias_stride_h, bias_stride_k, mask_stride_b, mask_stride_t,
    SLOTS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``W = A + token_eps`` times `factor`, 0 for tokens that are masked or do not exist, and the sums of its blocks.

    They are sums of the rounded weights, so that their quotient with the sums of weighted values is a mean.
    """
    head_block, rest = _split(tl.program_id(0), head_blocks)
    token_block, item = _split(rest, token_blocks)
    g, b = _split(item.to(tl.int64), groups)
    a, h, slot, exists, t, valid = _attention_tile(
        q, k, bias, mask, b, g, head_block, token_block, heads, K, T, D, scale,
        q_stride_b, q_stride_h, q_stride_k, q_stride_d, k_stride_b, k_stride_g, k_stride_t, k_stride_d,
        bias_stride_b, bias_stride_h, bias_stride_k, mask_stride_b, mask_stride_t,
        SLOTS, GROUP, ROWS, TOKENS, BLOCK_D, PRECISION,
    )  # fmt: skip
    w = tl.where(valid[None, :], (a + token_eps) * factor, 0.0).to(weights.dtype.element_ty)
    row = (b * groups * heads + h) * K + slot
    tl.store(weights + row[:, None] * padded + t[None, :], w, mask=exists[:, None] & (t < padded)[None, :])
    tl.store(sums + row * token_blocks + token_block, tl.sum(w.to(tl.float32), 1) / factor, mask=exists)


@triton.jit(do_not_specialize=["token_blocks", "T", "mask_stride_b"])
def logit_gradients_kernel(
    q, k, bias, mask,  # as in weights_kernel
    v,  # [B, groups, T, Dv]
    grad,  # [B, H, K, Dv]
    delta,  # [B, H, K] float32: grad . out
    total,  # [B, H, K] float32
    factors,  # [B] float32, powers of two, or None
    weights,  # [B, H, K, padded], of the dtype of q, or None
    logit_gradients,  # [B, H, K, padded], of the dtype of q, or None
    sums,  # [B, H, K, token_blocks] float32, or None: those of dz
    head_blocks, token_blocks, groups, heads, K, T, D, Dv, padded, scale, token_eps, factor,
    q_stride_b, q_stride_h, q_stride_k, q_stride_d, k_stride_b, k_stride_g, k_stride_t, k_stride_d,
    bias_stride_b, bias_stride_h, bias_stride_k, mask_stride_b, mask_stride_t,
    v_stride_b, v_stride_g, v_stride_t, v_stride_d, grad_stride_b, grad_stride_h, grad_stride_k, grad_stride_d,
    SLOTS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``W / total`` times `factor`, and ``dz`` divided by that of the item in `factors`.

    With ``n = A / total`` and ``u = grad . v - grad . out``: ``dz = n u - A sum_k(n u)``. n is at most 1, whereas grad
    / total may leave the range of 16 bits where a slot has hardly any weight.
    """
    head_block, rest = _split(tl.program_id(0), head_blocks)
    token_block, item = _split(rest, token_blocks)
    g, b = _split(item.to(tl.int64), groups)
    a, h, slot, exists, t, valid = _attention_tile(
        q, k, bias, mask, b, g, head_block, token_block, heads, K, T, D, scale,
        q_stride_b, q_stride_h, q_stride_k, q_stride_d, k_stride_b, k_stride_g, k_stride_t, k_stride_d,
        bias_stride_b, bias_stride_h, bias_stride_k, mask_stride_b, mask_stride_t,
        SLOTS, GROUP, ROWS, TOKENS, BLOCK_D, PRECISION,
    )  # fmt: skip
    row = (b * groups * heads + h) * K + slot
    divisor = _divisor(tl.load(total + row, mask=exists, other=0))
    place = row[:, None] * padded + t[None, :]
    stored = exists[:, None] & (t < padded)[None, :]
    if weights is not None:
        w = tl.where(valid[None, :], (a + token_eps) / divisor * factor, 0.0)
        tl.store(weights + place, w.to(weights.dtype.element_ty), mask=stored)
    if logit_gradients is not None:
        u = _products(
            grad + b * grad_stride_b + h * grad_stride_h + slot.to(tl.int64) * grad_stride_k, exists,
            v + b * v_stride_b + g * v_stride_g + t * v_stride_t, valid, Dv, grad_stride_d, v_stride_d,
            BLOCK_D, PRECISION,
        )  # fmt: skip
        u = (u - tl.load(delta + row, mask=exists, other=0)[:, None]) * (a / divisor)
        u -= a * _sum_over_slots(u, SLOTS, GROUP)
        u = tl.where(valid[None, :], u, 0.0)
        if sums is not None:
            tl.store(sums + row * token_blocks + token_block, tl.sum(u, 1), mask=exists)
        if factors is not None:
            u /= tl.load(factors + b)
        tl.store(logit_gradients + place, u.to(logit_gradients.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["rows"])
def delta_kernel(
    grad,  # [B, H, K, D]
    out,  # [B, H, K, D]
    delta,  # [B, H, K] float32
    rows, H, K, D,
    grad_stride_b, grad_stride_h, grad_stride_k, grad_stride_d, out_stride_b, out_stride_h, out_stride_k, out_stride_d,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``grad . out`` of ROWS slots."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    slot, rest = _split(row, K)
    h, b = _split(rest, H)
    exists = (row < rows)[:, None]
    first = (grad + b * grad_stride_b + h * grad_stride_h + slot * grad_stride_k)[:, None]
    second = (out + b * out_stride_b + h * out_stride_h + slot * out_stride_k)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
    products = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(0, D, BLOCK_D):
        inside = exists & (d < D - start)
        a = tl.load(first + (d + start) * grad_stride_d, mask=inside, other=0).to(tl.float32)
        products += a * tl.load(second + (d + start) * out_stride_d, mask=inside, other=0).to(tl.float32)
    tl.store(delta + row, tl.sum(products, 1), mask=row < rows)


# --- sums over tokens, and over slots


@triton.jit
def _total(sums, row, exists, token_blocks, eps):
    """The sums of all blocks of tokens, plus eps."""
    BLOCKS: tl.constexpr = 16
    block = tl.arange(0, BLOCKS)[None, :]
    parts = tl.zeros((row.shape[0], BLOCKS), tl.float32)
    for start in range(0, token_blocks, BLOCKS):
        inside = exists[:, None] & (block < token_blocks - start)
        parts += tl.load(sums + row[:, None] * token_blocks + (start + block), mask=inside, other=0)
    return tl.sum(parts, 1) + eps


@triton.jit(do_not_specialize=["splits", "items", "T", "token_blocks", "mask_stride_b"])
def gather_kernel(
    weights,  # [items, rows, padded]
    tokens,  # [B, groups, T, D]
    mask,  # [B, T] bool or None
    factors,  # [B] float32 or None: what the weights were divided by
    sums,  # [items, rows, token_blocks] float32: of weights, or None: no mean is taken
    out,  # [B, H, K, D], or partial [splits, items, rows, D] float32
    total,  # [items, rows] float32, or None
    row_blocks, feature_blocks, splits, items, groups, rows, K, T, D, padded, token_blocks, per_split, factor, eps,
    tokens_stride_b, tokens_stride_g, tokens_stride_t, tokens_stride_d, mask_stride_b, mask_stride_t,
    out_stride_b, out_stride_h, out_stride_k, out_stride_d,
    SPLIT: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each slot takes from its tokens: ``sum_t w_kt token_t`` times `factor`, or a mean. With SPLIT only the sums.

    A program makes ROWS slots and BLOCK_D features, of `per_split` tokens.
    """
    row_block, rest = _split(tl.program_id(0), row_blocks)
    feature_block, rest = _split(rest, feature_blocks)
    split, item = _split(rest, splits)
    g, b = _split(item.to(tl.int64), groups)
    row = row_block * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    d = (feature_block * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
    first = split * per_split
    end = tl.minimum(first + per_split, T)
    all_rows = item.to(tl.int64) * rows + row
    source = tokens + b * tokens_stride_b + g * tokens_stride_g + d * tokens_stride_d
    values = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for start in range(first, end, TOKENS):
        t = (start + tl.arange(0, TOKENS)).to(tl.int64)
        w = tl.load(
            weights + all_rows[:, None] * padded + t[None, :], mask=exists[:, None] & (t < padded)[None, :], other=0
        )
        valid = _valid_tokens(mask, b, t, end, mask_stride_b, mask_stride_t)
        block = tl.load(source + t[:, None] * tokens_stride_t, mask=valid[:, None] & (d < D), other=0)
        values = add_product(values, w, block, PRECISION)
    if factors is not None:
        factor *= tl.load(factors + b)
    values *= factor
    if SPLIT:
        part = split.to(tl.int64) * items * rows + all_rows
        tl.store(out + part[:, None] * D + d, values, mask=exists[:, None] & (d < D))
    else:
        if sums is not None:
            summed = _total(sums, all_rows, exists, token_blocks, eps)
            values /= _divisor(summed)
            tl.store(total + all_rows, summed, mask=row < tl.where(feature_block == 0, rows, 0))
        h = g * (rows // K) + row // K
        target = out + b * out_stride_b + h * out_stride_h + (row % K).to(tl.int64) * out_stride_k
        tl.store(target[:, None] + d * out_stride_d, values.to(out.dtype.element_ty), mask=exists[:, None] & (d < D))


@triton.jit(do_not_specialize=["splits", "rows", "token_blocks"])
def combine_kernel(
    partial,  # [splits, rows, D] float32
    sums,  # as in gather_kernel
    out,  # [B, H, K, D]
    total,  # as in gather_kernel
    feature_blocks, splits, rows, H, K, D, token_blocks, eps, out_stride_b, out_stride_h, out_stride_k, out_stride_d,
    ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sums over all splits, of ROWS slots and BLOCK_D features."""
    feature_block, row_block = _split(tl.program_id(0), feature_blocks)
    row = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    d = (feature_block * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
    inside = exists[:, None] & (d < D)
    values = tl.zeros((ROWS, BLOCK_D), tl.float32)
    part = row
    for _ in range(splits):
        values += tl.load(partial + part[:, None] * D + d, mask=inside, other=0)
        part += rows
    if sums is not None:
        summed = _total(sums, row, exists, token_blocks, eps)
        values /= _divisor(summed)
        tl.store(total + row, summed, mask=row < tl.where(feature_block == 0, rows, 0))
    slot, rest = _split(row, K)
    h, b = _split(rest, H)
    target = (out + b * out_stride_b + h * out_stride_h + slot * out_stride_k)[:, None] + d * out_stride_d
    tl.store(target, values.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["token_blocks", "T", "mask_stride_b"])
def spread_kernel(
    weights,  # [items, rows, padded]
    slots,  # [B, H, K, D]
    mask,  # [B, T] bool or None
    factors,  # [B] float32 or None: what the weights were divided by
    out,  # [items, T, D]
    feature_blocks, token_blocks, groups, rows, K, T, D, padded, factor,
    slots_stride_b, slots_stride_h, slots_stride_k, slots_stride_d, mask_stride_b, mask_stride_t,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each token takes from the slots of all heads: ``sum_k w_kt slot_k`` times `factor`, 0 where masked."""
    feature_block, rest = _split(tl.program_id(0), feature_blocks)
    token_block, item = _split(rest, token_blocks)
    item = item.to(tl.int64)
    g, b = _split(item, groups)
    t = (token_block * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    d = (feature_block * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
    columns = weights + item * rows * padded + t[None, :]
    source = slots + b * slots_stride_b + g * (rows // K) * slots_stride_h + d * slots_stride_d
    values = tl.zeros((TOKENS, BLOCK_D), tl.float32)
    for start in range(0, rows, ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        w = tl.load(columns + row * padded, mask=(row < rows) & (t < padded)[None, :], other=0)
        place = source + row // K * slots_stride_h + row % K * slots_stride_k
        block = tl.load(place, mask=(row < rows) & (d < D), other=0)
        values = add_product(values, w.T, block, PRECISION)
    if factors is not None:
        factor *= tl.load(factors + b)
    valid = _valid_tokens(mask, b, t, T, mask_stride_b, mask_stride_t)
    values = tl.where(valid[:, None], values * factor, 0.0)
    target = out + (item * T + t)[:, None] * D + d
    tl.store(target, values.to(out.dtype.element_ty), mask=(t < T)[:, None] & (d < D))
