"""Exact search and ranks over sets by their similarity, which is made a tile at a time and never stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from setemb_kernels import _check
from setemb_kernels.measure import Measure
from setemb_kernels.ops.set_similarity.op import Kind
from setemb_kernels.ops.smooth_chamfer import mixed

CHUNK = 1024
"""Sets on either side of a tile. Next to fewer queries it takes more of the gallery, up to the same size in all."""

LONGEST = 1 << 16
"""The most sets of a gallery in a tile."""

MANY = 8
"""So many times k candidates of a query are sorted at once; of more, a tile's own k best are taken first."""

GPU_CHUNK, GPU_LONGEST = 8192, 1 << 18
"""The same two on a GPU, where a launch costs as much as a small tile."""


class Tiles(Protocol):
    """Similarities of N rows with M columns, made a tile at a time: what `topk_of_tiles` and `rank_of_tiles` walk over.

    A tile that is made twice must have the same bits twice, so that equals are equals.
    """

    shape: tuple[int, int]
    """N and M."""
    dtype: torch.dtype
    """Of the similarities, floating."""
    device: torch.device

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of each tile, rows outermost."""
        ...

    def similarity(self, rows: slice, columns: slice) -> Tensor:
        """``[n, m]``, which the caller may overwrite."""
        ...


class TopK(NamedTuple):
    """What `set_topk` found."""

    values: Tensor
    """``[N, k]`` similarities, the largest first."""
    indices: Tensor
    """int64 ``[N, k]`` places in the gallery."""


@torch.no_grad()
def set_topk(
    queries: Tensor,
    gallery: Tensor,
    k: int,
    *,
    kind: Kind = "smooth_chamfer",
    alpha: float | Tensor = 16.0,
    match_bias: float | Tensor = 0.0,
    reduction: Literal["sum", "mean"] = "sum",
    query_mask: Tensor | None = None,
    gallery_mask: Tensor | None = None,
    gallery_scale: Tensor | None = None,
    chunk: int | None = None,
) -> TopK:
    """The k sets of a gallery that are most similar to each query: exactly those that sorting all similarities finds.

    Memory beyond the results: a few times a tile of ``chunk x chunk`` similarities (ten times, where most of them are
    equal) and, where the gallery has another dtype than similarities are computed in, 16 MiB of its sets (256 MiB on a
    GPU). The gallery is read once for every ``chunk`` queries, front to back, so it may be mapped from a file.

    Args:
        queries: ``[N, K, D]`` float32, bfloat16, float16 or float64.
        gallery: ``[M, L, D]`` of any of these dtypes, or int8; on the device of the queries or on the CPU. A gallery of
            another dtype is converted as it is read: similarities are computed in float32, float64 if the queries are.
        k: how many, ``1 <= k <= M``.
        kind: of similarity, see `set_similarity`; X are the queries.
        alpha: sharpness of the similarity, > 0; of match_probability its scale.
        match_bias: the bias of match_probability.
        reduction: of maxsim and soft_maxsim, "sum" or "mean".
        query_mask, gallery_mask: bool ``[N, K]`` and ``[M, L]``, True = valid.
        gallery_scale: ``[M, L]``: a vector of the gallery is this number times its entries; int8 needs it.
        chunk: sets on either side of a tile; unless given `CHUNK` (`GPU_CHUNK`), and more of the gallery where queries
            are few.

    Returns:
        Values ``[N, k]``, in descending order, in the dtype they are computed in, and indices int64 ``[N, k]``. Among
        equals the lower index comes first. A similarity that is not a number is never found; a place that nothing
        fills has the value -inf and the index -1.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    _check.floating("queries", queries, _check.SETS)
    measure = Measure.of(kind, alpha, match_bias, reduction, queries.device)
    return topk_of_tiles(SetTiles(queries, gallery, measure, query_mask, gallery_mask, gallery_scale, chunk), k)


