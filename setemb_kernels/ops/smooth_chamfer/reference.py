"""Smooth-Chamfer in plain torch: the specification of the op, forward and explicit backward, and its fallback.

The backward, in words. With ``c_kl`` the dot products of one pair of sets, ``p_k`` the softmax of ``alpha c_kl`` over l
(one distribution for each row) and ``q_l`` the softmax over k (one for each column):

    ds/dc_kl   = p_kl / (2 |X|) + q_kl / (2 |Y|)                                   =: w_kl
    dX_n       = sum over m of g_nm w Y_m,      dY_m = sum over n of g_nm w^T X_n
    ds/dalpha  = -( 1/(2 |X|) sum_k H(p_k) + 1/(2 |Y|) sum_l H(q_l) ) / alpha^2

where H is the entropy: ``log sum_l exp(alpha c) = H(p) + alpha sum_l p c``, so the derivative of ``log(sum exp(alpha
c)) / alpha`` is ``(sum p c - log(sum exp(alpha c)) / alpha) / alpha = -H(p) / alpha^2``. In this form nothing of the
size of alpha c cancels.

Finite for any finite input: dot products that could leave the range of the accumulation type are computed on operands
scaled by a power of two (exact), and the similarity saturates at the largest finite value of its type. So are sums of
gradients; a gradient whose value is out of range of its type becomes infinite, as of any other op: a loss scaler looks
for that.

16-bit inputs are computed in float32, float32 and float64 in themselves. Rows of x are processed in blocks, so that the
working memory is bounded (``BLOCK_ELEMENTS`` scores) whatever N and M.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK_ELEMENTS = 1 << 21
"""Scores ``c_kl`` held at a time."""


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Operands(NamedTuple):
    """Inputs in the accumulation type, masked vectors zeroed, scaled so that no dot product overflows."""

    x: Tensor  # [N, K, D] times 2^-exponent
    y: Tensor  # [M, L, D]
    x_mask: Tensor  # [N, K] bool
    y_mask: Tensor  # [M, L] bool
    x_weight: Tensor  # [N]  1 / (2 |X|), 0 for an empty set
    y_weight: Tensor  # [M]
    alpha: Tensor  # [] of the scaled scores
    inverse_alpha: Tensor  # [] of the scaled scores
    exponent: Tensor  # [] int: true score = score * 2^exponent


def forward(
    x: Tensor, y: Tensor, alpha: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, wide: bool = False
) -> Tensor:
    """The similarity ``[N, M]``, in the dtype of x or, if `wide`, in what it was accumulated in. See
    `op.smooth_chamfer`."""
    args = _prepare(x, y, alpha, x_mask, y_mask)
    out = x.new_empty(x.shape[0], y.shape[0], dtype=accumulate_dtype(x.dtype) if wide else x.dtype)
    for rows, c, valid in _score_blocks(args):
        by_row = torch.where(args.x_mask[rows, None, :], _soft_maximum(c, valid, args, dim=3), 0)  # [n, M, K]
        by_column = torch.where(args.y_mask[None], _soft_maximum(c, valid, args, dim=2), 0)  # [n, M, L]
        s = (by_row * args.x_weight[rows, None, None]).sum(2) + (by_column * args.y_weight[:, None]).sum(2)
        s = torch.where((args.x_weight[rows, None] > 0) & (args.y_weight > 0), s, 0)
        out[rows] = _saturate(_ldexp(s, args.exponent), out.dtype)
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    alpha: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    need_x: bool,
    need_y: bool,
    need_alpha: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, y and alpha from the upstream ``grad [N, M]``; one that is not needed comes back empty
    ``[0]``."""
    args = _prepare(x, y, alpha, x_mask, y_mask)
    x_full, y_full = _zero_masked(x, x_mask), _zero_masked(y, y_mask)
    g, shrink = _shrink_gradient(grad.to(args.alpha.dtype), x_full, y_full)
    grad_x = torch.zeros_like(x_full) if need_x else None
    grad_y = torch.zeros_like(y_full) if need_y else None
    grad_alpha = torch.zeros_like(args.alpha, dtype=torch.float64)
    for rows, c, valid in _score_blocks(args):
        p, row_entropy = _softmax(c, valid, args.alpha, dim=3)
        q, column_entropy = _softmax(c, valid, args.alpha, dim=2)
        x_weight, y_weight = args.x_weight[rows, None, None], args.y_weight[:, None]
        w = (p * x_weight[..., None] + q * y_weight[..., None, :]) * g[rows, :, None, None]  # [n, M, K, L]
        if grad_x is not None:
            grad_x[rows] = torch.einsum("nmkl,mld->nkd", w, y_full)
        if grad_y is not None:
            grad_y += torch.einsum("nmkl,nkd->mld", w, x_full[rows])
        if need_alpha:
            entropy = (row_entropy * x_weight).sum(2) + (column_entropy * y_weight).sum(2)
            grad_alpha -= (entropy.double() * grad[rows].double()).sum()
    empty = x.new_empty(0)
    return (
        empty if grad_x is None else _ldexp(grad_x, shrink).to(x.dtype),
        x.new_empty(0) if grad_y is None else _ldexp(grad_y, shrink).to(y.dtype),
        (grad_alpha / alpha.double().to(x.device).square()).to(alpha.device, alpha.dtype)
        if need_alpha
        else x.new_empty(0),
    )


