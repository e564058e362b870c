"""Forward and backward of each loss over a batch that is spread over ranks.

In the forward the sets of y travel once round the ring and meet every rank's x; statistics of their columns travel
behind them and come home complete. In the backward the same, with gradients of y in place of statistics. What a rank
needs of columns that it does not own are a few numbers each (``O(M)``), gathered in between.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from setemb_kernels.distributed.batch import Batch
from setemb_kernels.losses import infonce, pairs, sigmoid, triplet
from setemb_kernels.losses.tiles import Gradients


class Loss(Protocol):
    """A loss with its options."""

    def forward(self, batch: Batch, *scalars: Tensor) -> tuple[Tensor, Any]:
        """The loss of the whole batch, and what the backward wants to know."""
        ...

    def backward(self, batch: Batch, gradients: Gradients, grad: Tensor, state: Any, *scalars: Tensor) -> list[Tensor]:
        """Adds to ``gradients``; returns this rank's part of the gradients of the scalars."""
        ...


class _InfoNCEState(NamedTuple):
    rows: Tensor  # [2, N']
    columns: Tensor  # [M', 2]
    pairs: Tensor


class InfoNCE(NamedTuple):
    """See `setemb_kernels.losses.infonce`. Log-sum-exps of columns go home, and later the weights C of columns."""

    symmetric: bool

    def forward(self, batch: Batch, *scalars: Tensor) -> tuple[Tensor, _InfoNCEState]:
        x, dtype = batch.sets.x, batch.sets.dtype
        scale = 1 / scalars[0].to(x.device, dtype)
        rows = x.new_full((len(x),), -math.inf, dtype=dtype)
        positives = []

        def parts() -> Iterator[tuple[int, Tensor]]:
            for owner, sets, _ in batch.visit():
                columns = x.new_full((len(sets.y),), -math.inf, dtype=dtype)
                n, m, z = infonce.add_negatives(sets, scale, rows, columns)
                positives.append((n, m + batch.y_shards[owner].start, z))
                yield owner, columns

        own = batch.ring.bring_home(parts(), [(count,) for count in batch.y_counts], torch.logaddexp)
        n, m, z = (torch.cat(listed) for listed in zip(*positives, strict=True))
        cost, row_weight, column_weight = infonce.costs(rows, batch.whole(own), n, m, z, self.symmetric)
        weight = batch.ring.add_home(column_weight, batch.y_counts) if self.symmetric else torch.zeros_like(own)
        cost, count = batch.ring.total(torch.stack((cost.double(), cost.new_tensor(len(n), dtype=torch.float64))))
        count = count.clamp(min=1)
        state = _InfoNCEState(torch.stack((rows, row_weight)), torch.stack((own, weight), 1), count)
        return (cost / count).to(dtype), state

    def backward(
        self, batch: Batch, gradients: Gradients, grad: Tensor, state: _InfoNCEState, *scalars: Tensor
    ) -> list[Tensor]:
        scale = 1 / scalars[0].to(grad)
        weight = (grad / state.pairs).to(grad.dtype)
        by_temperature = torch.zeros((), dtype=torch.float64, device=grad.device)

        def add(owner: int, sets: Any, beside: Gradients, theirs: list[Tensor]) -> None:
            nonlocal by_temperature
            columns = theirs[0].T
            by_temperature += infonce.add_gradients(sets, beside, weight, scale, state.rows, columns, self.symmetric)

        batch.collect_gradients(gradients, add, [state.columns])
        return [by_temperature]


class Sigmoid(NamedTuple):
    """See `setemb_kernels.losses.sigmoid`. Columns have no statistics."""

    def forward(self, batch: Batch, *scalars: Tensor) -> tuple[Tensor, None]:
        cost = sum((sigmoid.total(sets, *scalars) for _, sets, _ in batch.visit()), scalars[0].new_zeros(()))
        loss = batch.ring.total(cost.to(batch.sets.x.device, torch.float64)) / max(sum(batch.x_counts), 1)
        return loss.to(batch.sets.dtype), None

    def backward(self, batch: Batch, gradients: Gradients, grad: Tensor, state: None, *scalars: Tensor) -> list[Tensor]:
        weight = grad / max(sum(batch.x_counts), 1)
        by_scalars = torch.zeros(2, dtype=torch.float64, device=grad.device)

        def add(owner: int, sets: Any, beside: Gradients, theirs: list[Tensor]) -> None:
            nonlocal by_scalars
            by_scalars += torch.stack(sigmoid.add_gradients(sets, beside, weight, *scalars))

        batch.collect_gradients(gradients, add)
        return list(by_scalars)


