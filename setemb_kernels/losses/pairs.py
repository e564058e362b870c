"""Smooth-Chamfer similarities of listed pairs, and their gradients: for the few pairs that a triplet loss touches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from setemb_kernels.losses.tiles import Gradients, Sets

CHUNK_ELEMENTS = 1 << 20
"""Elements of x and y gathered at a time, each."""


def similarities(sets: Sets, rows: Tensor, columns: Tensor) -> Tensor:
    """``[P]``: set ``rows[p]`` of x with set ``columns[p]`` of y, in ``sets.dtype``."""
    out = sets.x.new_empty(len(rows), dtype=sets.dtype)
    for chunk in _chunks(sets, len(rows)):
        out[chunk] = _similarity(sets, _gather(sets, rows[chunk], columns[chunk]))
    return out


def add_gradients(gradients: Gradients, rows: Tensor, columns: Tensor, by_similarity: Tensor) -> None:
    """Add what the gradients ``[P]`` of those similarities give."""
    sets, (need_x, need_y, need_alpha) = gradients.sets, gradients.needs
    for chunk in _chunks(sets, len(rows)):
        n, m, g = rows[chunk], columns[chunk], by_similarity[chunk]
        pairs = _gather(sets, n, m)
        p, row_entropy, q, column_entropy = _softmaxes(sets, pairs)
        x_weight, y_weight = (g / (2 * mask.sum(1).clamp(min=1)) for mask in (pairs.x_mask, pairs.y_mask))
        w = p * x_weight[:, None, None] + q * y_weight[:, None, None]
        if need_x:
            gradients.x.index_add_(0, n, w @ pairs.y)
        if need_y:
            gradients.y.index_add_(0, m, w.transpose(1, 2) @ pairs.x)
        if need_alpha:
            entropy = (row_entropy * x_weight + column_entropy * y_weight).sum(dtype=torch.float64)
            gradients.alpha -= (entropy / sets.alpha.to(entropy).square()).to(gradients.alpha.device)


class _Pairs(NamedTuple):
    """Vectors of listed pairs, masked ones zeroed."""

    x: Tensor  # [P, K, D]
    y: Tensor  # [P, L, D]
    x_mask: Tensor  # [P, K]
    y_mask: Tensor  # [P, L]


def _gather(sets: Sets, rows: Tensor, columns: Tensor) -> _Pairs:
    x, y = sets.x[rows].to(sets.dtype), sets.y[columns].to(sets.dtype)
    x_mask = x.new_ones(x.shape[:2], dtype=torch.bool) if sets.x_mask is None else sets.x_mask[rows]
    y_mask = y.new_ones(y.shape[:2], dtype=torch.bool) if sets.y_mask is None else sets.y_mask[columns]
    both = x_mask.any(1) & y_mask.any(1)  # next to an empty set nothing exists
    x_mask, y_mask = x_mask & both[:, None], y_mask & both[:, None]
    return _Pairs(torch.where(x_mask[..., None], x, 0), torch.where(y_mask[..., None], y, 0), x_mask, y_mask)


def _logits(sets: Sets, pairs: _Pairs) -> Tensor:
    """``alpha c [P, K, L]``, -inf for vectors that are not valid."""
    z = sets.alpha.to(pairs.x) * (pairs.x @ pairs.y.transpose(1, 2))
    return z.masked_fill_(~(pairs.x_mask[:, :, None] & pairs.y_mask[:, None]), -math.inf)


def _similarity(sets: Sets, pairs: _Pairs) -> Tensor:
    """``[P]``; see `setemb_kernels.smooth_chamfer`."""
    z = _logits(sets, pairs)
    by_row = torch.where(pairs.x_mask, z.logsumexp(2), 0).sum(1)
    by_column = torch.where(pairs.y_mask, z.logsumexp(1), 0).sum(1)
    s = by_row / pairs.x_mask.sum(1).clamp(min=1) + by_column / pairs.y_mask.sum(1).clamp(min=1)
    return s / (2 * sets.alpha.to(s))


def _softmaxes(sets: Sets, pairs: _Pairs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Softmaxes ``[P, K, L]`` over l and over k, 0 where not valid, and the sums of their entropies ``[P]``."""
    z = _logits(sets, pairs)
    results = []
    for dim in (2, 1):
        valid = pairs.x_mask[:, :, None] if dim == 2 else pairs.y_mask[:, None]
        log_p = torch.where(valid, z - z.logsumexp(dim, keepdim=True), -math.inf)
        p = log_p.exp()
        results += [p, -torch.where(p > 0, p * log_p, 0).sum((1, 2))]
    return results[0], results[1], results[2], results[3]


def _chunks(sets: Sets, count: int) -> Iterator[slice]:
    (_, K, D), L = sets.x.shape, sets.y.shape[1]
    step = max(1, CHUNK_ELEMENTS // max(1, max(K, L) * D))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
