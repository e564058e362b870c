"""Slot attention on a GPU, in Triton, each token read once: the host side. `triton` says when this serves.

    forward     fused_forward_kernel     q, k, v -> out, total
    backward    fused_backward_kernel    q, k, v, grad, out, total -> dq, dk, dv, dbias

Where there would be too few programs, each takes a part of the tokens and combine_kernel adds up.
"""

from __future__ import annotations

import torch
from torch import Tensor

from setemb_kernels import _device, _triton
from setemb_kernels.ops.slot_attention import triton_fused_kernels as kernels
from setemb_kernels.ops.slot_attention import triton_shared as shared
from setemb_kernels.ops.slot_attention.layout import empty_like_slots

SUMS = 8192
"""Sums over tokens that a program keeps in registers, of a kernel that keeps nothing else."""

MOST_ROWS = 32
"""Slots of all heads that share keys; with more, registers are not enough for a tile."""


def config_of(heads: int, K: int, T: int, D: int, dtype: torch.dtype, backward: bool) -> shared.Config | None:
    """Tile sizes of the kernels that read each token once; None where they would not fit in registers.

    A tile holds all rows of an item, and all D features or all T tokens of it. Sizes are what compiles without a spill
    for sm_80, sm_90 and sm_100 alike.
    """
    slots = _triton.next_power_of_two(K)
    rows = max(16, _triton.next_power_of_two(heads) * slots)
    block_d = max(16, _triton.next_power_of_two(D))
    if dtype == torch.float32 or rows > MOST_ROWS:
        return None
    if rows * block_d > SUMS:
        return shared.Config(rows, 64, 128, 8, 3) if T <= 64 else None
    if backward:  # gradients of tokens are beside the sums
        return shared.Config(rows, max(16, min(32, SUMS // 2 // block_d)), block_d, 4, 3 if block_d >= 256 else 2)
    return shared.Config(rows, max(16, min(64, 2 * SUMS // block_d)), block_d, 8 if block_d >= 256 else 4, 3, True)


def _launch(q: Tensor, k: Tensor, D: int, backward: bool) -> tuple[shared.Config, int, int] | None:
    """Tile sizes, splits of the tokens and tokens of each, of the kernels that read each token once, where those serve;
    D: the larger of both numbers of features."""
    B, H, K, _ = q.shape
    groups, T = k.shape[1:3]
    config = config_of(H // groups, K, T, D, q.dtype, backward)
    if config is None or not T:
        return None
    programs, _ = _device.processors(q)
    splits = max(1, min(_triton.cdiv(2 * programs, B * groups), T // shared.SPLIT_TOKENS)) if config.tokens < T else 1
    per_split = max(1, _triton.cdiv(T, splits * config.tokens)) * config.tokens
    return config, max(1, _triton.cdiv(T, per_split)), per_split


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    eps: float,
    token_eps: float,
    factor: float,
    out: Tensor,
    total: Tensor,
) -> bool:
    """Fill out and total, where the kernel that reads each token once serves."""
    (B, H, K, D), groups, T, Dv = q.shape, k.shape[1], k.shape[2], v.shape[3]
    found = _launch(q, k, max(D, Dv), False)
    if found is None:
        return False
    config, splits, per_split = found
    into, sums = out, total
    if splits > 1:
        into, sums = (out.new_empty(shape, dtype=torch.float32) for shape in ((splits, B, H, K, Dv), (B, H, K, splits)))
    _triton.launch(
        kernels.fused_forward_kernel, B * groups * splits,
        (
            q, k, v, bias, mask, into, sums, splits, B * groups, groups, H // groups, K, T, D, Dv, per_split,
            scale, eps, token_eps, factor, *q.stride(), *k.stride(), *v.stride(), *_triton.strides(bias, 3),
            *_triton.strides(mask, 2), *out.stride(),
        ),
        SPLIT=splits > 1, ONE_BLOCK=max(D, Dv) <= config.block_d, **shared.layout(K), **config.launch(),
        PRECISION=_device.precision(),
    )  # fmt: skip
    if splits > 1:
        shared.combine(into, sums, out, total, splits, splits, eps)
    return True


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
) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """All gradients, where the kernel that reads each token once serves."""
    (B, H, K, D), groups, T, Dv = q.shape, k.shape[1], k.shape[2], out.shape[3]
    need_v = need_v and v is not None
    found = _launch(q, k, max(D, Dv), True)
    if found is None or not total.numel() or not (need_q or need_k or need_v or need_bias):
        return None
    config, splits, per_split = found
    grad_q = empty_like_slots(q, D) if need_q else None
    grad_k = k.new_empty(k.shape) if need_k else None
    grad_v = k.new_empty(v.shape) if v is not None and need_v else None
    sums = total.new_empty(B, H, K, splits) if need_bias else None
    into = grad_q
    if grad_q is not None and splits > 1:
        into = total.new_empty(splits, B, H, K, D)
    factors = shared.factors_of(grad) if q.dtype == torch.float16 else None
    factor = 2.0**15 if q.dtype == torch.float16 else 1.0  # of weights that are at most 1
    _triton.launch(
        kernels.fused_backward_kernel, B * groups * splits,
        (
            q, k, v, bias, mask, grad, out, total, factors, into, grad_k, grad_v, sums, splits, B * groups, groups,
            H // groups, K, T, D, Dv, per_split, scale, token_eps, factor, *q.stride(), *k.stride(),
            *_triton.strides(v, 4), *_triton.strides(bias, 3), *_triton.strides(mask, 2), *grad.stride(), *out.stride(),
            *_triton.strides(grad_q, 4),
        ),
        SPLIT=splits > 1, ONE_BLOCK=max(D, Dv) <= config.block_d, **shared.layout(K), **config.launch(),
        PRECISION=_device.precision(),
    )  # fmt: skip
    if grad_q is not None and into is not None and splits > 1:
        shared.combine(into, None, grad_q, None, splits, 0, 0.0)
    nothing = q.new_empty(0)
    by_bias = nothing if sums is None else (sums[..., 0] if splits == 1 else sums.sum(-1)).to(q.dtype)
    return *(nothing if g is None else g for g in (grad_q, grad_k, grad_v)), by_bias  # type: ignore[return-value]
