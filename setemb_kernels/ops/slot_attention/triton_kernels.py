"""The Triton kernels of slot attention. `triton` beside this file launches them and says how they fit together.

Names: ``heads`` heads of q share a head of k and v, of which an item has ``groups``; ``item`` counts pairs of an item of
the batch and a group; ``row`` counts the ``heads * K`` slots of such a pair. ``padded`` is T, rounded up to `ALIGNMENT`.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

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
        products = tl.dot(a, b.T, products, input_precision=PRECISION)
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

    Rows are slot-major within blocks of 16 (GROUP heads of SLOTS slots), as in smooth-Chamfer: a tensor core leaves rows
    r and r + 8 to one thread.
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


# --- weights


@triton.jit
def weights_kernel(
    q,  # [B, H, K, D], any strides, as all inputs
    k,  # [B, groups, T, D]
    bias,  # [B, H, K] or None
    mask,  # [B, T] bool or None
    weights,  # [B, H, K, padded], of the dtype of q
    head_blocks, token_blocks, groups, heads, K, T, D, padded, scale, token_eps, factor,
    q_stride_b, q_stride_h, q_stride_k, q_stride_d, k_stride_b, k_stride_g, k_stride_t, k_stride_d,
    bias_stride_b, bias_stride_h, bias_stride_k, mask_stride_b, mask_stride_t,
    SLOTS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``W = A + token_eps`` times `factor`, 0 for tokens that are masked or do not exist."""
    head_block, rest = _split(tl.program_id(0), head_blocks)
    token_block, item = _split(rest, token_blocks)
    g, b = _split(item.to(tl.int64), groups)
    a, h, slot, exists, t, valid = _attention_tile(
        q, k, bias, mask, b, g, head_block, token_block, heads, K, T, D, scale,
        q_stride_b, q_stride_h, q_stride_k, q_stride_d, k_stride_b, k_stride_g, k_stride_t, k_stride_d,
        bias_stride_b, bias_stride_h, bias_stride_k, mask_stride_b, mask_stride_t,
        SLOTS, GROUP, ROWS, TOKENS, BLOCK_D, PRECISION,
    )  # fmt: skip
    w = tl.where(valid[None, :], (a + token_eps) * factor, 0.0)
    row = (b * groups * heads + h) * K + slot
    target = weights + row[:, None] * padded + t[None, :]
    tl.store(target, w.to(weights.dtype.element_ty), mask=exists[:, None] & (t < padded)[None, :])


