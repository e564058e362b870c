"""Forward and backward of a loss over a batch that is spread over ranks: InfoNCE and sigmoid.

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
from setemb_kernels.losses import infonce, sigmoid
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
