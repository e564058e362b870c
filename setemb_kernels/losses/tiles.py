"""Similarities of two batches of sets a tile at a time: what every loss of this package is made of.

A loss asks for a tile of similarities, takes from it what it needs (a maximum, a sum of exponentials), and drops it;
in the backward pass it asks again, turns the tile into gradients of the loss for those similarities, and hands them to
the backward of the similarity. So no more than a tile is ever stored, on any device: the kernels are those of
``setemb::smooth_chamfer`` and ``setemb::set_similarity``, whatever serves them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from setemb_kernels.backends import triton_serves
from setemb_kernels.losses import torch_tiles
from setemb_kernels.measure import Measure

TILE = 1024
"""Sets on either side of a tile: 4 MiB of similarities, and products large enough for their kernels."""

GPU_TILE = 8192
"""The same on a GPU, where a launch costs as much as a small tile: 256 MiB of similarities."""


class Ids(NamedTuple):
    """Which pairs of a tile belong together: those of equal ids. Without ids, set i of x with set i of y."""

    x: Tensor | None  # [n]
    y: Tensor | None  # [m]
    x_start: int
    """The place in x of the tile's first row."""
    y_start: int
    shape: tuple[int, int]
    device: torch.device

    def positive(self) -> Tensor:
        """bool ``[n, m]``"""
        x, y = (
            torch.arange(start, start + count, device=self.device) if ids is None else ids
            for ids, start, count in zip((self.x, self.y), (self.x_start, self.y_start), self.shape, strict=True)
        )
        return x[:, None] == y


class Sets(NamedTuple):
    """The two batches, as the ops take them."""

    x: Tensor
    y: Tensor
    alpha: Tensor
    bias: Tensor
    x_mask: Tensor | None
    y_mask: Tensor | None
    x_group: Tensor | None
    y_group: Tensor | None
    kind: str = "smooth_chamfer"
    """Of similarity; see `setemb_kernels.set_similarity`, and there alpha, bias (scale is alpha here) and mean."""
    mean: bool = False

    @property
    def dtype(self) -> torch.dtype:
        """What losses are computed in: float64 for float64, else float32."""
        return torch.float64 if self.x.dtype == torch.float64 else torch.float32

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """All tiles, rows outermost."""
        size = TILE if self.x.device.type == "cpu" else GPU_TILE
        for rows in _pieces(len(self.x), size):
            for columns in _pieces(len(self.y), size):
                yield rows, columns

    def similarity(self, rows: slice, columns: slice) -> Tensor:
        """``[n, m]`` in `dtype`."""
        return self.measure.forward(self.x[rows], self.y[columns], *self.masks(rows, columns))

    def masks(self, rows: slice, columns: slice) -> tuple[Tensor | None, Tensor | None]:
        return (
            None if self.x_mask is None else self.x_mask[rows],
            None if self.y_mask is None else self.y_mask[columns],
        )

    @property
    def measure(self) -> Measure:
        return Measure(self.kind, self.mean, self.alpha, self.bias)

    def ids(self, rows: slice, columns: slice) -> Ids:
        """Of a tile."""
        x, y = (None if group is None else group[s] for group, s in ((self.x_group, rows), (self.y_group, columns)))
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        return Ids(x, y, rows.start, columns.start, shape, self.x.device)

    def positive_pairs(self) -> tuple[Tensor, Tensor]:
        """Rows and columns of all positive pairs, by row, then by column."""
        if self.x_group is None or self.y_group is None:
            diagonal = torch.arange(min(len(self.x), len(self.y)), device=self.x.device)
            return diagonal, diagonal
        return positive_pairs(self.x_group, self.y_group)

    @property
    def kernels(self) -> Any:
        """The module that does what losses do with a tile: `torch_tiles`, or `triton_tiles`."""
        if not fused(self):
            return torch_tiles
        from setemb_kernels.losses import triton_tiles

        return triton_tiles


def fused(sets: Sets) -> bool:
    """Whether the losses' own kernels serve: on a GPU, where Triton serves the similarity."""
    op = "smooth_chamfer" if sets.kind in ("smooth_chamfer", "mean") else "set_similarity"
    return sets.x.device.type == "cuda" and sets.dtype == torch.float32 and triton_serves(op)


