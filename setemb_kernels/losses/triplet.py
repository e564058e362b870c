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
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from setemb_kernels.losses import pairs
from setemb_kernels.losses._op import define_loss
from setemb_kernels.losses.tiles import Gradients, Sets

KINDS = ("hardest", "semi-hard", "all")
_CHUNK = 1024
"""Positive pairs compared with the negatives of a tile at a time."""


def _forward(sets: Sets, margin: float, negatives: str) -> tuple[Tensor, Tensor, Tensor]:
    positives = _Positives(sets)
    rows, columns = positives.rows.new_empty(0), positives.rows.new_empty(0)
    costs: Iterable[Tensor]
    if negatives == "hardest":
        rows, columns = _hardest(sets)
        costs = (margin + hardest - positives.s for hardest in positives.hardest(rows, columns))
    elif negatives == "semi-hard":
        costs = (margin + best - positives.s for best, _ in positives.semi_hard())
    else:
        costs = positives.mean_violations(margin)
    loss = sum((cost.clamp(min=0).sum() for cost in costs), sets.x.new_zeros((), dtype=sets.dtype))
    return loss / max(len(positives.s), 1), rows, columns


def _backward(
    sets: Sets, gradients: Gradients, grad: Tensor, rows: Tensor, columns: Tensor, margin: float, negatives: str
) -> list[Tensor]:
    positives = _Positives(sets)
    weight = grad / max(len(positives.s), 1)
    if negatives == "all":
        _add_all(positives, gradients, weight, margin)
        return []
    if negatives == "hardest":
        values = positives.hardest(rows, columns)
        winners = rows[positives.rows], columns[positives.columns]
    else:
        values, winners = zip(*positives.semi_hard(), strict=True)
    row_active, column_active = (margin + value - positives.s > 0 for value in values)
    everyone = torch.cat((positives.rows, positives.rows[row_active], winners[1][column_active]))
    others = torch.cat((positives.columns, winners[0][row_active], positives.columns[column_active]))
    pull = -(row_active.to(sets.dtype) + column_active)
    push = pull.new_ones(len(everyone) - len(pull))
    add_summed(gradients, everyone, others, torch.cat((pull, push)) * weight)
    return []


