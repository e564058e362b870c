"""Slot attention on a GPU, in Triton, each token read once: the host side. `triton` says when this serves.

    forward     fused_forward_kernel     q, k, v -> out, total
    backward    fused_backward_kernel    q, k, v, grad, out, total -> dq, dk, dv, dbias

Where there would be too few programs, each takes a part of the tokens and combine_kernel adds up.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

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


class Layout(NamedTuple):
    """Of a call all that its launch depends on, but for where tensors lie."""

    q: torch.Size
    k: torch.Size
    features: int
    """Of the result."""
    strides: tuple[tuple[int, ...] | None, ...]
    """Of all tensors of any strides, in the order of the kernel; None of one that is not there."""
    dtype: torch.dtype
    device: torch.device
    processors: int
    precision: str
    numbers: tuple[float, ...]
    needs: tuple[bool, ...] = ()
    """Of a backward call, which gradients."""


class Plan(NamedTuple):
    """What calls of one layout share."""

    launch: _triton.Launch
    splits: int
    """Of the tokens."""


@functools.lru_cache(_triton.LAYOUTS)
def _plan(layout: Layout) -> Plan | None:
    """Where the kernels that read each token once serve."""
    (B, H, K, D), (_, groups, T, _), Dv = layout.q, layout.k, layout.features
    is_backward = bool(layout.needs)
    config = config_of(H // groups, K, T, max(D, Dv), layout.dtype, is_backward)
    if config is None or not T:
        return None
    items = B * groups
    splits = 1
    if config.tokens < T:
        splits = max(1, min(_triton.cdiv(2 * layout.processors, items), T // shared.SPLIT_TOKENS))
    per_split = max(1, _triton.cdiv(T, splits * config.tokens)) * config.tokens
    splits = max(1, _triton.cdiv(T, per_split))
    axes = (4, 4, 4, 3, 2, 4, 4, 4)
    strides = (s or (0,) * n for s, n in zip(layout.strides, axes, strict=False))
    launch = _triton.Launch(
        kernels.fused_backward_kernel if is_backward else kernels.fused_forward_kernel, items * splits,
        (
            splits, items, groups, H // groups, K, T, D, Dv, per_split, *layout.numbers,
            *(stride for each in strides for stride in each),
        ),
        SPLIT=splits > 1, ONE_BLOCK=max(D, Dv) <= config.block_d, **shared.layout(K), **config.launch(),
        PRECISION=layout.precision,
    )  # fmt: skip
    return Plan(launch, splits)


def _plan_of(
    q: Tensor,
    k: Tensor,
    features: int,
    others: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
    needs: tuple[bool, ...] = (),
) -> Plan | None:
    strides = q.stride(), k.stride(), *(None if t is None else t.stride() for t in others)
    processors, _ = _device.processors(q)
    precision = _device.precision()
    return _plan(Layout(q.shape, k.shape, features, strides, q.dtype, q.device, processors, precision, numbers, needs))


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
    plan = _plan_of(q, k, v.shape[3], (v, bias, mask, out), (scale, eps, token_eps, factor))
    if plan is None:
        return False
    into, sums, splits = out, total, plan.splits
    if splits > 1:
        into = out.new_empty(splits, *out.shape, dtype=torch.float32)
        sums = out.new_empty(*total.shape, splits, dtype=torch.float32)
    plan.launch(q, k, v, bias, mask, into, sums)
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
    need_v = need_v and v is not None
    if not total.numel() or not (need_q or need_k or need_v or need_bias):
        return None
    grad_q = empty_like_slots(q, q.shape[3]) if need_q else None
    factor = 2.0**15 if q.dtype == torch.float16 else 1.0  # of weights that are at most 1
    others = v, bias, mask, grad, out, grad_q
    needs = need_q, need_k, need_v, need_bias
    plan = _plan_of(q, k, out.shape[3], others, (scale, token_eps, factor), needs)
    if plan is None:
        return None
    splits = plan.splits
    grad_k = k.new_empty(k.shape) if need_k else None
    grad_v = k.new_empty(v.shape) if v is not None and need_v else None
    sums = total.new_empty(*total.shape, splits) if need_bias else None
    into = grad_q
    if grad_q is not None and splits > 1:
        into = total.new_empty(splits, *q.shape)
    factors = shared.factors_of(grad) if q.dtype == torch.float16 else None
    plan.launch(q, k, v, bias, mask, grad, out, total, factors, into, grad_k, grad_v, sums)
    if grad_q is not None and into is not None and splits > 1:
        shared.combine(into, None, grad_q, None, splits, 0, 0.0)
    nothing = q.new_empty(0)
    by_bias = nothing if sums is None else (sums[..., 0] if splits == 1 else sums.sum(-1)).to(q.dtype)
    return *(nothing if g is None else g for g in (grad_q, grad_k, grad_v)), by_bias  # type: ignore[return-value]