TENSORS = 8
"""Fields of `Sets` that are tensors; they come first."""


class Gradients:
    """Sums of what the tiles, or single pairs, add to the gradients of x, y, alpha and bias."""

    def __init__(self, sets: Sets, need_x: bool, need_y: bool, need_alpha: bool, need_bias: bool) -> None:
        self.sets, self.needs = sets, (need_x, need_y, need_alpha, need_bias)
        self._sums: dict[str, Tensor] = {}
        # on the device of x, whichever those of alpha and bias are: nothing waits for a sum that is under way
        self.alpha, self.bias = torch.zeros(2, dtype=torch.float64, device=sets.x.device)

    @property
    def x(self) -> Tensor:
        """``[N, K, D]``, zeros at first."""
        return self._sum("x")

    @property
    def y(self) -> Tensor:
        return self._sum("y")

    @y.setter
    def y(self, total: Tensor) -> None:
        self._sums["y"] = total

    def _sum(self, name: str) -> Tensor:
        if name not in self._sums:
            self._sums[name] = torch.zeros_like(getattr(self.sets, name), dtype=self.sets.dtype)
        return self._sums[name]

    def add(self, x: Tensor, y: Tensor, alpha: Tensor) -> None:
        """Gradients of whole x and y in `Sets.dtype`, which become the sums where there are none yet: the caller gives
        them away."""
        need_x, need_y, need_alpha, _ = self.needs
        for name, need, part in (("x", need_x, x), ("y", need_y, y)):
            if need and name in self._sums:
                self._sums[name].add_(part)
            elif need:
                self._sums[name] = part
        if need_alpha:
            self.alpha += alpha

    def add_tile(self, rows: slice, columns: slice, by_similarity: Tensor) -> None:
        """From the gradients ``[n, m]`` of the similarities of a tile."""
        s = self.sets
        x, y, alpha, bias = s.measure.backward(
            by_similarity, s.x[rows], s.y[columns], *s.masks(rows, columns), self.needs
        )
        need_x, need_y, need_alpha, need_bias = self.needs
        if need_x:
            self.x[rows].add_(x)  # += would copy the sum to where it is
        if need_y:
            self.y[columns].add_(y)
        if need_alpha:
            self.alpha += alpha
        if need_bias:
            self.bias += bias

    def beside(self, sets: Sets) -> Gradients:
        """For the same x and alpha, whose sums go on, next to another y, whose own start at 0."""
        other = Gradients(sets, *self.needs)
        other.alpha, other.bias = self.alpha, self.bias
        if self.needs[0]:
            other._sums["x"] = self.x
        return other

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """In the dtypes of x, y, alpha and bias; one that is not needed is empty ``[0]``."""
        s, (need_x, need_y, need_alpha, need_bias) = self.sets, self.needs
        return (
            self.x.to(s.x.dtype) if need_x else s.x.new_empty(0),
            self.y.to(s.y.dtype) if need_y else s.y.new_empty(0),
            self.alpha.to(s.alpha.device, s.alpha.dtype) if need_alpha else s.alpha.new_empty(0),
            self.bias.to(s.bias.device, s.bias.dtype) if need_bias else s.bias.new_empty(0),
        )


def positive_pairs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns of all pairs of equal ids, by row, then by column."""
    ordered, order = torch.sort(y, stable=True)
    first, last = torch.searchsorted(ordered, x), torch.searchsorted(ordered, x, right=True)
    counts = last - first
    rows = torch.repeat_interleave(torch.arange(len(x), device=x.device), counts)
    offset = torch.arange(len(rows), device=x.device) - (counts.cumsum(0) - counts)[rows]
    return rows, order[first[rows] + offset]


def _pieces(count: int, size: int) -> Iterator[slice]:
    """Slices of nearly equal length, at most ``size``."""
    pieces = -(-count // size)
    for i in range(pieces):
        yield slice(i * count // pieces, (i + 1) * count // pieces)
