"""PyLate's scores by `setemb_kernels.maxsim`: what its losses, evaluators and reranking call.

A masked document token is a zero there, and a zero beats a negative similarity. That is reproduced unless
``drop_masked=True``, but the zeros of a document are computed once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from setemb_kernels.integrations import _sets
from setemb_kernels.integrations._patch import Patch, package

Function = Callable[..., Any]


def patch_pylate(*, drop_masked: bool = False) -> Patch:
    """Replace the scores of PyLate (1.5 and later): ``colbert_scores``, ``colbert_scores_pairwise``,
    ``colbert_kd_scores`` and ``ColBERTScores``, which its losses `Contrastive`, `CachedContrastive` and `Distillation`,
    its evaluators and ``rank.rerank`` call.

    Values and gradients are those of the package; similarities between tokens are never stored. Where several tokens
    are equally similar the first one gets the gradient. A call with ``backend="torch"``, "flash" or "lik", or with that
    in ``PYLATE_SCORES_BACKEND``, goes to the package's own.

    Args:
        drop_masked: masked tokens do not exist, in place of being zeros; a query token whose similarities are all
            negative then scores the largest of them, and not 0.

    Returns:
        A `Patch`: ``replaced`` lists what was, ``undo()`` and the end of a ``with`` block put it back. A loss that was
        made before keeps the ``score_metric`` it was given; the default one is a `ColBERTScores`, which is replaced in
        place.

    Raises:
        ImportError: no PyLate, or one without these functions.
    """
    package("pylate", "pylate >= 1.5", "pylate.scores.colbert", "pylate.losses")
    from pylate.scores.colbert import ColBERTScores

    patch = Patch("pylate")
    patch.functions(
        "pylate.scores.colbert",
        colbert_scores=partial(colbert_scores, drop_masked),
        colbert_kd_scores=partial(colbert_kd_scores, drop_masked),
        colbert_scores_pairwise=partial(colbert_scores_pairwise, drop_masked),
    )
    patch.method(ColBERTScores, "__call__", partial(scores_of_groups, drop_masked))
    return patch


def colbert_scores(
    drop_masked: bool,
    own: Function,
    queries_embeddings: Any,
    documents_embeddings: Any,
    queries_mask: Any = None,
    documents_mask: Any = None,
    backend: str | None = None,
) -> Tensor:
    """``[Q, Lq, D]`` and ``[M, Ld, D]`` to ``[Q, M]``."""
    if _asked_for(backend):
        scores: Tensor = own(queries_embeddings, documents_embeddings, queries_mask, documents_mask, backend=backend)
        return scores
    queries, documents, q_mask, d_mask = _tensors(
        queries_embeddings, documents_embeddings, queries_mask, documents_mask
    )
    return _score(drop_masked, queries, documents, q_mask, d_mask)


def colbert_kd_scores(
    drop_masked: bool,
    own: Function,
    queries_embeddings: Any,
    documents_embeddings: Any,
    queries_mask: Any = None,
    documents_mask: Any = None,
    backend: str | None = None,
) -> Tensor:
    """``[Q, Lq, D]`` and ``[Q, N, Ld, D]`` to ``[Q, N]``, each query with its own documents."""
    if _asked_for(backend):
        scores: Tensor = own(queries_embeddings, documents_embeddings, queries_mask, documents_mask, backend=backend)
        return scores
    queries, documents, q_mask, d_mask = _tensors(
        queries_embeddings, documents_embeddings, queries_mask, documents_mask
    )
    items, each = documents.shape[:2]
    return _score(
        drop_masked,
        queries,
        documents.flatten(0, 1),
        q_mask,
        None if d_mask is None else d_mask.flatten(0, 1),
        candidates=_sets.own_candidates(items, each, documents.device),
    )


def colbert_scores_pairwise(
    drop_masked: bool,
    own: Function,
    queries_embeddings: Any,
    documents_embeddings: Any,
    backend: str | None = None,
) -> Tensor:
    """Query i with document i; tensors, or lists of sets of any sizes."""
    if _asked_for(backend):
        scores: Tensor = own(queries_embeddings, documents_embeddings, backend=backend)
        return scores
    from pylate.utils.tensor import convert_to_tensor

    pairs = min(len(queries_embeddings), len(documents_embeddings))
    if not pairs:
        scores = own(queries_embeddings, documents_embeddings)  # says what it says of nothing
        return scores
    queries, documents = (
        _sets.Sets(side[:pairs])
        if isinstance(side, Tensor)
        else _sets.of_rows([convert_to_tensor(item) for item in side[:pairs]])
        for side in (queries_embeddings, documents_embeddings)
    )
    return _sets.similarity(queries, documents, pairs="paired")


def scores_of_groups(
    drop_masked: bool,
    own: Function,
    self: Any,
    queries_embeddings: Any,
    documents_embeddings: Any,
    queries_mask: Any = None,
    documents_mask: Any = None,
    backend: str | None = None,
) -> Tensor:
    """``[Q, Lq, D]`` and groups of documents ``[M, N, Ld, D]`` to ``[Q, M * N]``, all groups at once."""
    if _asked_for(backend):
        scores: Tensor = own(
            self, queries_embeddings, documents_embeddings, queries_mask, documents_mask, backend=backend
        )
        return scores
    queries, documents, q_mask, d_mask = _tensors(
        queries_embeddings, documents_embeddings, queries_mask, documents_mask
    )
    return _score(
        drop_masked, queries, documents.flatten(0, 1), q_mask, None if d_mask is None else d_mask.flatten(0, 1)
    )


def _score(
    drop_masked: bool,
    queries: Tensor,
    documents: Tensor,
    q_mask: Tensor | None,
    d_mask: Tensor | None,
    **options: Any,
) -> Tensor:
    masks = [mask.dtype for mask in (q_mask, d_mask) if mask is not None]
    dtype = documents.dtype
    for other in masks:  # a mask of a wider type widens the scores
        dtype = torch.promote_types(dtype, other)
    y = _sets.only(documents, None if d_mask is None else d_mask != 0) if drop_masked else None
    scores = _sets.similarity(
        _sets.weighted(queries, q_mask),
        _sets.zero_padded(documents, d_mask) if y is None else y,
        **options,
    )
    return scores if torch.is_autocast_enabled(scores.device.type) else scores.to(dtype)


def _asked_for(backend: str | None) -> bool:
    """Whether the caller wants one of PyLate's own implementations."""
    return (backend or os.environ.get("PYLATE_SCORES_BACKEND", "auto")).lower() != "auto"


def _tensors(*values: Any) -> list[Any]:
    from pylate.utils.tensor import convert_to_tensor

    return [None if value is None else convert_to_tensor(value) for value in values]