@triton.jit
def logit_gradients_kernel(
    q, k, bias, mask,  # as in weights_kernel
    v,  # [B, groups, T, Dv]
    grad,  # [B, H, K, Dv]
    delta,  # [B, H, K] float32: grad . out
    total,  # [B, H, K] float32
    factors,  # [B] float32, powers of two, or None
    weights,  # [B, H, K, padded], of the dtype of q, or None
    logit_gradients,  # [B, H, K, padded], of the dtype of q, or None
    head_blocks, token_blocks, groups, heads, K, T, D, Dv, padded, scale, token_eps, factor,
    q_stride_b, q_stride_h, q_stride_k, q_stride_d, k_stride_b, k_stride_g, k_stride_t, k_stride_d,
    bias_stride_b, bias_stride_h, bias_stride_k, mask_stride_b, mask_stride_t,
    v_stride_b, v_stride_g, v_stride_t, v_stride_d, grad_stride_b, grad_stride_h, grad_stride_k, grad_stride_d,
    SLOTS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """``W / total`` times `factor`, and ``dz`` divided by that of the item in `factors`.

    With ``n = A / total`` and ``u = grad . v - grad . out``: ``dz = n u - A sum_k(n u)``. n is at most 1, whereas grad /
    total may leave the range of 16 bits where a slot has hardly any weight.
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
    share = tl.load(total + row, mask=exists, other=0)
    share = tl.where(share > 0, 1 / tl.where(share > 0, share, 1.0), 0.0)[:, None]
    place = row[:, None] * padded + t[None, :]
    stored = exists[:, None] & (t < padded)[None, :]
    if weights is not None:
        w = tl.where(valid[None, :], (a + token_eps) * (share * factor), 0.0)
        tl.store(weights + place, w.to(weights.dtype.element_ty), mask=stored)
    if logit_gradients is not None:
        u = _products(
            grad + b * grad_stride_b + h * grad_stride_h + slot.to(tl.int64) * grad_stride_k, exists,
            v + b * v_stride_b + g * v_stride_g + t * v_stride_t, valid, Dv, grad_stride_d, v_stride_d,
            BLOCK_D, PRECISION,
        )  # fmt: skip
        u = (u - tl.load(delta + row, mask=exists, other=0)[:, None]) * (a * share)
        u -= a * _sum_over_slots(u, SLOTS, GROUP)
        if factors is not None:
            u *= 1 / tl.load(factors + b)
        u = tl.where(valid[None, :], u, 0.0)
        tl.store(logit_gradients + place, u.to(logit_gradients.dtype.element_ty), mask=stored)


@triton.jit
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
def _finish(values, sums, eps, NORMALIZE: tl.constexpr):
    """Sums over all tokens as they are written: the means of the forward pass with their denominators, or as is."""
    if NORMALIZE:
        sums += eps
        values = tl.where((sums > 0)[:, None], values / tl.where(sums > 0, sums, 1.0)[:, None], 0.0)
    return values, sums


@triton.jit
def gather_kernel(
    weights,  # [items, rows, padded]
    tokens,  # [B, groups, T, D]
    mask,  # [B, T] bool or None
    factors,  # [B] float32 or None: what the weights were divided by
    out,  # [B, H, K, D], or partial [splits, items, rows, D] float32
    sums,  # [B, H, K], or partial [splits, items, rows] float32
    row_blocks, feature_blocks, splits, items, groups, rows, K, T, D, padded, per_split, factor, scale, eps,
    tokens_stride_b, tokens_stride_g, tokens_stride_t, tokens_stride_d, mask_stride_b, mask_stride_t,
    out_stride_b, out_stride_h, out_stride_k, out_stride_d,
    NORMALIZE: tl.constexpr, SPLIT: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What each slot takes from its tokens: ``sum_t w_kt token_t`` and ``sum_t w_kt``, times `factor`, values `scale`.

    A program does so for ROWS slots, BLOCK_D features and `per_split` tokens.
    """
    row_block, rest = _split(tl.program_id(0), row_blocks)
    feature_block, rest = _split(rest, feature_blocks)
    split, item = _split(rest, splits)
    g, b = _split(item.to(tl.int64), groups)
    row = row_block * ROWS + tl.arange(0, ROWS)
    exists = (row < rows)[:, None]
    d = (feature_block * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
    first = split * per_split
    end = tl.minimum(first + per_split, T)
    weight_rows = weights + (item.to(tl.int64) * rows + row)[:, None] * padded
    source = tokens + b * tokens_stride_b + g * tokens_stride_g + d * tokens_stride_d
    values = tl.zeros((ROWS, BLOCK_D), tl.float32)
    sums_of_tokens = tl.zeros((ROWS, TOKENS), tl.float32)
    for start in range(first, end, TOKENS):
        t = (start + tl.arange(0, TOKENS)).to(tl.int64)
        w = tl.load(weight_rows + t[None, :], mask=exists & (t < padded)[None, :], other=0)
        valid = _valid_tokens(mask, b, t, end, mask_stride_b, mask_stride_t)
        block = tl.load(source + t[:, None] * tokens_stride_t, mask=valid[:, None] & (d < D), other=0)
        values = tl.dot(w, block, values, input_precision=PRECISION)
        sums_of_tokens += w.to(tl.float32)
    if factors is not None:
        factor *= tl.load(factors + b)
    total = tl.sum(sums_of_tokens, 1) * factor
    values *= factor * scale
    all_rows = item.to(tl.int64) * rows + row
    if SPLIT:
        part = split.to(tl.int64) * items * rows + all_rows
        tl.store(out + part[:, None] * D + d, values, mask=exists & (d < D))
        tl.store(sums + part, total, mask=row < tl.where(feature_block == 0, rows, 0))
    else:
        values, total = _finish(values, total, eps, NORMALIZE)
        h = g * (rows // K) + row // K
        target = out + b * out_stride_b + h * out_stride_h + (row % K).to(tl.int64) * out_stride_k
        tl.store(target[:, None] + d * out_stride_d, values.to(out.dtype.element_ty), mask=exists & (d < D))
        tl.store(sums + all_rows, total.to(sums.dtype.element_ty), mask=row < tl.where(feature_block == 0, rows, 0))


@triton.jit
def combine_kernel(
    partial,  # [splits, rows, D] float32
    partial_sums,  # [splits, rows] float32
    out,  # [B, H, K, D]
    sums,  # [B, H, K]
    feature_blocks, splits, rows, H, K, D, eps, out_stride_b, out_stride_h, out_stride_k, out_stride_d,
    NORMALIZE: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sums over all splits, of ROWS slots and BLOCK_D features."""
    feature_block, row_block = _split(tl.program_id(0), feature_blocks)
    row = row_block.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    exists = row < rows
    d = (feature_block * BLOCK_D + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
    inside = exists[:, None] & (d < D)
    values = tl.zeros((ROWS, BLOCK_D), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    part = row
    for _ in range(splits):
        values += tl.load(partial + part[:, None] * D + d, mask=inside, other=0)
        total += tl.load(partial_sums + part, mask=exists, other=0)
        part += rows
    values, total = _finish(values, total, eps, NORMALIZE)
    slot, rest = _split(row, K)
    h, b = _split(rest, H)
    target = (out + b * out_stride_b + h * out_stride_h + slot * out_stride_k)[:, None] + d * out_stride_d
    tl.store(target, values.to(out.dtype.element_ty), mask=inside)
    tl.store(sums + row, total.to(sums.dtype.element_ty), mask=row < tl.where(feature_block == 0, rows, 0))


@triton.jit
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
        values = tl.dot(w.T, block, values, input_precision=PRECISION)
    if factors is not None:
        factor *= tl.load(factors + b)
    valid = _valid_tokens(mask, b, t, T, mask_stride_b, mask_stride_t)
    values = tl.where(valid[:, None], values * factor, 0.0)
    target = out + (item * T + t)[:, None] * D + d
    tl.store(target, values.to(out.dtype.element_ty), mask=(t < T)[:, None] & (d < D))
