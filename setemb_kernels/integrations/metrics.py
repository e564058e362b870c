"""Retrieval with sets as a torchmetrics metric, and as the run dictionaries that ranx and pytrec_eval read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from setemb_kernels import _check
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

    ``update(x, y, x_group, y_group, x_mask, y_mask)`` takes a batch of sets of each side, ``[n, K, D]`` and
    ``[m, L, D]``, which need not be as many, their ids, and masks, True = valid; K and L may differ from batch to
    batch. Sets of equal ids are relevant to each other. Without ids, then in all updates, x[i] and y[i] of one update
    are. ``compute()`` gives a dict of 0-dim tensors, ready for ``log_dict`` of Lightning: ``x_to_y_r1`` and so on in
    percent, ``x_to_y_median_rank`` (of an even number rounded down) and ``x_to_y_mean_rank`` from 1, the same for
    ``y_to_x``, and ``rsum``, the sum of all R@k.

    Args:
        ks: the k of R@k.
        alpha, kind, match_bias, reduction: the similarity, as in `set_rank`.
        options: of `torchmetrics.Metric`. Embeddings are kept until `reset`, and gathered from all processes.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected; from `compute`, too, where nothing
            was added.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    x: list[Tensor]
    x_size: list[Tensor]
    y_size: list[Tensor]
    has_ids: list[Tensor]

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
        # Valid vectors in a row and how many each set has: batches of any sizes are one tensor, also between processes.
        for name in ("x", "y", "x_size", "y_size", "x_group", "y_group", "has_ids"):
            self.add_state(name, default=[], dist_reduce_fx="cat")
        self._pairs = 0

    def update(
        self,
        x: Tensor,
        y: Tensor,
        x_group: Tensor | None = None,
        y_group: Tensor | None = None,
        x_mask: Tensor | None = None,
        y_mask: Tensor | None = None,
    ) -> None:
        sides = {"x": (x, x_mask, x_group), "y": (y, y_mask, y_group)}
        for name, (sets, mask, group) in sides.items():
            _check.floating(name, sets, _check.SETS)
            _check.mask(f"{name}_mask", mask, sets.shape[:2], name, sets)
            _check.group(f"{name}_group", group, name, sets)
        _check.same_size("y", y, "x", x, {2: "features"})
        if self.x and x.shape[2] != self.x[0].shape[1]:
            raise ValueError(f"x: expected {self.x[0].shape[1]} features as in updates before, got {x.shape[2]}")
        if (x_group is None) != (y_group is None):
            raise ValueError(f"{'x' if x_group is None else 'y'}_group: expected ids as for the other side, got None")
        has_ids = x_group is not None
        if self.has_ids and bool(self.has_ids[0]) != has_ids:
            expected, got = ("None", "ids") if has_ids else ("ids", "None")
            raise ValueError(f"x_group: expected {expected} as in updates before, got {got}")
        if x_group is None or y_group is None:
            if len(x) != len(y):
                raise ValueError(f"y: expected {len(x)} sets as in x where there are no ids, got {len(y)}")
            x_group = y_group = self._ids_of_pairs(len(x), x.device)
        self.has_ids.append(torch.tensor([int(has_ids)], device=x.device))
        for name, group in (("x", x_group), ("y", y_group)):
            rows, sizes = _packed(*sides[name][:2])
            for state, value in ((name, rows), (f"{name}_size", sizes), (f"{name}_group", group)):
                getattr(self, state).append(value.detach())

    def _ids_of_pairs(self, count: int, device: torch.device) -> Tensor:
        """Ids that no other update, and no other process, gives."""
        rank, ranks = 0, 1
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        first = self._pairs
        self._pairs += count
        return torch.arange(first, first + count, device=device) * ranks + rank

    def compute(self) -> dict[str, Tensor]:
        counts = [len(dim_zero_cat(size)) if len(size) else 0 for size in (self.x_size, self.y_size)]
        if 0 in counts:
            raise ValueError(
                f"compute: expected sets of x and y from update before, got {counts[0]} of x and {counts[1]} of y"
            )
        with_ids = dim_zero_cat(self.has_ids)
        if with_ids.any() and not with_ids.all():  # of other processes, or of `forward`, which updates apart
            some = int(with_ids.sum())
            raise ValueError(
                f"x_group: expected ids in all updates or in none, got them in {some} of {len(with_ids)} updates"
            )
        (x, x_mask), (y, y_mask) = (
            _padded(*(dim_zero_cat(getattr(self, name)) for name in (side, f"{side}_size"))) for side in ("x", "y")
        )
        x_group, y_group = (dim_zero_cat(getattr(self, name)) for name in ("x_group", "y_group"))
        ranks = set_rank(x, y, x_group=x_group, y_group=y_group, x_mask=x_mask, y_mask=y_mask, **self.similarity)
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


def _packed(sets: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """The valid vectors ``[R, D]``, and how many each set has ``[n]``."""
    if mask is None:
        return sets.flatten(0, 1), torch.full(sets.shape[:1], sets.shape[1], device=sets.device)
    return sets[mask], mask.sum(1)


def _padded(rows: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor | None]:
    """``[n, K, D]`` of the longest, and the mask unless all are as long."""
    longest = int(sizes.max())
    if bool((sizes == longest).all()):
        return rows.view(len(sizes), longest, rows.shape[1]), None
    mask = torch.arange(longest, device=sizes.device) < sizes[:, None]
    sets = rows.new_zeros(len(sizes), longest, rows.shape[1])
    sets[mask] = rows
    return sets, mask


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
    _check.group("query_group", query_group, "queries", queries, on_its_device=False)
    _check.group("gallery_group", gallery_group, "gallery", gallery, on_its_device=False)
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
