"""Exact search over the ranks of `torch.distributed`: each holds a part of the sets, the best of all are merged.

A rank looks in its own part; then k values and k rows a query go round, and all ranks know the result. Where k sets of
one rank are equal to the last of the k, the lower ones are those it tells, so ties are those of one process too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sized
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from setemb.files import as_tensor
from setemb.modules import SetOutput
from setemb_kernels import set_topk
from setemb_kernels.retrieval import TopK

if TYPE_CHECKING:
    from setemb.index.index import SearchResult, SetIndex


@torch.no_grad()
def sharded_topk(
    queries: Tensor, gallery: Tensor, k: int, *, group: dist.ProcessGroup | None = None, **arguments: Any
) -> TopK:
    """`setemb_kernels.set_topk` of a gallery of which each rank holds a part, one after the other by rank.

    Memory beyond that of `set_topk`, and what is sent: ranks x queries x k values and indices.

    Args:
        queries: ``[N, K, D]``, the same on all ranks.
        gallery: ``[m, L, D]``, this rank's part; parts may be of different sizes, and empty.
        k: how many, ``1 <= k <= M``, the sets of all ranks.
        group: the ranks; all unless given. All of them must call.
        arguments: others of `set_topk`; masks and scales are those of this rank's part.

    Returns:
        On every rank the same: values ``[N, k]`` and places in the whole gallery.

    Raises:
        TypeError, ValueError: naming the argument; on the other ranks a RuntimeError that names this one.
    """

    def own() -> tuple[Tensor, Tensor]:
        if isinstance(k, bool) or not isinstance(k, int):
            raise TypeError(f"k: expected an int, got {type(k).__name__}")
        if len(gallery) == 0:
            dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
            return queries.new_empty((len(queries), 0), dtype=dtype), queries.new_empty((len(queries), 0)).long()
        return set_topk(queries, gallery, min(k, len(gallery)), **arguments)

    return _merged(queries, gallery, k, own, group)


@torch.inference_mode()
def sharded_search(
    index: SetIndex,
    queries: Tensor | np.ndarray | SetOutput,
    k: int = 10,
    *,
    query_mask: Tensor | None = None,
    block: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> SearchResult:
    """`SetIndex.search` in the items of all ranks' indices, one after the other by rank; all get the whole result.

    Args:
        index: this rank's; it may be empty. Ids should differ between ranks.
        queries, k, query_mask, block: see `SetIndex.search`; the same on all ranks.
        group: the ranks; all unless given. All of them must call.

    Raises:
        ValueError: as `SetIndex.search`; on the other ranks a RuntimeError that names this one.
    """
    from setemb.index.index import SearchResult

    sets = queries.embeddings if isinstance(queries, SetOutput) else queries
    try:
        asked = as_tensor(sets).detach().cpu().float()
    except Exception:  # the search says why, and the others are told
        asked = torch.empty(0)
    found: list[SearchResult] = []

    def own() -> tuple[Tensor, Tensor]:
        found.append(index.search(sets, k, block, query_mask))
        return found[0].scores, found[0].rows

    best = _merged(asked, index, k, own, group, at_most=True)
    own_names = {
        row: id_
        for rows, ids in zip(found[0].rows.tolist(), found[0].ids, strict=True)
        for row, id_ in zip(rows, ids, strict=True)
    }
    names = _of_all(own_names, len(index), group)
    return SearchResult(best.values, best.indices, [[names[row] for row in rows] for rows in best.indices.tolist()])


def _merged(
    queries: Tensor,
    part: Sized,
    k: int,
    own: Callable[[], tuple[Tensor, Tensor]],
    group: dist.ProcessGroup | None,
    at_most: bool = False,
) -> TopK:
    error: Exception | None = None
    told = [0, 0, 0, 0, 0]
    try:
        values, rows = own()
        told = [1, len(part), k, len(queries), _mark(queries)]
    except Exception as failed:  # whatever it is, the others wait for this rank
        error, values, rows = failed, torch.empty(0), torch.empty(0)
    # All tell whether they go on before anything large is sent: one that gave up alone would leave the others waiting.
    device = queries.device if isinstance(queries, Tensor) else "cpu"
    everyone = torch.stack(_gathered(torch.tensor(told, dtype=torch.int64, device=device), group)).tolist()
    if error is not None:
        raise error
    for rank, (good, _, *asked) in enumerate(everyone):
        if not good:
            raise RuntimeError(f"rank {rank} failed; it says why")
        if asked != told[2:]:
            raise ValueError(f"queries and k must be the same on all ranks, rank {rank} has others")
    sizes = [rank[1] for rank in everyone]
    whole = sum(sizes)
    if not at_most and k > whole:
        raise ValueError(f"k: expected 1 <= k <= {whole}, the sets of all ranks, got {k}")
    place = dist.get_rank(group) if _several(group) else 0
    room = min(k, max(sizes))
    padded = values.new_full((len(queries), room), -torch.inf), rows.new_full((len(queries), room), -1)
    padded[0][:, : values.shape[1]] = values
    padded[1][:, : rows.shape[1]] = torch.where(rows < 0, rows, rows + sum(sizes[:place]))
    all_values, all_rows = (torch.cat(_gathered(one, group), 1) for one in padded)
    # What pads stands last: a set may be at -inf too.
    order = (all_rows < 0).to(torch.int8).argsort(dim=1, stable=True)
    all_values, all_rows = all_values.gather(1, order), all_rows.gather(1, order)
    # Ranks stand in their order, so a stable sort gives ties to the lowest place.
    all_values, order = all_values.sort(dim=1, descending=True, stable=True)
    wanted = min(k, whole)
    return TopK(all_values[:, :wanted], all_rows.gather(1, order[:, :wanted]))


def _mark(queries: Tensor) -> int:
    """56 bits that differ for other queries."""
    data = queries.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    return int.from_bytes(hashlib.sha256(data).digest()[:7], "little")


def _of_all(names: dict[int, str], size: int, group: dist.ProcessGroup | None) -> dict[int, str]:
    """What all ranks call their rows, by the rows of all."""
    text = torch.frombuffer(bytearray(json.dumps(list(names.items())).encode()), dtype=torch.uint8)
    sizes = torch.stack(_gathered(torch.tensor([size, len(text)]), group)).tolist()
    room = max(length for _, length in sizes)
    texts = _gathered(torch.nn.functional.pad(text, (0, room - len(text))), group)
    result: dict[int, str] = {}
    before = 0
    for (count, length), one in zip(sizes, texts, strict=True):
        result |= {before + row: id_ for row, id_ in json.loads(bytes(one[:length].tolist()))}
        before += count
    return result


def _several(group: dist.ProcessGroup | None) -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def _gathered(own: Tensor, group: dist.ProcessGroup | None) -> list[Tensor]:
    """Of all ranks, in their order."""
    if not _several(group):
        return [own]
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    dist.all_gather(parts, own.contiguous(), group=group)
    return parts
