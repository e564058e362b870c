"""The similarities of `op.set_similarity` in plain torch: the specification, forward and explicit backward, and the
fallback.

Sets are packed: set i of x is the rows ``x_offsets[i]`` to ``x_offsets[i + 1]`` of x; rows beyond the last offset
belong to no set. With ``c_kl`` the dot products of one pair of sets, g its upstream gradient, ``p_k`` the softmax of
``alpha c_kl`` over l, ``q_l`` that over k, ``[l = l*(k)]`` 1 at the largest of row k (the first of equals), else 0:

    similarity          w_kl = ds/dc_kl
    smooth_chamfer      p_kl / (2 |X|) + q_kl / (2 |Y|)
    chamfer             [l = l*(k)] / (2 |X|) + [k = k*(l)] / (2 |Y|)
    maxsim              [l = l*(k)]                          (mean: / |X|)
    soft_maxsim         p_kl                                 (mean: / |X|)
    max                 [(k, l) = (k*, l*)]
    match_probability   scale e (1 - e) / (|X| |Y|),         e = sigmoid(scale c_kl + bias)

    dX_n = sum over m of g_nm w Y_m,      dY_m = sum over n of g_nm w^T X_n
    ds/dalpha = -(sum over the softmaxes of weight times entropy) / alpha^2      (see smooth_chamfer's reference)
    ds/dscale = sum of e (1 - e) c_kl / (|X| |Y|),      ds/dbias = sum of e (1 - e) / (|X| |Y|)

16-bit inputs are computed in float32, float32 and float64 in themselves. Where the scores are finite so is the
similarity; what is out of range of its type becomes the largest finite value. Sets are padded a block at a time, and a
block of pairs holds ``BLOCK_ELEMENTS`` scores, or one pair's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from setemb_kernels.ops.set_similarity.layout import PackedSets, check_candidates, check_offsets

BLOCK_ELEMENTS = 1 << 21
"""Scores ``c_kl`` held at a time."""

SOFT = ("smooth_chamfer", "soft_maxsim")
BOTH_WAYS = ("smooth_chamfer", "chamfer")


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class _Sharpness(NamedTuple):
    """alpha (the scale of match_probability), its inverse and bias, in the accumulation type."""

    alpha: Tensor
    inverse: Tensor
    bias: Tensor


class _Padded(NamedTuple):
    """Some sets, padded to the longest of them."""

    vectors: Tensor  # [n, K, D] in the accumulation type, 0 where there is none
    valid: Tensor  # [n, K] bool
    rows: Tensor  # [n, K] of the packed tensor; 0 where there is none
    weight: Tensor  # [n] 1 / |set|, 0 for an empty one


class _Tile(NamedTuple):
    """Scores of pairs of sets, each x with the same m sets of y or each with one of its own (then m = 1)."""

    where: tuple[slice, slice]  # of the similarities, rows and columns
    x: _Padded  # n sets
    y: _Padded  # m sets, or n: one each
    own: bool  # one each
    c: Tensor  # [n, m, K, L]
    x_valid: Tensor  # [n, 1, K, 1]
    y_valid: Tensor  # [n or 1, m, 1, L]
    x_weight: Tensor  # [n, 1, 1, 1]
    y_weight: Tensor  # [n or 1, m, 1, 1]
    present: Tensor  # [n, m] both sets have a vector


def forward(
    x: Tensor,
    x_offsets: Tensor,
    y: Tensor,
    y_offsets: Tensor,
    candidates: Tensor | None,
    alpha: Tensor,
    bias: Tensor,
    kind: str,
    mean: bool,
    wide: bool = False,
) -> Tensor:
    """The similarity ``[N, M]`` or ``[N, C]``, in the dtype of x or, if `wide`, in what it was accumulated in. See
    `op.set_similarity`."""
    N, M = _check(x, x_offsets, y, y_offsets, candidates)
    a = _sharpness(alpha, bias, x)
    shape = (N, M) if candidates is None else candidates.shape
    out = x.new_zeros(shape, dtype=accumulate_dtype(x.dtype) if wide else x.dtype)
    for t in _tiles(x, x_offsets, y, y_offsets, candidates):
        s = torch.where(t.present, _similarity(t, a, kind, mean), 0)
        limit = min(torch.finfo(out.dtype).max, torch.finfo(s.dtype).max)
        out[t.where] = s.clamp(-limit, limit).to(out.dtype)
    return out if candidates is None else out.masked_fill_(candidates < 0, -math.inf)


def forward_of_codes(
    x: Tensor,
    x_scale: Tensor | None,
    x_offsets: Tensor,
    y: Tensor,
    y_scale: Tensor | None,
    y_offsets: Tensor,
    candidates: Tensor | None,
    alpha: Tensor,
    bias: Tensor,
    kind: str,
    mean: bool,
) -> Tensor:
    """The same of vectors that are int8 or float8 codes times a scale each, in float32. See `codes`."""
    xs, ys = PackedSets(x, x_offsets, x_scale), PackedSets(y, y_offsets, y_scale)
    xs, ys = (sets.decoded(torch.float32) for sets in (xs, ys))
    return forward(xs.rows, x_offsets, ys.rows, y_offsets, candidates, alpha, bias, kind, mean)


def backward(
    grad: Tensor,
    x: Tensor,
    x_offsets: Tensor,
    y: Tensor,
    y_offsets: Tensor,
    candidates: Tensor | None,
    alpha: Tensor,
    bias: Tensor,
    kind: str,
    mean: bool,
    need_x: bool,
    need_y: bool,
    need_alpha: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for x, y, alpha and bias from the upstream gradient of the similarity, in its dtype or wide; one that
    is not needed comes back empty ``[0]``."""
    _check(x, x_offsets, y, y_offsets, candidates)
    a = _sharpness(alpha, bias, x)
    dtype = accumulate_dtype(x.dtype)
    grad_x = torch.zeros_like(x, dtype=dtype) if need_x else None
    grad_y = torch.zeros_like(y, dtype=dtype) if need_y else None
    grad_alpha = torch.zeros((), dtype=torch.float64, device=x.device)
    grad_bias = torch.zeros_like(grad_alpha)
    for t in _tiles(x, x_offsets, y, y_offsets, candidates):
        g = torch.where(t.present, grad[t.where].to(dtype), 0)[..., None, None]
        w, by_alpha, by_bias = _weights(t, a, kind, mean)
        w = w * g
        of_y, of_x = ("nld", "nkd") if t.own else ("mld", "nkd")
        if grad_x is not None:
            _add(grad_x, t.x, torch.einsum(f"nmkl,{of_y}->{of_x}", w, t.y.vectors))
        if grad_y is not None:
            _add(grad_y, t.y, torch.einsum(f"nmkl,{of_x}->{of_y}", w, t.x.vectors))
        for total, part in ((grad_alpha, by_alpha), (grad_bias, by_bias)):
            total += torch.where(t.present, part.double() * g[..., 0, 0].double(), 0).sum()
    return (
        x.new_empty(0) if grad_x is None else grad_x.to(x.dtype),
        y.new_empty(0) if grad_y is None else grad_y.to(y.dtype),
        *_scalar_gradients(grad_alpha, grad_bias, alpha, bias, kind, need_alpha, need_bias),
    )


