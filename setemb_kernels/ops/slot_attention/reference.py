"""One slot-attention step in plain torch: the specification of the op, forward and explicit backward, and its fallback.

With logits ``z_kt = scale q_k . k_t + bias_k`` over the valid tokens t of one head, ``A_kt`` their softmax over the
slots k, and weights ``W_kt = A_kt + token_eps``:

    total_k = sum_t W_kt + eps,      out_k = sum_t W_kt v_t / total_k            (0 where total_k is 0)

The backward, in words, from the inputs, ``out`` and ``total`` alone. With the upstream gradient g and
``h_k = g_k / total_k``:

    dout_k/dW_kt = (v_t - out_k) / total_k, so       dA_kt = h_k . v_t - h_k . out_k
    the softmax's own derivative                     dz_kt = A_kt (dA_kt - sum_j A_jt dA_jt)
    dq_k = scale sum_t dz_kt k_t,    dk_t = scale sum_k dz_kt q_k,    dbias_k = sum_t dz_kt,    dv_t = sum_k W_kt h_k

Nothing here couples two tokens but the sums over t, so tokens are processed in blocks and the working memory is bounded
(``BLOCK_ELEMENTS`` logits) whatever T. 16-bit inputs are computed in float32, float32 and float64 in themselves.

Without v the keys are the values too, and ``dk`` gets both of its gradients.

Keys and values may have one head for all heads of q (``G`` = 1 below): then the slots of all heads are rows of one
product, and the gradients of k and v are summed over heads as part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from setemb_kernels.ops.slot_attention.layout import empty_like_slots

BLOCK_ELEMENTS = 1 << 20
"""Logits held at a time."""


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Block(NamedTuple):
    """A block of tokens ``[.., t]``, in the accumulation type."""

    tokens: slice
    k: Tensor  # [B, G, t, Dk], masked tokens zeroed
    v: Tensor  # [B, G, t, Dv]
    attention: Tensor  # [B, G, R, t], 0 where masked
    weights: Tensor  # [B, G, R, t]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    eps: float,
    token_eps: float,
) -> tuple[Tensor, Tensor]:
    """The update ``[B, H, K, Dv]`` in the dtype of q and ``total [B, H, K]`` in the accumulation type. See `op`."""
    B, H, K, _ = q.shape
    G, R = k.shape[1], H // max(k.shape[1], 1) * K
    dtype = accumulate_dtype(q.dtype)
    features = (k if v is None else v).shape[3]
    numerator = q.new_zeros(B, G, R, features, dtype=dtype)
    total = q.new_full((B, G, R), eps, dtype=dtype)
    for block in _blocks(q, k, v, bias, mask, scale, token_eps):
        numerator += block.weights @ block.v
        total += block.weights.sum(-1)
    out = torch.where(total[..., None] > 0, numerator / total[..., None], 0 * numerator)
    return empty_like_slots(q, features).copy_(out.view(B, H, K, features)), total.view(B, H, K)


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    total: Tensor,
    scale: float,
    token_eps: float,
    need_q: bool,
    need_k: bool,
    need_v: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for q, k, v and bias from the upstream ``grad [B, H, K, Dv]``; one that is not needed comes back empty
    ``[0]``."""
    G, dtype = k.shape[1], accumulate_dtype(q.dtype)
    h = torch.where(total[..., None] > 0, grad.to(dtype) / total[..., None], 0)
    delta = _grouped((h * out.to(dtype)).sum(-1, keepdim=True), G)  # [B, G, R, 1]
    h = _grouped(h, G)
    q_rows = _grouped(q.to(dtype), G)
    grad_q = torch.zeros_like(q_rows) if need_q else None
    grad_k = k.new_zeros(k.shape) if need_k else None
    grad_v = v.new_zeros(v.shape) if v is not None and need_v else None
    grad_bias = q_rows.new_zeros(q_rows.shape[:3]) if need_bias else None
    for block in _blocks(q, k, v, bias, mask, scale, token_eps):
        by_value = block.weights.transpose(-1, -2) @ h
        if grad_v is not None:
            grad_v[:, :, block.tokens] = by_value.to(q.dtype)
        by_attention = h @ block.v.transpose(-1, -2) - delta
        inner = _sum_over_slots(block.attention * by_attention, q.shape[2])
        by_logit = block.attention * (by_attention - inner)
        if grad_k is not None:
            by_key = scale * (by_logit.transpose(-1, -2) @ q_rows)
            grad_k[:, :, block.tokens] = (by_key + by_value if v is None else by_key).to(k.dtype)
        if grad_q is not None:
            grad_q += scale * (by_logit @ block.k)
        if grad_bias is not None:
            grad_bias += by_logit.sum(-1)
    empty = q.new_empty(0)
    return (
        empty if grad_q is None else empty_like_slots(q, q.shape[3]).copy_(grad_q.view(q.shape)),
        q.new_empty(0) if grad_k is None else grad_k,
        q.new_empty(0) if grad_v is None else grad_v,
        q.new_empty(0) if grad_bias is None else grad_bias.view(q.shape[:3]).to(q.dtype),
    )


def _grouped(rows: Tensor, groups: int) -> Tensor:
    """``[B, H, K, ..]`` -> ``[B, G, R, ..]``: the slots of all heads that share keys and values."""
    B, H, K, *rest = rows.shape
    return rows.reshape(B, groups, H // max(groups, 1) * K, *rest)


def _sum_over_slots(rows: Tensor, slots: int) -> Tensor:
    """Sums ``[B, G, R, t]`` over the slots of each head, and gives each of them the sum."""
    heads = rows.unflatten(2, (-1, slots)) if slots else rows[:, :, None]
    return heads.sum(3, keepdim=True).expand_as(heads).flatten(2, 3)


def _valid_tokens(of: Tensor, tokens: slice, valid: Tensor | None, dtype: torch.dtype) -> Tensor:
    block = of[:, :, tokens].to(dtype)
    return block if valid is None else torch.where(valid, block, 0)  # 0 * NaN would be NaN


def _blocks(
    q: Tensor, k: Tensor, v: Tensor | None, bias: Tensor | None, mask: Tensor | None, scale: float, token_eps: float
) -> Iterator[_Block]:
    B, H, K, _ = q.shape
    G, T, dtype = k.shape[1], k.shape[2], accumulate_dtype(q.dtype)
    if B * H * K == 0:
        return
    rows = _grouped(q.to(dtype), G)
    step = max(1, BLOCK_ELEMENTS // (B * H * K))
    for start in range(0, T, step):
        tokens = slice(start, min(start + step, T))
        valid = None if mask is None else mask[:, None, tokens, None]
        keys = _valid_tokens(k, tokens, valid, dtype)
        values = keys if v is None else _valid_tokens(v, tokens, valid, dtype)
        logits = scale * (rows @ keys.transpose(-1, -2))  # [B, G, R, t]
        if bias is not None:
            logits = logits + _grouped(bias.to(dtype), G)[..., None]
        attention = logits.unflatten(2, (-1, K)).softmax(3).flatten(2, 3)
        weights = attention + token_eps
        if valid is not None:
            valid = valid.transpose(-1, -2)
            attention, weights = torch.where(valid, attention, 0), torch.where(valid, weights, 0)
        yield _Block(tokens, keys, values, attention, weights)
