"""Slot attention on a GPU, in CUDA C++: the host side. ``csrc/cuda/slot_attention.h`` says what the kernels do,
`reference` has the maths.

    forward     weights            q, k -> W ``[B, H, K, T]`` and its sums over blocks of tokens
                gather             W, v -> out, total
    backward    logit_gradients    q, k, grad, v -> W / total, dz ``[B, H, K, T]``, sums of dz (for the bias)
                gather             dz, k -> dq
                spread             dz, q -> dk, and W / total, grad -> dv

**Why weights pass through memory**, for a few items at a time (`WORKSPACE_BYTES`, which a level-2 cache holds): each
kernel is a plain product, for any number of rows, tokens and features, and sums over heads are part of it. R rows of W
add 4 R bytes to the 2 (Dk + Dv) of a token, mostly from the cache: 6 % for 8 slots and D = 128. Where a gather would
have too few blocks of threads, each takes a part of the tokens, and the parts are added in order: no atomics, the same
bits each time.

**Range.** Weights are stored in the dtype of the inputs, in float16 times a power of two: W so that the largest is just
in range (the little that a slot has which hardly any token chose still counts, as it is divided by its sum), dz by the
largest upstream gradient of its item. That gradient is an operand as it is: over total it could leave the range.

float32 is multiplied on tensor cores (tf32) where torch may do so for a plain product, operands and weights rounded to
the nearest. No call waits for the device; memory is torch's; all sizes come from shapes. So a CUDA graph can hold it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from setemb_kernels import _cuda, _device
from setemb_kernels.ops.slot_attention.layout import empty_like_slots

MAX_SLOTS = 64

WORKSPACE_BYTES = 32 << 20
"""What the weights of as many items as are processed at a time take; one item may need more."""

BLOCKS_A_MULTIPROCESSOR = 4
"""So many blocks of threads hide the memory's latency: a gather that has fewer splits its tokens."""

SPLIT_TOKENS = 256
"""Tokens that a block of threads sums over at least, before more of them are worth a second kernel."""

