"""Late interaction of colpali-engine by `setemb_kernels.maxsim` and `soft_maxsim`: its losses and its scoring.

It knows no masks: padding is zeros, and a zero beats a negative similarity. That is reproduced, but the zeros of a
document are computed once. In the smooth maximum each zero counts (``exp(0)``), so there all are computed, unless
``drop_masked=True``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from setemb_kernels.integrations import _sets
from setemb_kernels.integrations._patch import Patch, package

Function = Callable[..., Any]

LOSSES = "colpali_engine.loss.late_interaction_losses"


def patch_colpali_engine(*, drop_masked: bool = False) -> Patch:
    """Replace late interaction in colpali-engine (0.3.17 and later): ``maxsim_inbatch`` and ``maxsim_kd``, the losses
    `ColbertLoss`, `ColbertPairwiseCELoss`, `ColbertSigmoidLoss`, `ColbertNegativeCELoss` and
    `ColbertPairwiseNegativeCELoss` with hard or smooth maximum (``use_smooth_max``), and ``score_multi_vector`` of its
    processors, which then takes lists as they are, without padding them.

    Values and gradients are those of the package, but at ties: where several tokens are equally similar the first one
    gets the gradient, there they share it. Rows that are all zero, its padding, so get another gradient, or none; a
    model that multiplies its output by the attention mask never sees it. ``COLPALI_SCORES_BACKEND=torch`` or "lik" in
    the environment asks for the package's own functions, and gets them where the maximum is hard.

    Args:
        drop_masked: rows that are all zero do not exist. A query token whose similarities are all negative then scores
            the largest of them, not 0, and the smooth maximum no longer depends on how long the padding is.

    Returns:
        A `Patch`: ``replaced`` lists what was, ``undo()`` and the end of a ``with`` block put it back.

    Raises:
        ImportError: no colpali-engine, or one without these functions.
    """
    package("colpali_engine", "colpali-engine >= 0.3.17", "colpali_engine.utils.maxsim", LOSSES)
    from colpali_engine.loss import late_interaction_losses as losses
    from colpali_engine.utils.processing_utils import BaseVisualRetrieverProcessor

    patch = Patch("colpali_engine")
    patch.functions(
        "colpali_engine.utils.maxsim",
        maxsim_inbatch=partial(maxsim_inbatch, drop_masked),
        maxsim_kd=partial(maxsim_kd, drop_masked),
    )
    patch.method(losses.ColbertModule, "_inbatch_scores", partial(inbatch_scores, drop_masked))
    for owner, inner in (
        (losses.ColbertNegativeCELoss, "inner_loss"),
        (losses.ColbertPairwiseNegativeCELoss, "inner_pairwise"),
    ):
        patch.method(owner, "forward", partial(negative_forward, drop_masked, inner))
    patch.method(BaseVisualRetrieverProcessor, "score_multi_vector", partial(score_multi_vector, drop_masked))
    return patch


def maxsim_inbatch(drop_masked: bool, own: Function, query: Tensor, doc: Tensor) -> Tensor:
    """``[Q, Lq, D]`` and ``[M, Ld, D]`` to ``[Q, M]``."""
    if _asked_for():
        scores: Tensor = own(query, doc)
        return scores
    return _sets.similarity(_queries(query), _documents(doc, drop_masked))


def maxsim_kd(drop_masked: bool, own: Function, query: Tensor, doc: Tensor) -> Tensor:
    """``[Q, Lq, D]`` and ``[Q, N, Ld, D]`` to ``[Q, N]``, each query with its own documents."""
    if _asked_for():
        scores: Tensor = own(query, doc)
        return scores
    return _with_own(query, doc, None, drop_masked)


def inbatch_scores(
    drop_masked: bool, own: Function, self: Any, query_embeddings: Tensor, doc_embeddings: Tensor
) -> Any:
    """Scores of all pairs of a batch, hard or smooth, divided by the length of the query where the loss does so."""
    if not self.use_smooth_max:
        return own(self, query_embeddings, doc_embeddings)  # calls `maxsim_inbatch`
    scores = _smooth(query_embeddings, doc_embeddings, self.tau, drop_masked)
    if self.normalize_scores:
        scores = self._apply_normalization(scores, _lengths(query_embeddings))
    return scores


def negative_forward(
    drop_masked: bool,
    inner: str,
    own: Function,
    self: Any,
    query_embeddings: Tensor,
    doc_embeddings: Tensor,
    neg_doc_embeddings: Tensor,
    offset: int = 0,
) -> Tensor:
    """The losses with negatives of each query's own: softplus of negative less positive, and the batch's loss."""
    if _asked_for() and not self.use_smooth_max:
        result: Tensor = own(self, query_embeddings, doc_embeddings, neg_doc_embeddings, offset)
        return result
    positives = doc_embeddings[offset : offset + len(neg_doc_embeddings)]
    tau = self.tau if self.use_smooth_max else None
    pos = _paired(query_embeddings, positives, tau, drop_masked)
    neg = _with_own(query_embeddings, neg_doc_embeddings, tau, drop_masked)
    if self.normalize_scores:
        lengths = _lengths(query_embeddings)
        pos, neg = (self._apply_normalization(scores, lengths) for scores in (pos, neg))
    loss = functional.softplus((neg - pos[:, None]) / self.temperature).mean()
    weight = self.in_batch_term_weight
    if weight > 0:
        loss = loss * (1 - weight) + getattr(self, inner)(query_embeddings, doc_embeddings, offset) * weight
    return loss


def score_multi_vector(
    drop_masked: bool,
    own: Function,
    qs: Tensor | Sequence[Tensor],
    ps: Tensor | Sequence[Tensor],
    batch_size: int = 128,
    device: str | torch.device | None = None,
) -> Tensor:
    """Float32 scores ``[Q, M]`` on the CPU, of lists of ``[L, D]`` or padded tensors, `batch_size` documents at a time.

    In a list a document that is shorter than the longest of its batch has a zero more, as if it were padded.
    """
    if _asked_for() or len(qs) == 0 or len(ps) == 0:
        scores: Tensor = own(qs, ps, batch_size=batch_size, device=device)
        return scores
    from colpali_engine.utils.torch_utils import get_torch_device

    device = device or get_torch_device("auto")
    queries = _queries(qs.to(device)) if isinstance(qs, Tensor) else _sets.of_rows([q.to(device) for q in qs])
    columns = []
    for start in range(0, len(ps), batch_size):
        batch = ps[start : start + batch_size]
        if isinstance(batch, Tensor):
            documents = _documents(batch.to(device), drop_masked)
        else:
            longest = 0 if drop_masked else max(map(len, batch))
            documents = _sets.of_rows(
                [functional.pad(p, (0, 0, 0, int(len(p) < longest))) for p in (p.to(device) for p in batch)]
            )
        columns.append(_sets.similarity(queries, documents, out_dtype=_sets.wide(queries)).cpu())
    return torch.cat(columns, dim=1).to(torch.float32)


def _queries(query: Tensor) -> _sets.Sets:
    """Without rows of zeros, whose maximum is 0."""
    return _sets.only(query, query.detach().any(-1))


def _documents(doc: Tensor, drop_masked: bool) -> _sets.Sets:
    """Of rows of zeros the first alone, or none."""
    real = doc.detach().any(-1)
    return _sets.only(doc, real if drop_masked else real | _sets.first(~real))


def _smooth(query: Tensor, doc: Tensor, tau: float, drop_masked: bool, **options: Any) -> Tensor:
    x, y = (_sets.only(s, s.detach().any(-1) if drop_masked else None) for s in (query, doc))
    return _sets.similarity(x, y, "soft_maxsim", alpha=1 / tau, **options)


def _paired(query: Tensor, doc: Tensor, tau: float | None, drop_masked: bool) -> Tensor:
    if tau is not None:
        return _smooth(query, doc, tau, drop_masked, pairs="paired")
    return _sets.similarity(_queries(query), _documents(doc, drop_masked), pairs="paired")


def _with_own(query: Tensor, doc: Tensor, tau: float | None, drop_masked: bool) -> Tensor:
    items, each = doc.shape[:2]
    candidates, doc = _sets.own_candidates(items, each, doc.device), doc.flatten(0, 1)
    if tau is not None:
        return _smooth(query, doc, tau, drop_masked, candidates=candidates)
    return _sets.similarity(_queries(query), _documents(doc, drop_masked), candidates=candidates)


def _lengths(query: Tensor) -> Tensor:
    """Tokens of each query; the package counts those whose first entry is not 0."""
    return (query[:, :, 0] != 0).sum(dim=1)


def _asked_for() -> bool:
    """Whether the environment names one of the package's own implementations."""
    return os.environ.get("COLPALI_SCORES_BACKEND", "auto").lower() != "auto"