def paired_forward(
    x: Tensor,
    y: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    alpha: Tensor,
    bias: Tensor,
    kind: str,
    mean: bool,
) -> Tensor:
    """The similarity ``[P]`` of set p of x with set p of y, padded and masked ``[P, K, D]`` and ``[P, L, D]``, in what
    it is accumulated in. All scores of these pairs are stored, and nothing waits for a device."""
    t = _paired(x, y, x_mask, y_mask)
    s = torch.where(t.present, _similarity(t, _sharpness(alpha, bias, x), kind, mean), 0).squeeze(1)
    limit = torch.finfo(s.dtype).max
    return s.clamp(-limit, limit)


def paired_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    alpha: Tensor,
    bias: Tensor,
    kind: str,
    mean: bool,
    need_x: bool,
    need_y: bool,
    need_alpha: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Its gradients for x, y, alpha and bias, as of `backward`."""
    t = _paired(x, y, x_mask, y_mask)
    w, by_alpha, by_bias = _weights(t, _sharpness(alpha, bias, x), kind, mean)
    g = torch.where(t.present, grad[:, None].to(w.dtype), 0)
    w = (w * g[..., None, None]).squeeze(1)
    total_alpha, total_bias = (
        torch.where(t.present, part.double() * g.double(), 0).sum() for part in (by_alpha, by_bias)
    )
    with torch.autocast(x.device.type, enabled=False):
        by_x = torch.bmm(w, t.y.vectors).to(x.dtype) if need_x else x.new_empty(0)
        by_y = torch.bmm(w.transpose(1, 2), t.x.vectors).to(y.dtype) if need_y else y.new_empty(0)
    return (
        by_x,
        by_y,
        *_scalar_gradients(total_alpha, total_bias, alpha, bias, kind, need_alpha, need_bias),
    )


def _paired(x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None) -> _Tile:
    xs, ys = _of_padded(x, x_mask), _of_padded(y, y_mask)
    with torch.autocast(x.device.type, enabled=False):  # a backward pass may run within one
        c = torch.bmm(xs.vectors, ys.vectors.transpose(1, 2))[:, None]
    return _tile((slice(None), slice(None)), xs, ys, True, c, xs.valid.new_ones(len(x), 1))


def _of_padded(v: Tensor, mask: Tensor | None) -> _Padded:
    vectors = v.to(accumulate_dtype(v.dtype))
    valid = v.new_ones(v.shape[:2], dtype=torch.bool) if mask is None else mask
    if mask is not None:
        vectors = torch.where(mask[..., None], vectors, 0)
    count = valid.sum(1)
    weight = torch.where(count > 0, 1 / count.clamp(min=1).to(vectors.dtype), 0)
    return _Padded(vectors, valid, valid.new_empty(0, dtype=torch.int64), weight)


def _scalar_gradients(
    by_alpha: Tensor, by_bias: Tensor, alpha: Tensor, bias: Tensor, kind: str, need_alpha: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    if kind in SOFT:
        by_alpha = -by_alpha / alpha.double().to(by_alpha.device).square()
    return (
        by_alpha.to(alpha.device, alpha.dtype) if need_alpha else alpha.new_empty(0),
        by_bias.to(bias.device, bias.dtype) if need_bias else bias.new_empty(0),
    )


def _check(x: Tensor, x_offsets: Tensor, y: Tensor, y_offsets: Tensor, candidates: Tensor | None) -> tuple[int, int]:
    N, M = len(x_offsets) - 1, len(y_offsets) - 1
    if x.device.type == "cpu":
        check_offsets("x_offsets", x_offsets, len(x))
        check_offsets("y_offsets", y_offsets, len(y))
        if candidates is not None:
            check_candidates(candidates, M)
    return N, M


def _sharpness(alpha: Tensor, bias: Tensor, x: Tensor) -> _Sharpness:
    dtype = accumulate_dtype(x.dtype)
    limits = torch.finfo(dtype)
    alpha, bias = alpha.to(x.device, torch.float64), bias.to(x.device, torch.float64)
    inverse = (1 / alpha).clamp(-limits.max, limits.max)
    return _Sharpness(alpha.clamp(-limits.max, limits.max).to(dtype), inverse.to(dtype), bias.to(dtype))


def _tiles(x: Tensor, x_offsets: Tensor, y: Tensor, y_offsets: Tensor, candidates: Tensor | None) -> Iterator[_Tile]:
    N, M = len(x_offsets) - 1, len(y_offsets) - 1
    scores = _longest(x_offsets) * _longest(y_offsets)
    if N == 0 or M == 0 or scores == 0:
        return
    most = max(1, BLOCK_ELEMENTS // scores)  # pairs in a block
    if candidates is not None:
        # a column of candidates at a time; for "none" any set will do
        for column in range(candidates.shape[1]):
            for start in range(0, N, most):
                rows = slice(start, min(start + most, N))
                chosen = candidates[rows, column]
                xs = _padded(x, x_offsets, torch.arange(rows.start, rows.stop, device=x.device))
                ys = _padded(y, y_offsets, chosen.clamp(min=0))
                c = (xs.vectors @ ys.vectors.transpose(1, 2))[:, None]
                yield _tile((rows, slice(column, column + 1)), xs, ys, True, c, (chosen >= 0)[:, None])
        return
    columns = min(M, most)
    for start in range(0, N, most // columns):
        rows = slice(start, min(start + most // columns, N))
        xs = _padded(x, x_offsets, torch.arange(rows.start, rows.stop, device=x.device))
        for first in range(0, M, columns):
            part = slice(first, min(first + columns, M))
            ys = _padded(y, y_offsets, torch.arange(part.start, part.stop, device=x.device))
            (n, K, _), (m, L, _) = xs.vectors.shape, ys.vectors.shape
            c = (xs.vectors.flatten(0, 1) @ ys.vectors.flatten(0, 1).T).view(n, K, m, L).transpose(1, 2)
            yield _tile((rows, part), xs, ys, False, c, xs.valid.new_ones(n, m))


def _tile(where: tuple[slice, slice], x: _Padded, y: _Padded, own: bool, c: Tensor, wanted: Tensor) -> _Tile:
    by_y = (slice(None), None) if own else (None,)
    x_weight, y_weight = x.weight[:, None], y.weight[by_y]
    return _Tile(
        where=where,
        x=x,
        y=y,
        own=own,
        c=c,
        x_valid=x.valid[:, None, :, None],
        y_valid=y.valid[by_y][:, :, None, :],
        x_weight=x_weight[..., None, None],
        y_weight=y_weight[..., None, None],
        present=wanted & (x_weight > 0) & (y_weight > 0),
    )


def _longest(offsets: Tensor) -> int:
    return int(offsets.diff().max()) if len(offsets) > 1 else 0


def _padded(v: Tensor, offsets: Tensor, sets: Tensor) -> _Padded:
    begin, count = offsets[sets], offsets[sets + 1] - offsets[sets]
    place = torch.arange(max(1, int(count.max())), device=v.device)
    valid = place < count[:, None]
    rows = torch.where(valid, begin[:, None] + place, 0)
    dtype = accumulate_dtype(v.dtype)
    weight = torch.where(count > 0, 1 / count.clamp(min=1).to(dtype), 0)
    return _Padded(torch.where(valid[..., None], v[rows].to(dtype), 0), valid, rows, weight)


def _add(total: Tensor, sets: _Padded, part: Tensor) -> None:
    total.index_add_(0, sets.rows[sets.valid], part[sets.valid])


def _similarity(t: _Tile, a: _Sharpness, kind: str, mean: bool) -> Tensor:
    """``[n, m]``; anything where a set is empty."""
    valid = t.x_valid & t.y_valid
    if kind == "match_probability":
        e = torch.where(valid, torch.sigmoid(a.alpha * t.c + a.bias), 0)
        return (e.sum((2, 3), keepdim=True) * t.x_weight * t.y_weight)[..., 0, 0]
    if kind == "max":
        return torch.where(valid, t.c, -math.inf).amax((2, 3))

    def along(dim: int, of: Tensor) -> Tensor:
        maximum, _, total = _exponentials(t.c, valid, a.alpha, dim)
        if kind in SOFT:
            maximum = maximum + total.log() * a.inverse
        return torch.where(of, maximum, 0).sum((2, 3), keepdim=True)

    of_x = along(3, t.x_valid)
    if kind in BOTH_WAYS:
        s = of_x * (t.x_weight / 2) + along(2, t.y_valid) * (t.y_weight / 2)
    else:
        s = of_x * t.x_weight if mean else of_x
    return s[..., 0, 0]


def _weights(t: _Tile, a: _Sharpness, kind: str, mean: bool) -> tuple[Tensor, Tensor, Tensor]:
    """ds/dc ``[n, m, K, L]``, and what sums to the derivatives by alpha and by bias ``[n, m]``."""
    valid = t.x_valid & t.y_valid
    nothing = torch.zeros_like(t.c[..., 0, 0])
    if kind == "match_probability":
        z = a.alpha * t.c + a.bias
        slope = torch.where(valid, torch.sigmoid(z) * torch.sigmoid(-z), 0) * t.x_weight * t.y_weight
        by_scale = torch.where(slope != 0, slope * t.c, 0)  # 0 * inf
        return slope * a.alpha, by_scale.sum((2, 3)), slope.sum((2, 3))
    if kind == "max":
        scores = torch.where(valid, t.c, -math.inf).flatten(2)
        return _one(scores, 2).view(t.c.shape), nothing, nothing

    def along(dim: int) -> tuple[Tensor, Tensor]:
        if kind not in SOFT:
            return torch.where(valid, _one(torch.where(valid, t.c, -math.inf), dim), 0), nothing[..., None, None]
        maximum, e, total = _exponentials(t.c, valid, a.alpha, dim)
        p = e / total
        z = torch.where(p > 0, a.alpha * (t.c - maximum), 0)  # 0 * -inf
        return p, torch.where(valid.any(dim, keepdim=True), total.log() - (p * z).sum(dim, keepdim=True), 0)

    w, entropy = along(3)
    if kind in BOTH_WAYS:
        q, other = along(2)
        x_weight, y_weight = t.x_weight / 2, t.y_weight / 2
        w = w * x_weight + q * y_weight
        total = entropy.sum((2, 3), keepdim=True) * x_weight + other.sum((2, 3), keepdim=True) * y_weight
    else:
        x_weight = t.x_weight if mean else torch.ones_like(t.x_weight)
        w, total = w * x_weight, entropy.sum((2, 3), keepdim=True) * x_weight
    return w, total[..., 0, 0], nothing


def _one(scores: Tensor, dim: int) -> Tensor:
    """1 at the largest along dim, the first of equals; else 0."""
    return torch.zeros_like(scores).scatter_(dim, scores.argmax(dim, keepdim=True), 1)


def _exponentials(c: Tensor, valid: Tensor, alpha: Tensor, dim: int) -> tuple[Tensor, Tensor, Tensor]:
    """Along dim, kept: the largest, ``exp(alpha (c - largest))`` and its sum; 0, 0 and 1 where nothing is valid."""
    some = valid.any(dim, keepdim=True)
    maximum = torch.where(some, torch.where(valid, c, -math.inf).amax(dim, keepdim=True), 0)
    e = torch.where(valid, (alpha * (c - maximum)).exp(), 0)
    total = e.sum(dim, keepdim=True)
    return maximum, e, torch.where(some, total, 1)
