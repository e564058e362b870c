"""Forward and backward of the triplet losses over a batch that is spread over ranks; see `losses`."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from setemb_kernels.distributed.batch import Batch
from setemb_kernels.losses import pairs, triplet
from setemb_kernels.losses.tiles import Gradients, positive_pairs


class _HardestState(NamedTuple):
    row_winner: Tensor  # [N'] index in the whole of y, -1 without
    row_count: Tensor  # [N'] active pairs
    columns: Tensor  # [M', 2] index in the whole of x and active pairs, as float64, which holds both exactly
    positives: list[tuple[Tensor, Tensor, Tensor]]  # of each owner of y: row, column in its shard, active hinges
    pairs: Tensor


class HardestTriplet(NamedTuple):
    """See `setemb_kernels.losses.triplet`. Winners of columns go home, with their similarities; later how many pairs
    of a column are nearer to its winner than the margin allows, which are pulls on that winner, whoever owns it."""

    margin: float

    def forward(self, batch: Batch, *scalars: Tensor) -> tuple[Tensor, _HardestState]:
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
        return (cost / number).to(own.dtype), _HardestState(rows.who, row_count, columns, listed, number)

    def backward(
        self, batch: Batch, gradients: Gradients, grad: Tensor, state: _HardestState, *scalars: Tensor
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
            pairs.add_summed(beside, everyone, others, times * weight)

        batch.collect_gradients(gradients, add, [state.columns])
        return []


class _PairsState(NamedTuple):
    positives: triplet.Positives  # of the whole batch
    mine: slice  # those of this rank's x
    pull: Tensor  # [P'] gradients for the similarities of mine
    row_winner: Tensor  # [P'] of mine: index in the whole of y, -1 where the hinge is not active; only of semi-hard
    column_winner: Tensor  # [P] of all pairs, in the whole of x


class PairsTriplet(NamedTuple):
    """See `setemb_kernels.losses.triplet`, semi-hard and all. What a pair's column meets on each rank depends on the
    pair's own similarity. So every rank is told those of all pairs (``O(P)`` numbers) before any are compared."""

    negatives: str
    margin: float

    def forward(self, batch: Batch, *scalars: Tensor) -> tuple[Tensor, _PairsState]:
        ring, own = batch.ring, batch.sets
        assert own.x_group is not None and own.y_group is not None
        x_ids = torch.cat(ring.gather(own.x_group, [(count,) for count in batch.x_counts]))
        rows, columns = positive_pairs(x_ids, batch.whole(own.y_group))
        bounds = torch.searchsorted(rows, rows.new_tensor([shard.start for shard in batch.x_shards])).tolist()
        each = [stop - start for start, stop in zip(bounds, [*bounds[1:], len(rows)], strict=True)]
        mine = slice(bounds[ring.rank], bounds[ring.rank] + each[ring.rank])
        s = own.x.new_zeros(each[ring.rank], dtype=own.dtype)
        for owner, sets, _ in batch.visit():
            here, n, m = _pairs_with(batch, owner, rows[mine], columns[mine])
            s[here] = pairs.similarities(sets, n, m)
        shapes = [(count,) for count in each]
        counts = sum(batch.x_counts), sum(batch.y_counts)
        positives = triplet.Positives(rows, columns, torch.cat(ring.gather(s, shapes)), counts)
        cost = s.new_zeros(())
        row_winner = column_winner = rows.new_empty(0)
        if self.negatives == "all":
            pull = torch.zeros_like(positives.s)
            for owner, sets, _ in batch.visit():
                positives.add_mean_violations(cost, pull, sets, self.margin, batch.start(owner))
            pull = ring.add_home(pull, each)
        else:
            best = positives.no_winners()
            for owner, sets, _ in batch.visit():
                positives.add_semi_hard(best, sets, batch.start(owner))
            by_column = torch.stack([v.double() for v in best[1]], 1).split(each)
            by_column = ring.bring_home(
                ((owner, by_column[owner]) for owner in ring.owners()), [(count, 2) for count in each], _better
            )
            own_pairs = triplet.Positives(rows[mine], columns[mine], s, counts)
            hinges = [own_pairs.hinges(self.margin, v) for v in (best[0].value[mine], by_column[:, 0].to(s.dtype))]
            cost = hinges[0].sum() + hinges[1].sum()
            row_winner, column_winner = (
                torch.where(hinge > 0, who, -1)
                for hinge, who in zip(hinges, (best[0].who[mine], by_column[:, 1].long()), strict=True)
            )
            pull = -((hinges[0] > 0).to(s.dtype) + (hinges[1] > 0))
            column_winner = torch.cat(ring.gather(column_winner, shapes))
        loss = ring.total(cost.double()) / max(len(rows), 1)
        return loss.to(own.dtype), _PairsState(positives, mine, pull, row_winner, column_winner)

    def backward(
        self, batch: Batch, gradients: Gradients, grad: Tensor, state: _PairsState, *scalars: Tensor
    ) -> list[Tensor]:
        positives, mine = state.positives, state.mine
        weight = grad / max(len(positives.rows), 1)
        rows, columns = positives.rows[mine], positives.columns[mine]
        here = batch.x_shards[batch.ring.rank]

        def add(owner: int, sets: Any, beside: Gradients, theirs: list[Tensor]) -> None:
            with_them, n, m = _pairs_with(batch, owner, rows, columns)
            pull = state.pull[with_them]
            if self.negatives == "all":
                positives.push_violations(beside, None, sets, self.margin, weight, batch.start(owner))
                pairs.add_gradients(beside, n, m, pull * weight)
                return
            there = batch.y_shards[owner]
            _, row_n, row_m = _pairs_with(batch, owner, rows, state.row_winner)
            pushed = _within(state.column_winner, here) & _within(positives.columns, there)
            everyone = torch.cat((n, row_n, state.column_winner[pushed] - here.start))
            others = torch.cat((m, row_m, positives.columns[pushed] - there.start))
            push = pull.new_ones(len(everyone) - len(pull))
            pairs.add_summed(beside, everyone, others, torch.cat((pull, push)) * weight)

        batch.collect_gradients(gradients, add)
        return []


def _pairs_with(batch: Batch, owner: int, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Which pairs of this rank's x are with sets of y that ``owner`` has; their rows and columns in the shards."""
    (which,) = torch.nonzero(_within(columns, batch.y_shards[owner]), as_tuple=True)
    x_start, y_start = batch.start(owner)
    return which, rows[which] - x_start, columns[which] - y_start


def _better(one: Tensor, other: Tensor) -> Tensor:
    """Of two candidates ``[m, (similarity, index, ...)]`` the nearer, of equals that of the lower index."""
    first = (one[:, 0] > other[:, 0]) | ((one[:, 0] == other[:, 0]) & (one[:, 1] < other[:, 1]))
    return torch.where(first[:, None], one, other)


def _within(index: Tensor, shard: tuple[int, int]) -> Tensor:
    return (index >= shard[0]) & (index < shard[1])
