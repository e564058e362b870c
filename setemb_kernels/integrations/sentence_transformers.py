"""MaxSim of sentence-transformers by `setemb_kernels.maxsim`: what its multi-vector encoder scores and trains with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from setemb_kernels.integrations import _sets
from setemb_kernels.integrations._patch import Patch, package

Function = Callable[..., Any]

MODULE = "sentence_transformers.util.similarity"


def patch_sentence_transformers() -> Patch:
    """Replace the scoring of one chunk in ``maxsim``, ``maxsim_pairwise``, ``mean_maxsim`` and
    ``mean_maxsim_pairwise`` of sentence-transformers (6.0 and later), and with it ``colbert_scores`` and its kin, the
    multi-vector losses (multiple negatives, cached too; distillation; margin MSE), evaluators and ``similarity``.

    Their checks, padding, moves between devices and chunks stay: lists, arrays and masks mean what they meant, a
    document without tokens scores -1e9. Masked tokens are left out of the maximum there as here, so values and
    gradients are those of the package, in float32 likewise; maxima are not rounded to 16 bits in between.
    Where several tokens are equally similar the first one gets the gradient. XTR scores are not replaced.

    Returns:
        A `Patch`: ``replaced`` lists what was, ``undo()`` and the end of a ``with`` block put it back.

    Raises:
        ImportError: no sentence-transformers, or one without these functions.
    """
    package("sentence_transformers", "sentence-transformers >= 6.0", MODULE)
    patch = Patch("sentence_transformers")
    patch.functions(MODULE, _maxsim_score_documents=score_documents, _maxsim_score_pairs=score_pairs)
    return patch


def score_documents(own: Function, a: Tensor, b: Tensor, a_mask: Tensor | None, b_mask: Tensor | None) -> Tensor:
    """``[N, K, D]`` and ``[M, L, D]`` to float32 ``[N, M]``."""
    return _score(own, a, b, a_mask, b_mask, pairs="all")


def score_pairs(own: Function, a: Tensor, b: Tensor, a_mask: Tensor | None, b_mask: Tensor | None) -> Tensor:
    """``[N, K, D]`` and ``[N, L, D]`` to float32 ``[N]``."""
    return _score(own, a, b, a_mask, b_mask, pairs="paired")


def _score(own: Function, a: Tensor, b: Tensor, a_mask: Tensor | None, b_mask: Tensor | None, pairs: str) -> Tensor:
    if b.shape[1] == 0:
        scores: Tensor = own(a, b, a_mask, b_mask)
        return scores
    valid = None if b_mask is None else b_mask.bool()
    dtype = torch.float32 if a_mask is None else torch.promote_types(torch.float32, a_mask.dtype)
    x, y = _sets.weighted(a, a_mask), _sets.only(b, valid)
    scores = _sets.similarity(x, y, pairs=pairs, out_dtype=_sets.wide(x)).to(dtype)
    if valid is not None:
        from sentence_transformers.util.similarity import _fill_empty_document_scores

        scores = _fill_empty_document_scores(scores, ~valid.any(dim=-1))
    return scores
