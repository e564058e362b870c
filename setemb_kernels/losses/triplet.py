"""Hinge losses of positive pairs against negatives, over similarities that are never stored.

Each of the P positive pairs (n, m) is compared with negatives of its row and with negatives of its column:

    hardest     [margin + max s_nm' - s_nm]_+                      of all negatives
    semi-hard   the same, of the negatives with s_nm' < s_nm       (0 where there is none)
    all         mean of [margin + s_nm' - s_nm]_+                  over all negatives

and the loss is the sum of both directions over P. A pair without negatives costs nothing.

For the hardest the forward keeps the winner of each row and column (the lowest index among equals), and the backward
visits winners and positives only. The other two make the similarities again.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from setemb_kernels.losses import pairs
from setemb_kernels.losses._op import define_loss
from setemb_kernels.losses.tiles import TENSORS, Gradients, Sets
from setemb_kernels.ops.smooth_chamfer.op import hardest_kernel

KINDS = ("hardest", "semi-hard", "all")
_CHUNK = 1024
"""Positive pairs compared with the negatives of a tile at a time."""


def _forward(sets: Sets, margin: float, negatives: str) -> tuple[Tensor, Tensor, Tensor]:
    positives = Positives.of(sets)
    rows, columns = positives.rows.new_empty(0), positives.rows.new_empty(0)
    cost = sets.x.new_zeros((), dtype=sets.dtype)
    if negatives == "hardest":
        rows, columns = _hardest(sets)
        for nearest in _nearest(positives, sets, rows, columns):
            cost += positives.hinges(margin, nearest).sum()
    elif negatives == "semi-hard":
        best = positives.no_winners()
        positives.add_semi_hard(best, sets)
        for winners in best:
            cost += positives.hinges(margin, winners.value).sum()
    else:
        positives.add_mean_violations(cost, None, sets, margin)
    return cost / max(len(positives.s), 1), rows, columns


def _backward(
    sets: Sets, gradients: Gradients, grad: Tensor, rows: Tensor, columns: Tensor, margin: float, negatives: str
) -> list[Tensor]:
    positives = Positives.of(sets)
    weight = grad / max(len(positives.s), 1)
    if negatives == "all":
        pull = torch.zeros_like(positives.s)
        positives.push_violations(gradients, pull, sets, margin, weight)
        pairs.add_gradients(gradients, positives.rows, positives.columns, pull)
        return []
    everyone, others = positives.rows, positives.columns
    if negatives == "hardest":
        best = Winners(with_winner(sets, rows, 0), rows), Winners(with_winner(sets, columns, 1), columns)
        values = best[0].value[everyone], best[1].value[others]
        of_x, of_y = (torch.arange(len(v), device=v.device) for v in (rows, columns))
    else:
        best = positives.no_winners()
        positives.add_semi_hard(best, sets)
        values = best[0].value, best[1].value
        of_x, of_y = everyone, others
    row_active, column_active = ((positives.hinges(margin, value) > 0).to(sets.dtype) for value in values)
    pull = -(row_active + column_active)
    if negatives == "hardest":  # sums of ones: exact in any order
        row_active = torch.zeros_like(best[0].value).index_add_(0, everyone, row_active)
        column_active = torch.zeros_like(best[1].value).index_add_(0, others, column_active)
    # Without a winner no hinge is active: any set will do.
    everyone = torch.cat((everyone, of_x, best[1].who.clamp(min=0)))
    others = torch.cat((others, best[0].who.clamp(min=0), of_y))
    pairs.add_summed(gradients, everyone, others, torch.cat((pull, row_active, column_active)) * weight)
    return []


def _hardest(sets: Sets) -> tuple[Tensor, Tensor]:
    """For each row and each column the index of its most similar negative, -1 where it has none."""
    kernel = hardest_kernel(sets.x, sets.y) if sets.kind == "smooth_chamfer" else None
    if kernel is not None:
        of_rows, of_columns = kernel(sets.x, sets.y, sets.alpha, *sets[4:TENSORS])
        return of_rows.who, of_columns.who
    rows, columns = (Winners.of(v, sets.dtype) for v in (sets.x, sets.y))
    add_candidates(sets, rows, columns)
    return rows.who, columns.who


def add_candidates(sets: Sets, rows: Winners, columns: Winners, y_start: int = 0) -> None:
    """Compare the winners of each row and column with the negatives among these sets. In ``rows`` the first set of y
    has the index ``y_start``."""
    for r, c in sets.tiles():
        own, others = (Winners(*(v[part] for v in best)) for best, part in ((rows, r), (columns, c)))
        starts = r.start, c.start + y_start
        sets.kernels.add_candidates(sets.similarity(r, c), sets.ids(r, c), own, others, starts)


class Winners(NamedTuple):
    """The most similar negative of each set so far: how similar (-inf where there is none), and which (-1)."""

    value: Tensor
    who: Tensor

    @classmethod
    def of(cls, sets: Tensor, dtype: torch.dtype) -> Winners:
        index = torch.full((len(sets),), -1, dtype=torch.int64, device=sets.device)
        return cls(sets.new_full((len(sets),), -math.inf, dtype=dtype), index)

    def compare(self, own: slice | Tensor, value: Tensor, index: Tensor) -> None:
        """With other candidates for these sets. Of equals the lower index stays, in whatever order they come."""
        better = (value > self.value[own]) | ((value == self.value[own]) & (index < self.who[own]))
        self.value[own] = torch.where(better, value, self.value[own])
        self.who[own] = torch.where(better, index, self.who[own])


class Positives:
    """The positive pairs, by row, then by column, with their similarities ``s``.

    Rows and columns are places in the whole batch, whose sizes are ``counts``. It may come in parts: methods that take
    sets compare all pairs with those, the first of which have the places ``start``.
    """

    def __init__(self, rows: Tensor, columns: Tensor, s: Tensor, counts: tuple[int, int]) -> None:
        self.rows, self.columns, self.s, self.counts = rows, columns, s, counts

    @classmethod
    def of(cls, sets: Sets) -> Positives:
        rows, columns = sets.positive_pairs()
        return cls(rows, columns, pairs.similarities(sets, rows, columns), (len(sets.x), len(sets.y)))

    @cached_property
    def _order(self) -> tuple[Tensor, Tensor]:
        """Of the pairs, by row and by column."""
        return torch.arange(len(self.rows), device=self.rows.device), torch.argsort(self.columns, stable=True)

    def hinges(self, margin: float, nearest: Tensor) -> Tensor:
        """``[P]``: by how much a negative, given its similarity, is nearer than the margin allows."""
        return (margin + nearest - self.s).clamp_(min=0)

    def no_winners(self) -> tuple[Winners, Winners]:
        """For the row and for the column of each pair."""
        return Winners.of(self.s, self.s.dtype), Winners.of(self.s, self.s.dtype)

    def add_semi_hard(self, best: Sequence[Winners], sets: Sets, start: tuple[int, int] = (0, 0)) -> None:
        """Let the negatives less similar than a pair itself compete, for its row and for its column."""
        for one in self._compared(sets, start):
            p = one.pairs
            value, index = one.s.masked_fill(~one.negative | (one.s >= self.s[p, None]), -math.inf).max(1)
            best[one.axis].compare(p, value, index + one.others)

    def add_mean_violations(
        self, cost: Tensor, pull: Tensor | None, sets: Sets, margin: float, start: tuple[int, int] = (0, 0)
    ) -> None:
        """Add to ``cost`` the mean of [margin + s' - s]_+ over the negatives of a pair's row, and over those of its
        column; and to ``pull [P]``, unless None, the gradient of that for s."""
        each = self._one_over_negatives()
        for one in self._compared(sets, start):
            p = one.pairs
            violation = (margin + one.s - self.s[p, None]).clamp_(min=0).mul_(one.negative)
            cost += (violation.sum(1) * each[one.axis][p]).sum()
            if pull is not None:
                pull[p] -= (violation > 0).sum(1) * each[one.axis][p]

    def push_violations(
        self,
        gradients: Gradients,
        pull: Tensor | None,
        sets: Sets,
        margin: float,
        weight: Tensor,
        start: tuple[int, int] = (0, 0),
    ) -> None:
        """Add ``weight`` times the gradients of those means: for the negatives, and to ``pull`` for s."""
        each = [weight * n for n in self._one_over_negatives()]
        for r, c in sets.tiles():
            g = sets.x.new_zeros(r.stop - r.start, c.stop - c.start, dtype=sets.dtype)
            for one in self._compared_in(sets, r, c, start):
                p = one.pairs
                share = ((margin + one.s - self.s[p, None] > 0) & one.negative) * each[one.axis][p, None]
                (g if one.axis == 0 else g.T).index_add_(0, one.own, share)
                if pull is not None:
                    pull[p] -= share.sum(1)
            gradients.add_tile(r, c, g)

    def _one_over_negatives(self) -> tuple[Tensor, Tensor]:
        """``[P]``: of how many negatives each pair has in its row, in its column."""
        x, y = (torch.bincount(v, minlength=n) for v, n in zip((self.rows, self.columns), self.counts, strict=True))
        in_row, in_column = (self.counts[1] - x)[self.rows], (self.counts[0] - y)[self.columns]
        return 1 / in_row.clamp(min=1).to(self.s), 1 / in_column.clamp(min=1).to(self.s)

    def _compared(self, sets: Sets, start: tuple[int, int]) -> Iterator[_Compared]:
        for r, c in sets.tiles():
            yield from self._compared_in(sets, r, c, start)

    def _compared_in(self, sets: Sets, r: slice, c: slice, start: tuple[int, int]) -> Iterator[_Compared]:
        """The pairs whose row, then those whose column, is in a tile."""
        s, positive = sets.similarity(r, c), sets.ids(r, c).positive()
        for axis, (own, others, keys) in enumerate(((r, c, self.rows), (c, r, self.columns))):
            order, place = self._order[axis], own.start + start[axis]
            first, last = torch.searchsorted(keys[order], keys.new_tensor([place, own.stop + start[axis]])).tolist()
            for begin in range(first, last, _CHUNK):
                p = order[begin : min(begin + _CHUNK, last)]
                local = keys[p] - place
                theirs, is_positive = (s[local], positive[local]) if axis == 0 else (s.T[local], positive.T[local])
                yield _Compared(axis, p, local, others.start + start[1 - axis], theirs, ~is_positive)


class _Compared(NamedTuple):
    """Some positive pairs next to the other sets of a tile."""

    axis: int  # 0: their rows with the columns of the tile; 1: their columns with its rows
    pairs: Tensor  # [P'] which
    own: Tensor  # [P'] their row or column in the tile
    others: int  # the place in the batch of the first of the other sets
    s: Tensor  # [P', others]
    negative: Tensor  # [P', others]


def with_winner(sets: Sets, winner: Tensor, axis: int) -> Tensor:
    """The similarity of each set of x (axis 0) or y with its winner, -inf where it has none."""
    own = torch.arange(len(winner), device=winner.device)
    return pairs.similarities(sets, *((own, winner) if axis == 0 else (winner, own)))


def _nearest(positives: Positives, sets: Sets, row_winner: Tensor, column_winner: Tensor) -> tuple[Tensor, Tensor]:
    """The similarity of each pair's row with its winner, and of its column with its winner; -inf without."""
    return (
        with_winner(sets, row_winner, 0)[positives.rows],
        with_winner(sets, column_winner, 1)[positives.columns],
    )


def _fake_state(sets: Sets, margin: float, negatives: str) -> tuple[Tensor, Tensor]:
    x, y = sets.x, sets.y
    if negatives != "hardest":
        return x.new_empty(0, dtype=torch.int64), y.new_empty(0, dtype=torch.int64)
    return x.new_empty(x.shape[0], dtype=torch.int64), y.new_empty(y.shape[0], dtype=torch.int64)


OP = define_loss("set_triplet_loss", [], "float margin, str negatives", _forward, _backward, _fake_state)