_TOKENS, _FEATURES = 64, 64  # csrc/cuda/slot_attention.h
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def refusal(q: Tensor) -> str:
    """Why these kernels cannot serve slots like q; empty when they can."""
    if q.dtype not in DTYPES:
        return f"q: expected float32, bfloat16 or float16, got {str(q.dtype)[6:]}"
    if q.shape[2] > MAX_SLOTS:
        return f"q: expected at most {MAX_SLOTS} slots, got {q.shape[2]}"
    return ""


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
    """The update ``[B, H, K, Dv]`` in the dtype of q and ``total [B, H, K]`` in float32. See `op.slot_attention`."""
    v = k if v is None else v
    out, total = empty_like_slots(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    if 0 in total.shape:
        return out, total
    factor = 1.0
    if q.dtype == torch.float16:  # the largest weight is just in range
        factor = 2.0 ** (15 - math.ceil(math.log2(1 + token_eps)))
    for items, (weights,) in _parts(q, k, workspaces=1):
        call = _Call(q[items], k[items], _of(bias, items), _of(mask, items), scale)
        sums = call.sums()
        _cuda.kernels().slot_attention_weights(
            call.q, call.k, call.bias, call.mask, weights, sums, scale, token_eps, factor, call.arithmetic
        )
        call.gather(weights, v[items], out[items], 1 / factor, sums=sums, total=total[items], eps=eps)
    return out, total


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
    ``[0]``. Memory beyond inputs and outputs: `WORKSPACE_BYTES`, and a few times that of out in float32; and where keys
    are the values, too (v is None), one more gradient of that size, as the two are made one by one."""
    if v is None:
        grad_q, grad_k, grad_v, grad_bias = backward(
            grad, q, k, k, bias, mask, out, total, scale, token_eps, need_q, need_k, need_k, need_bias
        )
        return grad_q, grad_k.add_(grad_v), k.new_empty(0), grad_bias
    allocate = k.new_zeros if 0 in total.shape else k.new_empty
    grad_q = empty_like_slots(q, q.shape[3]) if need_q else q.new_empty(0)
    grad_k, grad_v = allocate(k.shape if need_k else 0), allocate(v.shape if need_v else 0)
    grad_bias = q.new_empty(q.shape[:3] if need_bias else 0)
    need_logits = need_q or need_k or need_bias
    if 0 in total.shape or not (need_logits or need_v):
        return grad_q, grad_k, grad_v, grad_bias
    factor = 2.0**15 if q.dtype == torch.float16 else 1.0  # of weights that are at most 1
    delta = _delta(grad, out) if need_logits else None
    factors = _factors(grad) if need_logits and q.dtype == torch.float16 else None
    total = total.contiguous()
    for items, workspaces in _parts(q, k, workspaces=need_logits + need_v):
        call = _Call(q[items], k[items], _of(bias, items), _of(mask, items), scale)
        by_logit = workspaces.pop() if need_logits else None
        weights = workspaces.pop() if need_v else None
        sums, item_factors = call.sums() if need_bias else None, _of(factors, items)
        _cuda.kernels().slot_attention_logit_gradients(
            call.q, call.k, v[items], call.bias, call.mask, grad[items], _of(delta, items), total[items], item_factors,
            weights, by_logit, sums, scale, token_eps, factor, call.arithmetic,
        )  # fmt: skip
        if by_logit is not None and need_q:
            call.gather(by_logit, call.k, grad_q[items], scale, item_factors)
        if by_logit is not None and need_k:
            call.spread(by_logit, call.q, grad_k[items], scale, item_factors)
        if weights is not None:
            call.spread(weights, grad[items], grad_v[items], 1 / factor)
        if sums is not None:
            grad_bias[items] = sums.sum(-1)
    return grad_q, grad_k, grad_v, grad_bias


def _of(t: Tensor | None, items: slice) -> Tensor | None:
    return None if t is None else t[items]


def _up(n: int, step: int) -> int:
    return (n + step - 1) // step * step


def _parts(q: Tensor, k: Tensor, workspaces: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of the items, and so many workspaces ``[items, H, K, padded]`` for each, which share `WORKSPACE_BYTES`."""
    B, H, K, _ = q.shape
    padded = _up(k.shape[2], _TOKENS)
    most = WORKSPACE_BYTES // (workspaces * max(1, H * K * padded) * q.element_size())
    step = min(B, max(1, most))
    memory = [q.new_empty(step, H, K, padded) for _ in range(workspaces)]
    for first in range(0, B, step):
        items = slice(first, min(first + step, B))
        yield items, [weights[: items.stop - first] for weights in memory]


class _Call(NamedTuple):
    """The launches for some of the items."""

    q: Tensor
    k: Tensor
    bias: Tensor | None
    mask: Tensor | None
    scale: float

    @property
    def arithmetic(self) -> int:
        return _cuda.arithmetic(self.q.dtype)

    def sums(self) -> Tensor:
        """Memory for sums over blocks of tokens."""
        return self.q.new_empty(*self.q.shape[:3], _up(self.k.shape[2], _TOKENS) // _TOKENS, dtype=torch.float32)

    def gather(
        self,
        weights: Tensor,
        tokens: Tensor,
        out: Tensor,
        factor: float,
        factors: Tensor | None = None,
        sums: Tensor | None = None,
        total: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """Fill ``out [B, H, K, D]`` with sums over tokens ``[B, G, T, D]``, times `factor` and that of the item.

        Given sums of weights, fill `total`, too, and divide by it.
        """
        (B, H, K, D), G, T = out.shape, tokens.shape[1], tokens.shape[2]
        splits, per_split = self._splits(B * G, H // G * K, T, D)
        partial = out.new_empty(splits, B * H * K, D, dtype=torch.float32) if splits > 1 else None
        _cuda.kernels().slot_attention_gather(
            weights, tokens, self.mask, factors, sums, out, total, partial, per_split, factor, eps, self.arithmetic
        )

    def _splits(self, items: int, rows: int, T: int, D: int) -> tuple[int, int]:
        """Into how many parts tokens are split, and how many each has."""
        tile = 16 if rows <= 16 else 32 if rows <= 32 else 64
        blocks = items * -(-rows // tile) * max(1, -(-D // _FEATURES))
        programs, _ = _device.processors(self.q)
        splits = max(1, min(-(-BLOCKS_A_MULTIPROCESSOR * programs // blocks), T // SPLIT_TOKENS))
        per_split = max(_TOKENS, _up(-(-T // splits), _TOKENS))
        return max(1, -(-T // per_split)), per_split

    def spread(self, weights: Tensor, slots: Tensor, out: Tensor, factor: float, factors: Tensor | None = None) -> None:
        """Fill ``out [B, G, T, D]`` with sums over slots ``[B, H, K, D]``, times `factor` and that of the item."""
        _cuda.kernels().slot_attention_spread(weights, slots, self.mask, factors, out, factor, self.arithmetic)


def _delta(grad: Tensor, out: Tensor) -> Tensor:
    """``grad . out`` in float32. The kernel takes it from ``grad . v``, where grad is rounded in tf32: so it is here,
    for the two to cancel. (A NaN in grad reaches the difference by the other.)"""
    grad = _cuda.rounded_to_tf32(grad) if _cuda.in_tf32(grad.dtype) else grad.float()
    return (grad * out.float()).sum(-1).contiguous()


def _factors(grad: Tensor) -> Tensor:
    """For each item a power of two above its largest upstream gradient; 1 where that is not finite."""
    if not grad.numel():
        return grad.new_ones(len(grad), dtype=torch.float32)
    largest = torch.linalg.vector_norm(grad, ord=math.inf, dim=(1, 2, 3), dtype=torch.float32)
    return torch.where(largest.isfinite(), torch.frexp(largest).exponent.float(), 0.0).exp2()