def add_summed(gradients: Gradients, rows: Tensor, columns: Tensor, by_similarity: Tensor) -> None:
    """Pairs that occur several times are visited once."""
    unique, index = torch.unique(rows * len(gradients.sets.y) + columns, return_inverse=True)
    total = by_similarity.new_zeros(len(unique)).index_add_(0, index, by_similarity)
    unique, total = unique[total != 0], total[total != 0]
    width = max(len(gradients.sets.y), 1)
    pairs.add_gradients(gradients, unique // width, unique % width, total)


def _hardest(sets: Sets) -> tuple[Tensor, Tensor]:
    """For each row and each column the index of its most similar negative, -1 where it has none."""
    rows, columns = (Winners.of(v, sets.dtype) for v in (sets.x, sets.y))
    add_candidates(sets, rows, columns)
    return rows.who, columns.who


def add_candidates(sets: Sets, rows: Winners, columns: Winners, y_start: int = 0) -> None:
    """Compare the winners of each row and column with the negatives among these sets. In ``rows`` the first set of y
    has the index ``y_start``."""
    for r, c in sets.tiles():
        s = sets.similarity(r, c).masked_fill_(sets.positive(r, c), -math.inf)
        for winners, own, start, axis in ((rows, r, c.start + y_start, 1), (columns, c, r.start, 0)):
            value, index = s.max(axis)
            winners.compare(own, value, index + start)


class Winners(NamedTuple):
    """The most similar negative of each set so far: how similar (-inf where there is none), and which (-1)."""

    value: Tensor
    who: Tensor

    @classmethod
    def of(cls, sets: Tensor, dtype: torch.dtype) -> Winners:
        index = torch.full((len(sets),), -1, dtype=torch.int64, device=sets.device)
        return cls(sets.new_full((len(sets),), -math.inf, dtype=dtype), index)

    def compare(self, own: slice, value: Tensor, index: Tensor) -> None:
        """With other candidates for these sets. Of equals the lower index stays, in whatever order they come."""
        better = (value > self.value[own]) | ((value == self.value[own]) & (index < self.who[own]))
        self.value[own] = torch.where(better, value, self.value[own])
        self.who[own] = torch.where(better, index, self.who[own])


class _Positives:
    """The positive pairs, by row, then by column, and their similarities."""

    def __init__(self, sets: Sets) -> None:
        self.sets = sets
        self.rows, self.columns = sets.positive_pairs()
        self.s = pairs.similarities(sets, self.rows, self.columns)
        self.by_row = torch.arange(len(self.rows), device=self.rows.device)
        self.by_column = torch.argsort(self.columns, stable=True)

    def hardest(self, row_winner: Tensor, column_winner: Tensor) -> tuple[Tensor, Tensor]:
        """The similarity of each pair's row with its winner, and of its column with its winner; -inf without."""
        sets = self.sets
        return with_winner(sets, row_winner, 0)[self.rows], with_winner(sets, column_winner, 1)[self.columns]

    def semi_hard(self) -> list[tuple[Tensor, Tensor]]:
        """For row and column direction: the best negative below each pair's own similarity (-inf), and which."""
        best = [torch.full_like(self.s, -math.inf) for _ in range(2)]
        index = [torch.zeros_like(self.rows) for _ in range(2)]
        for axis, p, other, s, negative in self.compared():
            value, where = s.masked_fill(~negative | (s >= self.s[p, None]), -math.inf).max(1)
            better = value > best[axis][p]
            best[axis][p] = torch.where(better, value, best[axis][p])
            index[axis][p] = torch.where(better, where + other.start, index[axis][p])
        return list(zip(best, index, strict=True))

    def mean_violations(self, margin: float) -> list[Tensor]:
        """For row and column direction: the mean over the negatives of [margin + s' - s]_+ of each pair."""
        total = [torch.zeros_like(self.s) for _ in range(2)]
        for axis, p, _, s, negative in self.compared():
            total[axis][p] += (margin + s - self.s[p, None]).clamp_(min=0).mul_(negative).sum(1)
        return [t / n for t, n in zip(total, self.negatives(), strict=True)]

    def negatives(self) -> tuple[Tensor, Tensor]:
        """How many negatives each pair has in its row, in its column; at least 1."""
        sets = self.sets
        x, y = (torch.bincount(v, minlength=n) for v, n in ((self.rows, len(sets.x)), (self.columns, len(sets.y))))
        return (len(sets.y) - x).clamp(min=1)[self.rows], (len(sets.x) - y).clamp(min=1)[self.columns]

    def compared(self) -> Iterator[tuple[int, Tensor, slice, Tensor, Tensor]]:
        """`compared_in` for all tiles, with the slice of the other sets."""
        for r, c in self.sets.tiles():
            for axis, p, s, negative in self.compared_in(r, c):
                yield axis, p, (c, r)[axis], s, negative

    def compared_in(self, r: slice, c: slice) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
        """Positive pairs with all members of a tile: the direction (0 row, 1 column), indices p of pairs ``[P']``, the
        similarities of their row or column ``[P', others]``, and which of them are negatives."""
        s, positive = self.sets.similarity(r, c), self.sets.positive(r, c)
        for axis, (own, keys) in enumerate(((r, self.rows), (c, self.columns))):
            order = self.by_row if axis == 0 else self.by_column
            first, last = torch.searchsorted(keys[order], keys.new_tensor([own.start, own.stop])).tolist()
            for start in range(first, last, _CHUNK):
                p = order[start : min(start + _CHUNK, last)]
                local = keys[p] - own.start
                if axis == 0:
                    yield axis, p, s[local], ~positive[local]
                else:
                    yield axis, p, s[:, local].T, ~positive[:, local].T


def with_winner(sets: Sets, winner: Tensor, axis: int) -> Tensor:
    """The similarity of each set of x (axis 0) or y with its winner, -inf where it has none."""
    out = sets.x.new_full((len(winner),), -math.inf, dtype=sets.dtype)
    (own,) = torch.nonzero(winner >= 0, as_tuple=True)
    pair = (own, winner[own]) if axis == 0 else (winner[own], own)
    out[own] = pairs.similarities(sets, *pair)
    return out


def _add_all(positives: _Positives, gradients: Gradients, weight: Tensor, margin: float) -> None:
    """Each violated negative is pushed away, and the pair pulled together as much."""
    sets = positives.sets
    each = [weight / n for n in positives.negatives()]
    pull = torch.zeros_like(positives.s)
    for r, c in sets.tiles():
        g = sets.x.new_zeros(r.stop - r.start, c.stop - c.start, dtype=sets.dtype)
        for axis, p, s, negative in positives.compared_in(r, c):
            share = ((margin + s - positives.s[p, None] > 0) & negative) * each[axis][p, None]
            pull[p] -= share.sum(1)
            own = (positives.rows if axis == 0 else positives.columns)[p] - (r, c)[axis].start
            (g if axis == 0 else g.T).index_add_(0, own, share)
        gradients.add_tile(r, c, g)
    pairs.add_gradients(gradients, positives.rows, positives.columns, pull)


def _fake_state(sets: Sets, margin: float, negatives: str) -> tuple[Tensor, Tensor]:
    x, y = sets.x, sets.y
    if negatives != "hardest":
        return x.new_empty(0, dtype=torch.int64), y.new_empty(0, dtype=torch.int64)
    return x.new_empty(x.shape[0], dtype=torch.int64), y.new_empty(y.shape[0], dtype=torch.int64)


OP = define_loss("set_triplet_loss", [], "float margin, str negatives", _forward, _backward, _fake_state)
