"""Similarities of listed pairs, and their gradients: for the few pairs that a triplet loss touches."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from setemb_kernels.losses.tiles import Gradients, Sets
from setemb_kernels.measure import MOST_BATCHED_SCORES

CHUNK_ELEMENTS = 1 << 20
"""Elements of x and y gathered at a time, each; and scores, where those are stored."""

GPU_CHUNK_ELEMENTS = 1 << 26
"""The same on a GPU."""


def similarities(sets: Sets, rows: Tensor, columns: Tensor) -> Tensor:
    """``[P]``: set ``rows[p]`` of x with set ``columns[p]`` of y, in ``sets.dtype``."""
    out = sets.x.new_empty(len(rows), dtype=sets.dtype)
    for chunk in _chunks(sets, len(rows)):
        out[chunk] = sets.measure.forward(*_gathered(sets, rows[chunk], columns[chunk]), paired=True)
    return out


def add_gradients(gradients: Gradients, rows: Tensor, columns: Tensor, by_similarity: Tensor) -> None:
    """Add what the gradients ``[P]`` of those similarities give."""
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
