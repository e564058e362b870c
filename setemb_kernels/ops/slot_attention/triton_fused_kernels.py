"""The Triton kernels of slot attention that read each token once. `triton` says when they serve; names as there.

A program goes through a part of an item's tokens, a tile [ROWS, TOKENS] of all its rows at a time, and keeps the sums
over tokens in registers. So either all features are in one block (ONE_BLOCK), or all tokens in one tile: then features
come block after block.
"""

from __future__ import annotations

import triton
import triton.language as tl

from setemb_kernels._triton_products import add_product
from setemb_kernels.ops.slot_attention.triton_kernels import (
    _attention,
    _divisor,
    _products,
    _split,
    _sum_over_slots,
    _valid_tokens,
)


@triton.jit
def _rows(g, heads, K, SLOTS: tl.constexpr, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Head, slot, and whether there is such a one, of each row of a tile: slot-major within blocks of 16."""
    r = tl.arange(0, ROWS)
    head = r // (SLOTS * GROUP) * GROUP + r % GROUP
    slot = r // GROUP % SLOTS
    return (g * heads + head).to(tl.int64), slot.to(tl.int64), (head < heads) & (slot < K)


@triton.jit
def _load(first, exists, d, D, stride_d):
    """``[n, d]`` of vectors that begin at pointers ``first [n]``; 0 where there is nothing."""
    return tl.load(first[:, None] + d * stride_d, mask=exists[:, None] & (d < D), other=0)


@triton.jit(do_not_specialize=["splits", "items", "T", "mask_stride_b"])
def fused_forward_kernel(
    q,  # [B, H, K, D], any strides, as all inputs
    k,  # [B, groups, T, D]
    v,  # [B, groups, T, Dv]
    bias,  # [B, H, K] or None
    mask,  # [B, T] bool or None
    out,  # [B, H, K, Dv]; if SPLIT partial [splits, B, H, K, Dv] float32
    total,  # [B, H, K] float32; if SPLIT sums [B, H, K, splits]
    splits, items, groups, heads, K, T, D, Dv, per_split, scale, eps, token_eps, factor,
    q_stride_b, q_stride_h, q_stride_k, q_stride_d, k_stride_b, k_stride_g, k_stride_t, k_stride_d,
    v_stride_b, v_stride_g, v_stride_t, v_stride_d, bias_stride_b, bias_stride_h, bias_stride_k,
    mask_stride_b, mask_stride_t, out_stride_b, out_stride_h, out_stride_k, out_stride_d,
    SPLIT: tl.constexpr, ONE_BLOCK: tl.constexpr, SLOTS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``W = A + token_eps`` times `factor`, as rounded for the product, its sums, and those of weighted values."""
    split, item = _split(tl.program_id(0), splits)
    g, b = _split(item.to(tl.int64), groups)
    h, slot, exists = _rows(g, heads, K, SLOTS, GROUP, ROWS)
    row = (b * groups * heads + h) * K + slot
    d = tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
    slots = q + b * q_stride_b + h * q_stride_h + slot * q_stride_k
    shift = tl.zeros((ROWS,), tl.float32)
    if bias is not None:
        source = bias + b * bias_stride_b + h * bias_stride_h + slot * bias_stride_k
        shift = tl.load(source, mask=exists, other=0).to(tl.float32)
    if SPLIT:
        target = out + (split.to(tl.int64) * items * heads * K + row) * Dv
    else:
        target = out + b * out_stride_b + h * out_stride_h + slot * out_stride_k
    if ONE_BLOCK:
        queries = _load(slots, exists, d, D, q_stride_d)
    values = tl.zeros((ROWS, BLOCK_D), tl.float32)
    sums = tl.zeros((ROWS,), tl.float32)
    first = split * per_split
    end = tl.minimum(first + per_split, T)
    for start in range(first, end, TOKENS):
        t = (start + tl.arange(0, TOKENS)).to(tl.int64)
        valid = _valid_tokens(mask, b, t, end, mask_stride_b, mask_stride_t)
        keys = k + b * k_stride_b + g * k_stride_g + t * k_stride_t
        tokens = v + b * v_stride_b + g * v_stride_g + t * v_stride_t
        if ONE_BLOCK:
            c = add_product(
                tl.zeros((ROWS, TOKENS), tl.float32), queries, _load(keys, valid, d, D, k_stride_d).T, PRECISION
            )
        else:
            c = _products(slots, exists, keys, valid, D, q_stride_d, k_stride_d, BLOCK_D, PRECISION)
        a = _attention(c * scale + shift[:, None], slot < K, SLOTS, GROUP)
        w = tl.where(valid[None, :], (a + token_eps) * factor, 0.0).to(q.dtype.element_ty)
        sums += tl.sum(w.to(tl.float32), 1)
        if ONE_BLOCK:
            values = add_product(values, w, _load(tokens, valid, d, Dv, v_stride_d), PRECISION)
        else:  # the only tile
            divisor = _divisor(sums / factor + eps) * factor
            for begin in range(0, Dv, BLOCK_D):
                block = _load(tokens, valid, d + begin, Dv, v_stride_d)
                part = add_product(tl.zeros((ROWS, BLOCK_D), tl.float32), w, block, PRECISION) / divisor
                place = target[:, None] + (d + begin) * out_stride_d
                tl.store(place, part.to(out.dtype.element_ty), mask=exists[:, None] & (d + begin < Dv))
    sums /= factor
    if SPLIT:
        tl.store(target[:, None] + d, values / factor, mask=exists[:, None] & (d < Dv))
        tl.store(total + row * splits + split, sums, mask=exists)
    else:
        sums += eps
        tl.store(total + row, sums, mask=exists)
        if ONE_BLOCK:
            values = values / factor / _divisor(sums)
            place = target[:, None] + d * out_stride_d
            tl.store(place, values.to(out.dtype.element_ty), mask=exists[:, None] & (d < Dv))


@triton.jit
def _store_token_gradients(
    grad_k, grad_v, place, d, is_token, valid, dz, w, queries, grads, by_logit, factor, D, Dv,
    SAME: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``dk = dz^T q`` and ``dv = W^T grad`` of a tile of tokens and a block of features; 0 where masked."""
    nothing = tl.zeros((place.shape[0], d.shape[1]), tl.float32)
    if (grad_v is not None) or (SAME and (grad_k is not None)):
        dv = tl.where(valid[:, None], add_product(nothing, w.T, grads, PRECISION) / factor, 0.0)
    if grad_v is not None:
        inside = is_token[:, None] & (d < Dv)
        tl.store(grad_v + place[:, None] * Dv + d, dv.to(grad_v.dtype.element_ty), mask=inside)
    if grad_k is not None:
        dk = tl.where(valid[:, None], add_product(nothing, dz.T, queries, PRECISION) * by_logit, 0.0)
        if SAME:
            dk += dv
        inside = is_token[:, None] & (d < D)
        tl.store(grad_k + place[:, None] * D + d, dk.to(grad_k.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["splits", "items", "T", "mask_stride_b"])
def fused_backward_kernel(
    q, k, v, bias, mask,  # as in fused_forward_kernel
    grad, out,  # [B, H, K, Dv]
    total,  # [B, H, K] float32
    factors,  # [B] float32, powers of two, or None
    grad_q,  # [B, H, K, D], or None; if SPLIT partial [splits, B, H, K, D] float32
    grad_k, grad_v,  # [B, groups, T, D] and [B, groups, T, Dv] contiguous, or None
    sums,  # [B, H, K, splits] float32, or None: those of dz
    splits, items, groups, heads, K, T, D, Dv, per_split, scale, token_eps, factor,
    q_stride_b, q_stride_h, q_stride_k, q_stride_d, k_stride_b, k_stride_g, k_stride_t, k_stride_d,
    v_stride_b, v_stride_g, v_stride_t, v_stride_d, bias_stride_b, bias_stride_h, bias_stride_k,
    mask_stride_b, mask_stride_t, grad_stride_b, grad_stride_h, grad_stride_k, grad_stride_d,
    out_stride_b, out_stride_h, out_stride_k, out_stride_d,
    grad_q_stride_b, grad_q_stride_h, grad_q_stride_k, grad_q_stride_d,
    SPLIT: tl.constexpr, ONE_BLOCK: tl.constexpr, SLOTS: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, TOKENS: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All gradients at once; see `logit_gradients_kernel` for the maths. Where v is k, grad_v is None, and grad_k
    their sum."""
    SAME: tl.constexpr = v is None
    split, item = _split(tl.program_id(0), splits)
    item = item.to(tl.int64)
    g, b = _split(item, groups)
    h, slot, exists = _rows(g, heads, K, SLOTS, GROUP, ROWS)
    row = (b * groups * heads + h) * K + slot
    d = tl.arange(0, BLOCK_D)[None, :].to(tl.int64)
    slots = q + b * q_stride_b + h * q_stride_h + slot * q_stride_k
    upstream = grad + b * grad_stride_b + h * grad_stride_h + slot * grad_stride_k
    means = out + b * out_stride_b + h * out_stride_h + slot * out_stride_k
    shift = tl.zeros((ROWS,), tl.float32)
    if bias is not None:
        source = bias + b * bias_stride_b + h * bias_stride_h + slot * bias_stride_k
        shift = tl.load(source, mask=exists, other=0).to(tl.float32)
    divisor = _divisor(tl.load(total + row, mask=exists, other=0))
    by_logit = scale
    if factors is not None:
        logit_factor = tl.load(factors + b)
        by_logit *= logit_factor
    delta = tl.zeros((ROWS,), tl.float32)
    for begin in range(0, Dv, BLOCK_D):
        mean = _load(means, exists, d + begin, Dv, out_stride_d).to(tl.float32)
        delta += tl.sum(mean * _load(upstream, exists, d + begin, Dv, grad_stride_d).to(tl.float32), 1)
    if ONE_BLOCK:
        queries = _load(slots, exists, d, D, q_stride_d)
        grads = _load(upstream, exists, d, Dv, grad_stride_d)
    if grad_q is not None:
        if SPLIT:
            target = grad_q + (split.to(tl.int64) * items * heads * K + row) * D
        else:
            target = grad_q + b * grad_q_stride_b + h * grad_q_stride_h + slot * grad_q_stride_k
    dq = tl.zeros((ROWS, BLOCK_D), tl.float32)
    by_bias = tl.zeros((ROWS,), tl.float32)
    first = split * per_split
    end = tl.minimum(first + per_split, T)
    for start in range(first, end, TOKENS):
        t = (start + tl.arange(0, TOKENS)).to(tl.int64)
        is_token = t < end
        valid = _valid_tokens(mask, b, t, end, mask_stride_b, mask_stride_t)
        keys = k + b * k_stride_b + g * k_stride_g + t * k_stride_t
        if SAME:
            tokens = keys
            stride_d = k_stride_d
        else:
            tokens = v + b * v_stride_b + g * v_stride_g + t * v_stride_t
            stride_d = v_stride_d
        nothing = tl.zeros((ROWS, TOKENS), tl.float32)
        if ONE_BLOCK:
            key_tile = _load(keys, valid, d, D, k_stride_d)
            c = add_product(nothing, queries, key_tile.T, PRECISION)
            u = add_product(nothing, grads, _load(tokens, valid, d, Dv, stride_d).T, PRECISION)
        else:
            c = _products(slots, exists, keys, valid, D, q_stride_d, k_stride_d, BLOCK_D, PRECISION)
            u = _products(upstream, exists, tokens, valid, Dv, grad_stride_d, stride_d, BLOCK_D, PRECISION)
        a = _attention(c * scale + shift[:, None], slot < K, SLOTS, GROUP)
        u = (u - delta[:, None]) * (a / divisor)
        u -= a * _sum_over_slots(u, SLOTS, GROUP)
        u = tl.where(valid[None, :], u, 0.0)
        by_bias += tl.sum(u, 1)
        if factors is not None:
            u /= logit_factor
        dz = u.to(q.dtype.element_ty)
        w = tl.where(valid[None, :], (a + token_eps) / divisor * factor, 0.0).to(q.dtype.element_ty)
        place = item * T + t
        if ONE_BLOCK:
            _store_token_gradients(
                grad_k,
                grad_v,
                place,
                d,
                is_token,
                valid,
                dz,
                w,
                queries,
                grads,
                by_logit,
                factor,
                D,
                Dv,
                SAME,
                PRECISION,
            )
            if grad_q is not None:
                dq = add_product(dq, dz, key_tile, PRECISION)
        else:  # the only tile
            for begin in range(0, tl.maximum(D, Dv), BLOCK_D):
                column = d + begin
                queries = _load(slots, exists, column, D, q_stride_d)
                grads = _load(upstream, exists, column, Dv, grad_stride_d)
                _store_token_gradients(
                    grad_k, grad_v, place, column, is_token, valid, dz, w, queries, grads, by_logit, factor, D, Dv,
                    SAME, PRECISION,
                )  # fmt: skip
                if grad_q is not None:
                    block = _load(keys, valid, column, D, k_stride_d)
                    part = add_product(tl.zeros((ROWS, BLOCK_D), tl.float32), dz, block, PRECISION) * by_logit
                    inside = exists[:, None] & (column < D)
                    tl.store(target[:, None] + column * grad_q_stride_d, part.to(grad_q.dtype.element_ty), mask=inside)
    if sums is not None:
        tl.store(sums + row * splits + split, by_bias, mask=exists)
    if ONE_BLOCK and grad_q is not None:
        dq *= by_logit
        if SPLIT:
            tl.store(target[:, None] + d, dq, mask=exists[:, None] & (d < D))
        else:
            target = target[:, None] + d * grad_q_stride_d
            tl.store(target, dq.to(grad_q.dtype.element_ty), mask=exists[:, None] & (d < D))
