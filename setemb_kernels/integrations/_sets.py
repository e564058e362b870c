"""Sets of tokens as other packages hold them, padded with zeros or in lists, made what `set_similarity` takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from setemb_kernels.ops import gather_rows
from setemb_kernels.ops.set_similarity.op import Kind, set_similarity


class Sets(NamedTuple):
    """Padded sets without a mask, or packed ones."""

    vectors: Tensor
    """``[N, K, D]``, or packed ``[X, D]``."""
    offsets: Tensor | None = None
    """``[N + 1]`` of packed sets."""


def similarity(x: Sets, y: Sets, kind: Kind = "maxsim", **options: Any) -> Tensor:
    """`set_similarity`."""
    return set_similarity(x.vectors, y.vectors, kind, x_offsets=x.offsets, y_offsets=y.offsets, **options)


def wide(sets: Sets) -> torch.dtype | None:
    """The `out_dtype` that rounds no sum to 16 bits."""
    return torch.float32 if sets.vectors.dtype.itemsize == 2 else None


def only(sets: Tensor, keep: Tensor | None, weights: Tensor | None = None) -> Sets:
    """The vectors of ``[N, K, D]`` where `keep`, bool ``[N, K]``, is true, each multiplied by its weight."""
    if weights is not None:
        weights = weights.to(sets.dtype)
    if keep is None or bool(keep.all()):
        return Sets(sets if weights is None else sets * weights[..., None])
    offsets = functional.pad(keep.sum(1).cumsum(0), (1, 0))
    flat = sets.flatten(0, 1)
    if gather_rows.pays(keep):
        absent = None if weights is None or not _marks(weights) else weights.flatten() == 0
        rows = gather_rows.masked_rows(flat, keep.flatten(), absent)
        if absent is not None:
            return Sets(rows, offsets)
    else:
        rows = flat.index_select(0, keep.flatten().nonzero()[:, 0])
    if weights is not None:
        rows = rows * weights[keep][:, None]
    return Sets(rows, offsets)


def _marks(weights: Tensor) -> bool:
    """Whether they are a mask's: no number but 0 and 1, no gradient."""
    return not weights.requires_grad and bool(((weights == 0) | (weights == 1)).all())


def first(found: Tensor) -> Tensor:
    """Of each row of ``[N, K]`` its first true alone."""
    return found & (found.cumsum(1) == 1)


def weighted(sets: Tensor, weights: Tensor | None) -> Sets:
    """Queries whose vectors have weights, those of weight 0 left out: they would add 0 to a sum over the query."""
    return only(sets, None if weights is None else weights != 0, weights)


def zero_padded(sets: Tensor, weights: Tensor | None) -> Sets:
    """Documents whose vectors have weights, of those of weight 0 the first alone: one zero is as large as many in a
    maximum."""
    if weights is None:
        return Sets(sets)
    absent = weights == 0
    return only(sets, ~absent | first(absent), weights)


def of_rows(sets: Sequence[Tensor]) -> Sets:
    """Sets ``[K_n, D]`` of any sizes, in a list."""
    sizes = torch.tensor([0, *map(len, sets)], device=sets[0].device)
    return Sets(torch.cat(list(sets)), sizes.cumsum(0))


def own_candidates(items: int, each: int, device: torch.device) -> Tensor:
    """``[items, each]``: of ``items * each`` documents in a row those of each query."""
    return torch.arange(items * each, device=device).view(items, each)
