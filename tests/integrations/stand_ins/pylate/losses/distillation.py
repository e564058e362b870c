from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..scores import colbert_kd_scores
from .contrastive import embed, mask_of


class Distillation(torch.nn.Module):
    def __init__(self, model: Any, score_metric: Callable[..., torch.Tensor] = colbert_kd_scores) -> None:
        super().__init__()
        self.model, self.score_metric = model, score_metric

    def forward(self, sentence_features: list[dict[str, torch.Tensor]], labels: torch.Tensor) -> torch.Tensor:
        queries, documents = sentence_features
        items = len(queries["input_ids"])
        scores = self.score_metric(
            embed(self.model, queries),
            embed(self.model, documents).unflatten(0, (items, -1)),
            queries_mask=None if self.model.do_query_expansion else queries["attention_mask"].bool(),
            documents_mask=mask_of(self.model, documents).unflatten(0, (items, -1)),
        )
        low, high = scores.amin(1, keepdim=True), scores.amax(1, keepdim=True)
        scores = (scores - low) / (high - low + 1e-8)
        return torch.nn.functional.kl_div(
            scores.log_softmax(-1), labels.log_softmax(-1), reduction="batchmean", log_target=True
        )