class _TripletState(NamedTuple):
    row_winner: Tensor  # [N'] index in the whole of y, -1 without
    row_count: Tensor  # [N'] active pairs
    columns: Tensor  # [M', 2] index in the whole of x and active pairs, as float64, which holds both exactly
    positives: list[tuple[Tensor, Tensor, Tensor]]  # of each owner of y: row, column in its shard, active hinges
    pairs: Tensor


class HardestTriplet(NamedTuple):
    """See `setemb_kernels.losses.triplet`. Winners of columns go home, with their similarities; later how many pairs
    of a column are nearer to its winner than the margin allows, which are pulls on that winner, whoever owns it."""

    margin: float

    def forward(self, batch: Batch, *scalars: Tensor) -> tuple[Tensor, _TripletState]:
        own, ring = batch.sets, batch.ring
        x_start = batch.x_shards[ring.rank].start
        rows = triplet.Winners.of(own.x, own.dtype)
        row_exact = torch.full_like(rows.value, -math.inf)
        positives: list[tuple[Tensor, Tensor, Tensor]] = [()] * ring.size  # type: ignore[list-item]

        def parts() -> Iterator[tuple[int, Tensor]]:
            for owner, sets, _ in batch.visit():
                start = batch.y_shards[owner].start
                columns = triplet.Winners.of(sets.y, own.dtype)
                before = rows.who.clone()
                triplet.add_candidates(sets, rows, columns, y_start=start)
                (new,) = torch.nonzero(rows.who != before, as_tuple=True)
                row_exact[new] = pairs.similarities(sets, new, rows.who[new] - start)
                column_exact = triplet.with_winner(sets, columns.who, 1)
                n, m = sets.positive_pairs()
                positives[owner] = n, m, pairs.similarities(sets, n, m)
                who = torch.where(columns.who < 0, -1, columns.who + x_start)
                yield owner, torch.stack([v.double() for v in (columns.value, who, column_exact)], 1)

        shapes = [(count, 3) for count in batch.y_counts]
        _, column_winner, column_exact = ring.bring_home(parts(), shapes, _better).T
        exact = batch.whole(column_exact.to(own.dtype)).split(batch.y_counts)
        row_count, counts = torch.zeros_like(rows.value), []
        cost = own.x.new_zeros((), dtype=own.dtype)
        listed = []
        for (n, m, s), columns in zip(positives, exact, strict=True):
            by_row, by_column = self.margin + row_exact[n] - s, self.margin + columns[m] - s
            cost = cost + by_row.clamp(min=0).sum() + by_column.clamp(min=0).sum()
            row_active, column_active = (by_row > 0).to(own.dtype), (by_column > 0).to(own.dtype)
            row_count.index_add_(0, n, row_active)
            counts.append(torch.zeros_like(columns).index_add_(0, m, column_active))
            listed.append((n, m, row_active + column_active))
        column_count = ring.add_home(torch.cat(counts), batch.y_counts)
        number = cost.new_tensor(sum(len(n) for n, _, _ in listed), dtype=torch.float64)
        cost, number = ring.total(torch.stack((cost.double(), number)))
        number = number.clamp(min=1)
        columns = torch.stack((column_winner, column_count.double()), 1)
        return (cost / number).to(own.dtype), _TripletState(rows.who, row_count, columns, listed, number)

    def backward(
        self, batch: Batch, gradients: Gradients, grad: Tensor, state: _TripletState, *scalars: Tensor
    ) -> list[Tensor]:
        weight = (grad / state.pairs).to(grad.dtype)
        here = batch.x_shards[batch.ring.rank]

        def add(owner: int, sets: Any, beside: Gradients, theirs: list[Tensor]) -> None:
            there = batch.y_shards[owner]
            n, m, active = state.positives[owner]
            (rows,) = torch.nonzero(_within(state.row_winner, there), as_tuple=True)
            column_winner, column_count = theirs[0][:, 0].long(), theirs[0][:, 1].to(weight)
            (columns,) = torch.nonzero(_within(column_winner, here), as_tuple=True)
            everyone = torch.cat((n, rows, column_winner[columns] - here.start))
            others = torch.cat((m, state.row_winner[rows] - there.start, columns))
            times = torch.cat((-active, state.row_count[rows], column_count[columns]))
            triplet.add_summed(beside, everyone, others, times * weight)

        batch.collect_gradients(gradients, add, [state.columns])
        return []


def _better(one: Tensor, other: Tensor) -> Tensor:
    """Of two candidates ``[m, (similarity in the tile, index, similarity of the pair)]`` the nearer, then lower one."""
    first = (one[:, 0] > other[:, 0]) | ((one[:, 0] == other[:, 0]) & (one[:, 1] < other[:, 1]))
    return torch.where(first[:, None], one, other)


def _within(index: Tensor, shard: tuple[int, int]) -> Tensor:
    return (index >= shard[0]) & (index < shard[1])
