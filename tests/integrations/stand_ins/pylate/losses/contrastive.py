from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional

from ..scores import ColBERTScores


def embed(model: Any, features: dict[str, torch.Tensor]) -> torch.Tensor:
    return functional.normalize(model(features)["token_embeddings"], dim=-1)


def mask_of(model: Any, features: dict[str, torch.Tensor]) -> torch.Tensor:
    skipped = torch.isin(features["input_ids"], torch.tensor(model.skiplist))
    return features["attention_mask"].bool() & ~skipped


class Contrastive(torch.nn.Module):
    def __init__(self, model: Any, score_metric: Any = None, temperature: float = 1.0) -> None:
        super().__init__()
        self.model, self.temperature = model, temperature
        self.score_metric = ColBERTScores() if score_metric is None else score_metric

    def forward(self, sentence_features: list[dict[str, torch.Tensor]], labels: Any = None) -> torch.Tensor:
        queries, *others = sentence_features
        scores = self.score_metric(
            embed(self.model, queries),
            torch.stack([embed(self.model, features) for features in others], 1),
            queries_mask=None if self.model.do_query_expansion else queries["attention_mask"].bool(),
            documents_mask=torch.stack([mask_of(self.model, features) for features in others], 1),
        )
        own = torch.arange(len(scores)) * len(others)
        return functional.cross_entropy(scores / self.temperature, own)