@torch.no_grad()
def topk_of_tiles(search: Tiles, k: int) -> TopK:
    """`set_topk` of any similarities: the columns are the gallery."""
    N, M = search.shape
    if isinstance(k, bool) or not isinstance(k, int):
        raise TypeError(f"k: expected an int, got {type(k).__name__}")
    if not 1 <= k <= M:
        raise ValueError(f"k: expected 1 <= k <= {M}, the sets of gallery, got {k}")
    values = torch.full((N, k), -torch.inf, dtype=search.dtype, device=search.device)
    indices = torch.full((N, k), -1, dtype=torch.int64, device=search.device)
    for rows, columns in search.tiles():
        s = search.similarity(rows, columns)
        may_enter = s > values[rows, -1:]  # of equals those found before stay; what is not a number never enters
        if s.shape[1] > k and torch.count_nonzero(may_enter) > MANY * k * len(s):
            s.masked_fill_(s.isnan(), -torch.inf)
            may_enter &= s >= s.topk(k).values[:, -1:]
        r, c = may_enter.nonzero(as_tuple=True)
        if len(r) == 0:
            continue
        own = torch.arange(len(s), device=s.device).repeat_interleave(k)
        row, value = torch.cat((own, r)), torch.cat((values[rows].flatten(), s[r, c]))
        index = torch.cat((indices[rows].flatten(), c + columns.start))
        order = value.argsort(descending=True, stable=True)
        order = order[row[order].argsort(stable=True)]
        first = torch.searchsorted(row[order], torch.arange(len(s), device=s.device))
        order = order[first[:, None] + torch.arange(k, device=s.device)]
        values[rows], indices[rows] = value[order], index[order]
    return TopK(values, indices)


class Ranks(NamedTuple):
    """What `set_rank` counted."""

    x: Tensor
    """int64 ``[N]``, of each x among y; from 0."""
    y: Tensor
    """int64 ``[M]``, of each y among x."""


