"""The best sets of each query in one segment, exactly; and of several segments or shards, merged."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from setemb.index.segments import Segment
from setemb.similarity import Similarity
from setemb_kernels import set_topk


def best_of(
    queries: Tensor,
    query_mask: Tensor | None,
    segment: Segment,
    k: int,
    similarity: Similarity,
    alpha: float,
    block: int | None,
) -> tuple[Tensor, Tensor]:
    """float32 values and int64 rows ``[Q, min(k, live)]`` of what is not deleted, equals by row.

    More than k are looked for where some are deleted, and more again until enough are left: nothing is copied, and
    a few deleted ones cost nothing.
    """
    n, wanted = len(segment.vectors), min(k, segment.live)
    looked_for = min(n, k + min(len(segment.deleted), k))
    while True:
        values, rows = set_topk(
            queries,
            segment.vectors,
            looked_for,
            kind="smooth_chamfer" if similarity == "cosine" else similarity,  # equal for sets of one vector
            alpha=alpha,
            query_mask=query_mask,
            gallery_mask=segment.mask,
            gallery_scale=segment.scale,
            chunk=block,
        )
        if len(segment.deleted) == 0:
            return values, rows
        gone = torch.from_numpy(np.isin(rows.numpy(), segment.deleted))
        if looked_for == n or int((~gone).sum(1).min()) >= wanted:
            order = gone.to(torch.int8).argsort(dim=1, stable=True)[:, :wanted]
            return values.gather(1, order), rows.gather(1, order)
        looked_for = min(n, 4 * looked_for)


def merged(parts: Iterator[tuple[Tensor, Tensor]], k: int, queries: int) -> tuple[Tensor, Tensor]:
    """The k best of values and rows ``[Q, any]``; of equals those of an earlier part, and in one part the earlier."""
    values, rows = torch.empty(queries, 0), torch.empty(queries, 0, dtype=torch.int64)
    for more, more_rows in parts:
        values, rows = torch.cat([values, more], 1), torch.cat([rows, more_rows], 1)
        values, order = values.sort(dim=1, descending=True, stable=True)
        values, rows = values[:, :k], rows.gather(1, order[:, :k])
    return values, rows
