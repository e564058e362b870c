"""The similarities of published code for sets of embeddings, under its names: DivE's `SetwiseSimilarity` (Kim, Kim,
Kwak, CVPR 2023), the maximum of PVSE (Song, Soleymani, CVPR 2019), and the match probability of PCME (Chun et al., CVPR
2021) as DivE's code has it, of cosines.

Sets are ``[N, K, D]`` or, as there, their vectors in a row, ``[N * K, D]``; of unit length where cosines are meant.
Similarities of Euclidean distances are not here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from setemb_kernels.ops.set_similarity.op import Kind, set_similarity

__all__ = ["MPsimilarity", "SetwiseSimilarity"]


class MPsimilarity(nn.Module):
    """Mean of ``sigmoid(alpha c + beta)`` over all pairs of vectors of two sets; alpha and beta are learnt.

    (There they were no parameters once they were on a GPU, and stayed as they were.)

    Args:
        avg_pool: there a pooling of ``(img_set_size, txt_set_size)``; only its ``kernel_size`` is read, for vectors in
            a row. May be the two sizes themselves, or None where sets come as ``[N, K, D]``.
    """

    def __init__(self, avg_pool: nn.AvgPool2d | tuple[int, int] | None = None) -> None:
        super().__init__()
        sizes: Any = getattr(avg_pool, "kernel_size", avg_pool)
        self.sizes: tuple[int, int] | None = (sizes, sizes) if isinstance(sizes, int) else sizes
        self.alpha, self.beta = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, img_embs: Tensor, txt_embs: Tensor) -> Tensor:
        img, txt = _sets(self.sizes, img_embs, txt_embs)
        return set_similarity(img, txt, "match_probability", scale=self.alpha[0], bias=self.beta[0])


class SetwiseSimilarity(nn.Module):
    r"""Similarities of all pairs of sets, ``[N, M]``: methods of two batches.

    ================================ ==================================================================================
    ``smooth_chamfer_similarity``    :math:`\frac{1}{d} \big( \frac{1}{t K} \sum_k \log \sum_l e^{t c_{kl}}
                                     + \frac{1}{t L} \sum_l \log \sum_k e^{t c_{kl}} \big)`
    ``chamfer_similarity``           the same with maxima
    ``max_similarity``               :math:`\max_{kl} c_{kl}`: PVSE, multiple-instance learning
    ``avg_similarity``               `MPsimilarity`
    ================================ ==================================================================================

    The scores ``[N K, M L]`` are never stored. Of equal ones the first gets the gradient.

    Args:
        img_set_size, txt_set_size: K and L.
        denominator: d; 2 in the paper.
        temperature: t, > 0; 16 in the paper.
    """

    def __init__(self, img_set_size: int, txt_set_size: int, denominator: float, temperature: float = 1) -> None:
        super().__init__()
        self.img_set_size, self.txt_set_size = img_set_size, txt_set_size
        self.denominator, self.temperature = denominator, temperature
        self.mp_dist = MPsimilarity((img_set_size, txt_set_size))

    def smooth_chamfer_similarity_cosine(self, img_embs: Tensor, txt_embs: Tensor) -> Tensor:
        return self._of_both("smooth_chamfer", img_embs, txt_embs)

    def chamfer_similarity_cosine(self, img_embs: Tensor, txt_embs: Tensor) -> Tensor:
        return self._of_both("chamfer", img_embs, txt_embs)

    def max_similarity_cosine(self, img_embs: Tensor, txt_embs: Tensor) -> Tensor:
        img, txt = _sets((self.img_set_size, self.txt_set_size), img_embs, txt_embs)
        return set_similarity(img, txt, "max")

    def smooth_chamfer_similarity(self, img_embs: Tensor, txt_embs: Tensor) -> Tensor:
        return self.smooth_chamfer_similarity_cosine(img_embs, txt_embs)

    def chamfer_similarity(self, img_embs: Tensor, txt_embs: Tensor) -> Tensor:
        return self.chamfer_similarity_cosine(img_embs, txt_embs)

    def max_similarity(self, img_embs: Tensor, txt_embs: Tensor) -> Tensor:
        return self.max_similarity_cosine(img_embs, txt_embs)

    def avg_similarity(self, img_embs: Tensor, txt_embs: Tensor) -> Tensor:
        similarity: Tensor = self.mp_dist(img_embs, txt_embs)
        return similarity

    def _of_both(self, kind: Kind, img_embs: Tensor, txt_embs: Tensor) -> Tensor:
        """Ours has 1/2 before both directions."""
        img, txt = _sets((self.img_set_size, self.txt_set_size), img_embs, txt_embs)
        return set_similarity(img, txt, kind, alpha=float(self.temperature)) * (2 / self.denominator)


def _sets(sizes: tuple[int, int] | None, *batches: Tensor) -> list[Tensor]:
    found = []
    for batch, size, name in zip(batches, sizes or (None, None), ("img_embs", "txt_embs"), strict=True):
        if batch.dim() == 2:
            if size is None or len(batch) % size:
                raise ValueError(
                    f"{name}: expected [sets, vectors, features] or rows of sets of {size}, got {list(batch.shape)}"
                )
            batch = batch.unflatten(0, (-1, size))
        elif size is not None and batch.shape[1] != size:
            raise ValueError(f"{name}: expected sets of {size} vectors, got {list(batch.shape)}")
        found.append(batch)
    return found