@torch.no_grad()
def set_rank(
    x: Tensor,
    y: Tensor,
    *,
    x_group: Tensor,
    y_group: Tensor,
    kind: Kind = "smooth_chamfer",
    alpha: float | Tensor = 16.0,
    match_bias: float | Tensor = 0.0,
    reduction: Literal["sum", "mean"] = "sum",
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    chunk: int | None = None,
) -> Ranks:
    """Ranks of the most similar relevant set, both ways, by counting: nothing is sorted, no similarity stored.

    Sets of x and y with equal ids are relevant to each other. The rank of a set is the number of sets on the other side
    that are not relevant to it and at least as similar as its most similar relevant one: equals count against it, and
    so does a similarity that is not a number. Without a relevant set it is the number of all sets of the other side.

    The similarities are made once, and once more in the tiles that hold relevant pairs.

    Args:
        x: ``[N, K, D]`` float32, bfloat16, float16 or float64; computed in float32, or float64.
        y: ``[M, L, D]``, of whichever of these.
        x_group, y_group: integers ``[N]`` and ``[M]``.
        kind, alpha, match_bias, reduction, x_mask, y_mask, chunk: as in `set_topk`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    _check.floating("x", x, _check.SETS)
    measure = Measure.of(kind, alpha, match_bias, reduction, x.device)
    search = SetTiles(x, y, measure, x_mask, y_mask, None, chunk, names=("x", "y"))
    for name, group, sets in (("x_group", x_group, x), ("y_group", y_group, y)):
        if group is None:
            raise TypeError(f"{name}: expected a torch.Tensor of integers, got None")
        _check.group(name, group, name[0], sets)
    return rank_of_tiles(search, x_group, y_group.to(x.device))


@torch.no_grad()
def rank_of_tiles(search: Tiles, x_group: Tensor, y_group: Tensor) -> Ranks:
    """`set_rank` of any similarities, x the rows and y the columns; ids on the device of the tiles."""
    best_x, best_y = (
        torch.full((len(group),), -torch.inf, dtype=search.dtype, device=search.device) for group in (x_group, y_group)
    )
    for rows, columns in search.tiles():
        relevant = x_group[rows, None] == y_group[columns]
        if relevant.any():
            s = search.similarity(rows, columns)
            s.masked_fill_(~relevant | s.isnan(), -torch.inf)
            best_x[rows] = torch.maximum(best_x[rows], s.amax(1))
            best_y[columns] = torch.maximum(best_y[columns], s.amax(0))
    ranks = Ranks(*(torch.zeros(n, dtype=torch.int64, device=search.device) for n in search.shape))
    for rows, columns in search.tiles():
        s, relevant = search.similarity(rows, columns), x_group[rows, None] == y_group[columns]
        ranks.x[rows] += (~(s < best_x[rows, None]) & ~relevant).sum(1)
        ranks.y[columns] += (~(s < best_y[columns]) & ~relevant).sum(0)
    return ranks


class SetTiles:
    """`Tiles` of two batches of sets, which are checked; ``names`` are what errors call them."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        measure: Measure,
        x_mask: Tensor | None = None,
        y_mask: Tensor | None = None,
        y_scale: Tensor | None = None,
        chunk: int | None = None,
        names: tuple[str, str] = ("queries", "gallery"),
    ) -> None:
        x_name, y_name = names
        _check.floating(x_name, x, _check.SETS)
        searched = y_name == "gallery"
        _check.floating(y_name, y, _check.SETS, also=(torch.int8,) if searched else ())
        _check.same_size(y_name, y, x_name, x, {2: "features"})
        if y.device not in (x.device, torch.device("cpu")):
            raise ValueError(f"{y_name}: expected device {x.device} as of {x_name}, or cpu, got {y.device}")
        _check.mask("query_mask" if searched else "x_mask", x_mask, x.shape[:2], x_name, x)
        _check.mask(f"{y_name}_mask", y_mask, y.shape[:2], y_name, y)
        if y.dtype == torch.int8 and y_scale is None:
            raise ValueError("gallery_scale: expected a tensor beside a gallery of int8, got None")
        if y_scale is not None:
            _check.floating("gallery_scale", y_scale, ("sets", "vectors"))
            _check.same_size("gallery_scale", y_scale, "gallery", y, {0: "sets", 1: "vectors"})
        if chunk is not None and (isinstance(chunk, bool) or not isinstance(chunk, int)):
            raise TypeError(f"chunk: expected an int or None, got {type(chunk).__name__}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"chunk: expected at least 1, got {chunk}")
        self.shape, self.device = (len(x), len(y)), x.device
        self.dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        self.x, self.y, self.x_mask, self.y_mask, self.y_scale = x, y, x_mask, y_mask, y_scale
        self.measure = measure
        size, longest = (CHUNK, LONGEST) if x.device.type == "cpu" else (GPU_CHUNK, GPU_LONGEST)
        self.rows = chunk or size
        long = min(max(size, size * size // max(len(x), 1)), longest)
        self.columns = chunk or (long if y.device == x.device else size)  # else a tile's sets are copied

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """All tiles, rows outermost."""
        for rows in _pieces(len(self.x), self.rows):
            for columns in _pieces(len(self.y), self.columns):
                yield rows, columns

    def similarity(self, rows: slice, columns: slice) -> Tensor:
        """``[n, m]`` in `dtype`, on the device of x."""
        x, y = self.x[rows].to(self.dtype), self.y[columns].to(self.x.device)
        y_scale = None if self.y_scale is None else self.y_scale[columns].to(self.x.device, self.dtype)
        x_mask = None if self.x_mask is None else self.x_mask[rows]
        y_mask = None if self.y_mask is None else self.y_mask[columns].to(self.x.device)
        with torch.autocast(x.device.type, enabled=False):
            if self.measure.kind == "smooth_chamfer":
                return mixed.similarity(x, y, self.measure.alpha, x_mask, y_mask, y_scale)
            if y.dtype == x.dtype and y_scale is None:
                return self.measure.forward(x, y, x_mask, y_mask)
            out = x.new_empty(len(x), len(y))
            for part, decoded in mixed.decoded(y, x.dtype, y_scale):
                out[:, part] = self.measure.forward(x, decoded, x_mask, None if y_mask is None else y_mask[part])
            return out


def _pieces(count: int, size: int) -> Iterator[slice]:
    return (slice(first, min(first + size, count)) for first in range(0, count, size))
