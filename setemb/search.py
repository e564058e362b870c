"""Queries of texts and pictures against an index: what the command line prints and the server answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from setemb.index import Item, SetIndex
    from setemb.inputs import Picture
    from setemb.model import SetEmbedder


@dataclass(frozen=True)
class Query:
    """What is looked for."""

    label: str
    sets: Tensor
    """``[L, D]``."""


def queries(model: SetEmbedder, texts: Sequence[str] = (), images: Sequence[tuple[str, Picture]] = ()) -> list[Query]:
    """Texts, then pictures with their names, encoded."""
    result = [Query(text, one) for text, one in zip(texts, _sets(model.encode_text, texts), strict=True)]
    encoded = _sets(model.encode_image, [image for _, image in images])
    return result + [Query(name, one) for (name, _), one in zip(images, encoded, strict=True)]


def _sets(encode: Any, given: Sequence[Any]) -> Sequence[Tensor]:
    """A few words are too little to share: threads that wait for each other cost more than they bring."""
    if not given:
        return []
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if len(given) < 4 else threads)
    try:
        sets: Tensor = encode(list(given)).embeddings.cpu()
    finally:
        torch.set_num_threads(threads)
    return list(sets)


def find(index: SetIndex, wanted: Sequence[Query], k: int, pairs: bool = False) -> list[dict[str, Any]]:
    """Of each query ``{"query": label, "results": [...]}``, the best first.

    A result has rank, score, row, id and whatever else the item's metadata say; with ``pairs`` also the dot product of
    each vector of the query with each of the item, ``[L][K]``.
    """
    found = index.search(torch.stack([query.sets for query in wanted]), k)
    answers = []
    for query, scores, rows in zip(wanted, found.scores.tolist(), found.rows.tolist(), strict=True):
        results = []
        for rank, (score, row) in enumerate(zip(scores, rows, strict=True), 1):
            item = index.item(row)
            more = {"pairs": (query.sets @ item.vectors.T).tolist()} if pairs else {}
            results.append(_hit(rank, score, row, item, more))
        answers.append({"query": query.label, "results": results})
    return answers


def _hit(rank: int, score: float, row: int, item: Item, more: dict[str, Any]) -> dict[str, Any]:
    """What a result says of itself comes first, and wins over metadata of the same name."""
    own = {"rank": rank, "score": score, "row": row, "id": item.id, **more}
    return {**own, **{key: value for key, value in item.meta.items() if key not in own}}
