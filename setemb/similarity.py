"""Similarities of sets of embeddings by name, all pairs: what `SetEmbedder`, evaluation and the index choose from."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

import setemb_kernels
from setemb_kernels import smooth_chamfer

Similarity = Literal["smooth_chamfer", "chamfer", "max", "match_probability", "cosine"]

INDEXED = ("smooth_chamfer", "chamfer", "max", "cosine")
"""Those that an index knows; match_probability has two learnt numbers, which an index does not keep."""


def set_similarity(
    x: Tensor,
    y: Tensor,
    kind: Similarity = "smooth_chamfer",
    alpha: float = 16.0,
    *,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
) -> Tensor:
    """Similarity of every set of x with every set of y.

    ================= ====================================================================================
    kind              similarity of sets X and Y of unit vectors, with c the dot product of a pair of them
    ================= ====================================================================================
    smooth_chamfer    see `setemb_kernels.smooth_chamfer`; ``alpha`` is its sharpness
    chamfer           half the mean over X of the largest c, and half that over Y: alpha without bound
    max               the largest c of all pairs (multiple-instance learning, MIL)
    match_probability the mean of ``sigmoid(scale c + bias)`` over all pairs
    cosine            the dot product of their only vectors; K = L = 1
    ================= ====================================================================================

    For K = L = 1 all but match_probability are equal. The scores of all pairs of vectors are not stored. Of equally
    close pairs the first gets the gradient. More kinds and forms: `setemb_kernels.set_similarity`.

    Args:
        x: ``[N, K, D]``.
        y: ``[M, L, D]``.
        scale, bias: of match_probability; a model learns them.
        x_mask, y_mask: bool ``[N, K]`` and ``[M, L]``, True = valid; the others do not exist. A set without a valid
            vector has similarity 0 to everything.

    Returns:
        ``[N, M]``, computed in the type of x: autocast does not apply, a margin needs more digits than bfloat16 has.

    Raises:
        ValueError: unknown kind, shapes that do not fit, "cosine" of sets of more than one vector.

    Sources: Kim, Kim, Kwak, CVPR 2023, section 3.3; match probability: Chun et al., "Probabilistic embeddings for
    cross-modal retrieval" (PCME), CVPR 2021.
    """
    with torch.autocast(x.device.type, enabled=False):
        if kind == "smooth_chamfer":
            return smooth_chamfer(x, y, alpha=alpha, x_mask=x_mask, y_mask=y_mask)
        if kind not in get_args(Similarity):
            raise ValueError(f"kind must be one of {', '.join(get_args(Similarity))}, got {kind!r}")
        if x.ndim != 3 or y.ndim != 3 or x.shape[2] != y.shape[2]:
            raise ValueError(
                f"x and y must have shapes [N, K, D] and [M, L, D], got {list(x.shape)} and {list(y.shape)}"
            )
        if kind == "cosine":
            if x.shape[1] != 1 or y.shape[1] != 1:
                raise ValueError(f'"cosine" compares sets of one vector, got K = {x.shape[1]} and L = {y.shape[1]}')
            return smooth_chamfer(x, y, x_mask=x_mask, y_mask=y_mask)
        for name, sets, mask in (("x_mask", x, x_mask), ("y_mask", y, y_mask)):
            if mask is not None and (mask.dtype != torch.bool or mask.shape != sets.shape[:2]):
                raise ValueError(f"{name} must be bool {list(sets.shape[:2])}, got {mask.dtype} {list(mask.shape)}")
        return setemb_kernels.set_similarity(x, y, kind, scale=scale, bias=bias, x_mask=x_mask, y_mask=y_mask)
