"""Similarities of sets of embeddings by name, all pairs: what `SetEmbedder`, evaluation and the index choose from."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from setemb_kernels import smooth_chamfer

Similarity = Literal["smooth_chamfer", "max", "cosine"]


def set_similarity(x: Tensor, y: Tensor, kind: Similarity = "smooth_chamfer", alpha: float = 16.0) -> Tensor:
    """Similarity of every set of x with every set of y.

    =============== =================================================================================
    kind            similarity of sets X and Y of unit vectors
    =============== =================================================================================
    smooth_chamfer  see `setemb_kernels.smooth_chamfer`; ``alpha`` is its sharpness
    max             that of their closest pair of vectors (multiple-instance learning, MIL)
    cosine          the dot product of their only vectors; K = L = 1
    =============== =================================================================================

    For K = L = 1 the three are equal.

    Args:
        x: ``[N, K, D]``.
        y: ``[M, L, D]``.

    Returns:
        ``[N, M]``, computed in the type of x: autocast does not apply, a margin needs more digits than bfloat16 has.

    Raises:
        ValueError: unknown kind, shapes that do not fit, "cosine" of sets of more than one vector.
    """
    with torch.autocast(x.device.type, enabled=False):
        if kind == "smooth_chamfer":
            return smooth_chamfer(x, y, alpha=alpha)
        if kind not in get_args(Similarity):
            raise ValueError(f"kind must be one of {', '.join(get_args(Similarity))}, got {kind!r}")
        if x.ndim != 3 or y.ndim != 3 or x.shape[2] != y.shape[2]:
            raise ValueError(
                f"x and y must have shapes [N, K, D] and [M, L, D], got {list(x.shape)} and {list(y.shape)}"
            )
        if kind == "cosine" and (x.shape[1] != 1 or y.shape[1] != 1):
            raise ValueError(f'"cosine" compares sets of one vector, got K = {x.shape[1]} and L = {y.shape[1]}')
        scores = x.flatten(0, 1) @ y.flatten(0, 1).T
        return scores.view(x.shape[0], x.shape[1], y.shape[0], y.shape[1]).amax((1, 3))
