"""Retrieval with sets as a torchmetrics metric, and as the run dictionaries that ranx and pytrec_eval read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from setemb_kernels.integrations._patch import package
from setemb_kernels.measure import Measure
from setemb_kernels.ops.set_similarity.op import Kind
from setemb_kernels.retrieval import set_rank, set_topk

package("torchmetrics", "torchmetrics (of the extra setemb[train])")

from torchmetrics import Metric  # noqa: E402
from torchmetrics.utilities import dim_zero_cat  # noqa: E402

__all__ = ["SetRetrieval", "run_dictionaries"]


class SetRetrieval(Metric):
    """R@k and median and mean rank, both ways, by a similarity of sets, smooth-Chamfer unless told: exact, by counting
    (`set_rank`).

    ``update(x, y, x_group, y_group)`` takes a batch of sets of each side, ``[n, K, D]`` and ``[m, L, D]``, which need
    not be as many, and their ids; sets of equal ids are relevant to each other. Without ids x[i] and y[i] of one update
    are. ``compute()`` gives a dict of 0-dim tensors, ready for ``log_dict`` of Lightning: ``x_to_y_r1`` and so on in
    percent, ``x_to_y_median_rank`` (of an even number rounded down) and ``x_to_y_mean_rank`` from 1, the same for
    ``y_to_x``, and ``rsum``, the sum of all R@k.

    Args:
        ks: the k of R@k.
        alpha, kind, match_bias, reduction: the similarity, as in `set_rank`.
        options: of `torchmetrics.Metric`. Embeddings are kept until `reset`, and gathered from all processes.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False

    def __init__(
        self,
        ks: Sequence[int] = (1, 5, 10),
        alpha: float = 16.0,
        *,
        kind: Kind = "smooth_chamfer",
        match_bias: float = 0.0,
        reduction: Literal["sum", "mean"] = "sum",
        **options: Any,
    ) -> None:
        super().__init__(**options)
        if not ks or any(isinstance(k, bool) or not isinstance(k, int) or k < 1 for k in ks):
            raise ValueError(f"ks: expected ints of at least 1, got {ks!r}")
        Measure.of(kind, alpha, match_bias, reduction, torch.device("cpu"))  # says at once what is wrong
        self.ks, self.alpha = tuple(ks), alpha
        self.similarity: dict[str, Any] = {
            "kind": kind,
            "alpha": alpha,
            "match_bias": match_bias,
            "reduction": reduction,
        }
        for name in ("x", "y", "x_group", "y_group"):
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self._pairs = 0

    def update(self, x: Tensor, y: Tensor, x_group: Tensor | None = None, y_group: Tensor | None = None) -> None:
        if (x_group is None) != (y_group is None):
            raise ValueError(f"{'x' if x_group is None else 'y'}_group: expected ids as for the other side, got None")
        if x_group is None or y_group is None:
            if len(x) != len(y):
                raise ValueError(f"y: expected {len(x)} sets as in x where there are no ids, got {len(y)}")
            x_group = y_group = self._ids_of_pairs(len(x), x.device)
        for name, value in (("x", x), ("y", y), ("x_group", x_group), ("y_group", y_group)):
            getattr(self, name).append(value.detach())

    def _ids_of_pairs(self, count: int, device: torch.device) -> Tensor:
        """Ids that no other update, and no other process, gives."""
        rank, ranks = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        first = self._pairs
        self._pairs += count
        return torch.arange(first, first + count, device=device) * ranks + rank

    def compute(self) -> dict[str, Tensor]:
        x, y, x_group, y_group = (dim_zero_cat(getattr(self, name)) for name in ("x", "y", "x_group", "y_group"))
        ranks = set_rank(x, y, x_group=x_group, y_group=y_group, **self.similarity)
        found: dict[str, Tensor] = {}
        for direction, rank in (("x_to_y", ranks.x), ("y_to_x", ranks.y)):
            for k in self.ks:
                found[f"{direction}_r{k}"] = 100 * (rank < k).float().mean()
        found["rsum"] = torch.stack(list(found.values())).sum()
        for direction, rank in (("x_to_y", ranks.x), ("y_to_x", ranks.y)):
            middle = rank.sort().values[[(len(rank) - 1) // 2, len(rank) // 2]]
            found[f"{direction}_median_rank"] = 1.0 + middle.sum() // 2
            found[f"{direction}_mean_rank"] = 1 + rank.float().mean()
        return found


def run_dictionaries(
    queries: Tensor,
    gallery: Tensor,
    *,
    query_ids: Sequence[str] | None = None,
    gallery_ids: Sequence[str] | None = None,
    query_group: Tensor | None = None,
    gallery_group: Tensor | None = None,
    k: int = 100,
    **options: Any,
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, int]]]:
    """What `set_topk` finds as a run ``{query: {document: similarity}}``, and what is relevant likewise, with 1 each:
    ``ranx.evaluate(ranx.Qrels(relevant), ranx.Run(run), ["recall@1", "mrr"])``.

    Args:
        queries: ``[N, K, D]``.
        gallery: ``[M, L, D]``.
        query_ids, gallery_ids: names; unless given "0", "1", ...
        query_group, gallery_group: integers ``[N]``, ``[M]``: equal ids are relevant to each other. Without them
            nothing is said to be, and the second dictionary is empty. A query with nothing relevant is not in it.
        k: how many documents of each query, at most M.
        options: of `set_topk`.
    """
    names = []
    for name, given, sets in (("query_ids", query_ids, queries), ("gallery_ids", gallery_ids, gallery)):
        ids = list(map(str, range(len(sets)))) if given is None else list(given)
        if len(ids) != len(sets) or len(set(ids)) != len(ids):
            raise ValueError(f"{name}: expected {len(sets)} different names, got {len(ids)}, {len(set(ids))} different")
        names.append(ids)
    if (query_group is None) != (gallery_group is None):
        missing = "query_group" if query_group is None else "gallery_group"
        raise ValueError(f"{missing}: expected ids as for the other side, got None")
    found = set_topk(queries, gallery, min(k, len(gallery)), **options)
    rows = zip(names[0], found.values.tolist(), found.indices.tolist(), strict=True)
    run = {q: {names[1][i]: v for v, i in zip(values, indices, strict=True) if i >= 0} for q, values, indices in rows}
    relevant: dict[str, dict[str, int]] = {}
    if query_group is not None and gallery_group is not None:
        of_group: dict[int, list[str]] = {}
        for document, group in zip(names[1], gallery_group.tolist(), strict=True):
            of_group.setdefault(group, []).append(document)
        for query, group in zip(names[0], query_group.tolist(), strict=True):
            if group in of_group:
                relevant[query] = dict.fromkeys(of_group[group], 1)
    return run, relevant
