from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from colpali_engine.utils.maxsim import maxsim_inbatch, maxsim_kd


class ColbertModule(torch.nn.Module):
    inner = ""

    def __init__(
        self,
        temperature: float = 0.02,
        normalize_scores: bool = True,
        use_smooth_max: bool = False,
        pos_aware_negative_filtering: bool = False,
        in_batch_term_weight: float = 0.5,
        tau: float = 0.1,
    ) -> None:
        super().__init__()
        self.temperature, self.normalize_scores, self.use_smooth_max = temperature, normalize_scores, use_smooth_max
        self.pos_aware_negative_filtering, self.tau = pos_aware_negative_filtering, tau
        self.in_batch_term_weight = in_batch_term_weight

    def _apply_normalization(self, scores: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        return scores / (lengths[:, None] if scores.dim() == 2 else lengths)

    def _aggregate(self, scores: torch.Tensor) -> torch.Tensor:
        if self.use_smooth_max:
            return (self.tau * (scores / self.tau).logsumexp(-1)).sum(-1)
        return scores.amax(-1).sum(-1)

    def _inbatch_scores(self, query_embeddings: torch.Tensor, doc_embeddings: torch.Tensor) -> torch.Tensor:
        if self.use_smooth_max:
            scores = self._aggregate(query_embeddings[:, None] @ doc_embeddings.mT)
        else:
            scores = maxsim_inbatch(query_embeddings, doc_embeddings)
        if self.normalize_scores:
            scores = self._apply_normalization(scores, (query_embeddings[:, :, 0] != 0).sum(1))
        return scores

    def _filter_high_negatives(self, scores: torch.Tensor, pos_idx: torch.Tensor) -> None:
        own = scores.gather(1, pos_idx[:, None])
        high = (scores > 0.95 * own).scatter(1, pos_idx[:, None], False)
        scores[high] *= 0.5

    def _scores(self, query_embeddings: Any, doc_embeddings: Any, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self._inbatch_scores(query_embeddings, doc_embeddings)
        own = torch.arange(len(scores)) + offset
        if self.pos_aware_negative_filtering:
            self._filter_high_negatives(scores, own)
        return scores, own


class ColbertLoss(ColbertModule):
    def forward(self, query_embeddings: Any, doc_embeddings: Any, offset: int = 0) -> torch.Tensor:
        scores, own = self._scores(query_embeddings, doc_embeddings, offset)
        return functional.cross_entropy(scores / self.temperature, own)


class ColbertPairwiseCELoss(ColbertModule):
    def forward(self, query_embeddings: Any, doc_embeddings: Any, offset: int = 0) -> torch.Tensor:
        scores, own = self._scores(query_embeddings, doc_embeddings, offset)
        positive = scores.gather(1, own[:, None])[:, 0]
        negative = scores.scatter(1, own[:, None], -torch.inf).amax(1)
        return functional.softplus((negative - positive) / self.temperature).mean()


class ColbertSigmoidLoss(ColbertModule):
    def forward(self, query_embeddings: Any, doc_embeddings: Any, offset: int = 0) -> torch.Tensor:
        scores, own = self._scores(query_embeddings, doc_embeddings, offset)
        sign = -torch.ones_like(scores).scatter(1, own[:, None], 1.0)
        return functional.softplus(-sign * scores / self.temperature).mean()


class _WithNegatives(ColbertModule):
    def forward(
        self, query_embeddings: Any, doc_embeddings: Any, neg_doc_embeddings: Any, offset: int = 0
    ) -> torch.Tensor:
        positives = doc_embeddings[offset : offset + len(neg_doc_embeddings)]
        positive = self._aggregate(query_embeddings @ positives.mT)
        if self.use_smooth_max:
            negative = self._aggregate(query_embeddings[:, None] @ neg_doc_embeddings.mT)
        else:
            negative = maxsim_kd(query_embeddings, neg_doc_embeddings)
        if self.normalize_scores:
            lengths = (query_embeddings[:, :, 0] != 0).sum(1)
            positive, negative = (self._apply_normalization(s, lengths) for s in (positive, negative))
        loss = functional.softplus((negative - positive[:, None]) / self.temperature).mean()
        of_batch = getattr(self, self.inner)(query_embeddings, doc_embeddings, offset)
        weight = self.in_batch_term_weight
        return loss * (1 - weight) + of_batch * weight


class ColbertNegativeCELoss(_WithNegatives):
    inner = "inner_loss"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.inner_loss = ColbertLoss(**options)


class ColbertPairwiseNegativeCELoss(_WithNegatives):
    inner = "inner_pairwise"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.inner_pairwise = ColbertPairwiseCELoss(**options)
