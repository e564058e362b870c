from __future__ import annotations

from typing import Any

import torch

from ..utils.tensor import convert_to_tensor


def _sum_of_maxima(scores: torch.Tensor, queries_mask: Any, documents_mask: Any) -> torch.Tensor:
    """Similarities ``[..., query tokens, document tokens]``; what is masked is 0."""
    for mask, dim in ((queries_mask, -1), (documents_mask, -2)):
        if mask is not None:
            scores = scores * mask.unsqueeze(dim)
    return scores.max(dim=-1).values.sum(dim=-1)


def colbert_scores(
    queries_embeddings: Any,
    documents_embeddings: Any,
    queries_mask: Any = None,
    documents_mask: Any = None,
    backend: str | None = None,
) -> torch.Tensor:
    queries, documents = convert_to_tensor(queries_embeddings), convert_to_tensor(documents_embeddings)
    if queries_mask is not None:
        queries_mask = convert_to_tensor(queries_mask)[:, None]
    return _sum_of_maxima(queries[:, None] @ documents.mT, queries_mask, documents_mask)


def colbert_kd_scores(
    queries_embeddings: Any,
    documents_embeddings: Any,
    queries_mask: Any = None,
    documents_mask: Any = None,
    backend: str | None = None,
) -> torch.Tensor:
    queries, documents = convert_to_tensor(queries_embeddings), convert_to_tensor(documents_embeddings)
    if queries_mask is not None:
        queries_mask = convert_to_tensor(queries_mask)[:, None]
    return _sum_of_maxima(queries[:, None] @ documents.mT, queries_mask, documents_mask)


def colbert_scores_pairwise(
    queries_embeddings: Any, documents_embeddings: Any, backend: str | None = None
) -> torch.Tensor:
    pairs = zip(queries_embeddings, documents_embeddings)  # noqa: B905 -- as there
    return torch.stack([_sum_of_maxima(convert_to_tensor(q) @ convert_to_tensor(d).mT, None, None) for q, d in pairs])


class ColBERTScores:
    def __call__(
        self,
        queries_embeddings: Any,
        documents_embeddings: Any,
        queries_mask: Any = None,
        documents_mask: Any = None,
        backend: str | None = None,
    ) -> torch.Tensor:
        documents = convert_to_tensor(documents_embeddings)
        mask = None if documents_mask is None else documents_mask.flatten(0, 1)
        return colbert_scores(queries_embeddings, documents.flatten(0, 1), queries_mask, mask, backend)
