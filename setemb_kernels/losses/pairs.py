"""Similarities of listed pairs, and their gradients: for the few pairs that a triplet loss touches."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from setemb_kernels.losses import tiles
from setemb_kernels.losses.tiles import Gradients, Sets
from setemb_kernels.measure import MOST_BATCHED_SCORES

CHUNK_ELEMENTS = 1 << 20
"""Elements of x and y gathered at a time, each; and scores, where those are stored."""

GPU_CHUNK_ELEMENTS = 1 << 26
"""The same on a GPU."""


def similarities(sets: Sets, rows: Tensor, columns: Tensor) -> Tensor:
    """``[P]``: set ``rows[p]`` of x with set ``columns[p]`` of y, in ``sets.dtype``; -inf where one of them is -1."""
    kernels = _kernels(sets)
    if kernels is not None:
        out: Tensor = kernels.similarities(sets, rows, columns)
        return out
    out = sets.x.new_full((len(rows),), -math.inf, dtype=sets.dtype)
    (which,) = torch.nonzero((rows >= 0) & (columns >= 0), as_tuple=True)
    rows, columns = rows[which], columns[which]
    for chunk in _chunks(sets, len(rows)):
        out[which[chunk]] = sets.measure.forward(*_gathered(sets, rows[chunk], columns[chunk]), paired=True)
    return out


def add_summed(gradients: Gradients, rows: Tensor, columns: Tensor, by_similarity: Tensor) -> None:
    """As `add_gradients`, for pairs that may occur several times, or whose gradient may be 0: those are not visited."""
    if _kernels(gradients.sets) is not None:  # which wait for nothing
        add_gradients(gradients, rows, columns, by_similarity)
        return
    width = max(len(gradients.sets.y), 1)
    unique, index = torch.unique(rows * width + columns, return_inverse=True)
    total = by_similarity.new_zeros(len(unique)).index_add_(0, index, by_similarity)
    unique, total = unique[total != 0], total[total != 0]
    add_gradients(gradients, unique // width, unique % width, total)


def add_gradients(gradients: Gradients, rows: Tensor, columns: Tensor, by_similarity: Tensor) -> None:
    """Add what the gradients ``[P]`` of those similarities give."""
    kernels = _kernels(gradients.sets)
    if kernels is not None:
        kernels.add_gradients(gradients, rows, columns, by_similarity)
        return
    sets, (need_x, need_y, need_alpha, need_bias) = gradients.sets, gradients.needs
    for chunk in _chunks(sets, len(rows)):
        n, m = rows[chunk], columns[chunk]
        x, y, alpha, bias = sets.measure.backward(
            by_similarity[chunk], *_gathered(sets, n, m), gradients.needs, paired=True
        )
        if need_x:
            gradients.x.index_add_(0, n, x)
        if need_y:
            gradients.y.index_add_(0, m, y)
        if need_alpha:
            gradients.alpha += alpha
        if need_bias:
            gradients.bias += bias


def _kernels(sets: Sets) -> Any:
    """The module whose kernels serve such sets, if any."""
    if not tiles.fused(sets):
        return None
    from setemb_kernels.losses import triton_pairs

    return triton_pairs if triton_pairs.serves(sets) else None


def _gathered(sets: Sets, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Both sides of the pairs, in ``sets.dtype``, and their masks."""
    x_mask = None if sets.x_mask is None else sets.x_mask[rows]
    y_mask = None if sets.y_mask is None else sets.y_mask[columns]
    return sets.x[rows].to(sets.dtype), sets.y[columns].to(sets.dtype), x_mask, y_mask


def _chunks(sets: Sets, count: int) -> Iterator[slice]:
    (_, K, D), L = sets.x.shape, sets.y.shape[1]
    elements = CHUNK_ELEMENTS if sets.x.device.type == "cpu" else GPU_CHUNK_ELEMENTS
    step = max(1, elements // max(1, max(K, L) * D, min(K * L, MOST_BATCHED_SCORES)))
    for start in range(0, count, step):
        yield slice(start, min(start + step, count))