def _prepare(x: Tensor, y: Tensor, alpha: Tensor, x_mask: Tensor | None, y_mask: Tensor | None) -> _Operands:
    x, y = _zero_masked(x, x_mask), _zero_masked(y, y_mask)
    x_mask = x.new_ones(x.shape[:2], dtype=torch.bool) if x_mask is None else x_mask
    y_mask = y.new_ones(y.shape[:2], dtype=torch.bool) if y_mask is None else y_mask
    limits = torch.finfo(x.dtype)
    exponent = _excess_exponent(_largest_exponent(x) + _largest_exponent(y), x.shape[2], x.dtype)
    alpha = alpha.to(x.device, torch.float64)
    return _Operands(
        x=_ldexp(x, -exponent),
        y=y,
        x_mask=x_mask,
        y_mask=y_mask,
        x_weight=_half_mean_weight(x_mask, x.dtype),
        y_weight=_half_mean_weight(y_mask, y.dtype),
        alpha=_ldexp(alpha, exponent).clamp(limits.smallest_normal, limits.max).to(x.dtype),
        inverse_alpha=_ldexp(1 / alpha, -exponent).clamp(max=limits.max).to(x.dtype),
        exponent=exponent,
    )


def _zero_masked(v: Tensor, mask: Tensor | None) -> Tensor:
    v = v.to(accumulate_dtype(v.dtype))
    return v if mask is None else torch.where(mask[..., None], v, 0)


def _half_mean_weight(mask: Tensor, dtype: torch.dtype) -> Tensor:
    count = mask.sum(1).to(dtype)
    return torch.where(count > 0, 0.5 / count.clamp(min=1), 0)


def _largest_exponent(v: Tensor) -> Tensor:
    """The e of ``max |v| < 2^e``; 0 where v is empty, zero or not finite."""
    if v.numel() == 0:
        return torch.zeros((), dtype=torch.int32, device=v.device)
    return torch.frexp(v.abs().amax()).exponent.to(torch.int32)


def _excess_exponent(exponent: Tensor, terms: int, dtype: torch.dtype) -> Tensor:
    """How many powers of two a sum of `terms` products below ``2^exponent`` may leave the range of dtype by."""
    largest = 1023 if dtype == torch.float64 else 127
    return (exponent + math.ceil(math.log2(max(terms, 1))) + 1 - largest).clamp(min=0)


def _shrink_gradient(g: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """g times 2^-shrink, so that no sum of ``g w y`` overflows before it is scaled back."""
    terms = max(g.shape[0] * x.shape[1], g.shape[1] * y.shape[1])
    exponent = _largest_exponent(g) + torch.maximum(_largest_exponent(x), _largest_exponent(y))
    shrink = _excess_exponent(exponent, terms, g.dtype)
    return _ldexp(g, -shrink), shrink


def _ldexp(v: Tensor, exponent: Tensor) -> Tensor:
    """``v * 2^exponent`` in two steps, since 2^exponent alone may not be representable."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    return v * torch.exp2(half.to(v.dtype)) * torch.exp2((exponent - half).to(v.dtype))


def _saturate(v: Tensor, dtype: torch.dtype) -> Tensor:
    """v in dtype; what is finite or infinite becomes the nearest finite value, NaN stays."""
    limit = min(torch.finfo(dtype).max, torch.finfo(v.dtype).max)
    return v.clamp(-limit, limit).to(dtype)


def _score_blocks(args: _Operands) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows of x: the rows, scores ``c [n, M, K, L]`` and which of them are of two valid vectors."""
    (N, K, _), (M, L, _) = args.x.shape, args.y.shape
    block = max(1, BLOCK_ELEMENTS // max(1, M * K * L))
    y_flat = args.y.flatten(0, 1).T
    for start in range(0, N, block):
        rows = slice(start, min(start + block, N))
        x_flat = args.x[rows].flatten(0, 1)
        c = (x_flat @ y_flat).view(rows.stop - start, K, M, L).transpose(1, 2)
        yield rows, c, args.x_mask[rows, None, :, None] & args.y_mask[:, None, :]


def _shifted_exponentials(c: Tensor, valid: Tensor, alpha: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """``z = alpha (c - max)``, ``exp(z)`` and ``max`` over dim, with 0 for what is not valid."""
    if c.shape[dim] == 0:
        return c, c, c.new_zeros([n for d, n in enumerate(c.shape) if d != dim]).unsqueeze(dim)
    maximum = torch.where(valid, c, -math.inf).amax(dim, keepdim=True)
    maximum = torch.where(valid.any(dim, keepdim=True), maximum, 0)
    z = torch.where(valid, alpha * (c - maximum), 0)
    return z, torch.where(valid, z.exp(), 0), maximum


def _soft_maximum(c: Tensor, valid: Tensor, args: _Operands, dim: int) -> Tensor:
    """``log(sum exp(alpha c)) / alpha`` over dim; garbage but finite where nothing is valid."""
    _, e, maximum = _shifted_exponentials(c, valid, args.alpha, dim)
    total = e.sum(dim)
    return maximum.squeeze(dim) + torch.where(total > 0, total, 1).log() * args.inverse_alpha + 0 * total


def _softmax(c: Tensor, valid: Tensor, alpha: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """The softmax of ``alpha c`` over dim and its entropy; zeros where nothing is valid."""
    z, e, _ = _shifted_exponentials(c, valid, alpha, dim)
    total = e.sum(dim, keepdim=True)
    total = torch.where(total == 0, 1, total)
    p = e / total
    z = torch.where(p > 0, z, 0)  # 0 * -inf
    return p, total.log().squeeze(dim) - (p * z).sum(dim)
