from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from colpali_engine.utils.maxsim import maxsim_inbatch


class BaseVisualRetrieverProcessor:
    @staticmethod
    def score_multi_vector(
        qs: torch.Tensor | Sequence[torch.Tensor],
        ps: torch.Tensor | Sequence[torch.Tensor],
        batch_size: int = 128,
        device: Any = None,
    ) -> torch.Tensor:
        for name, given in (("queries", qs), ("passages", ps)):
            if len(given) == 0:
                raise ValueError(f"No {name} provided")
        padded = [
            [pad_sequence(list(given[i : i + batch_size]), batch_first=True) for i in range(0, len(given), batch_size)]
            for given in (qs, ps)
        ]
        rows = [torch.cat([maxsim_inbatch(q, p) for p in padded[1]], 1) for q in padded[0]]
        return torch.cat(rows).float()
