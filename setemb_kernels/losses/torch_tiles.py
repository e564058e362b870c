"""What the losses do with a tile of similarities, in plain torch: the specification, and what serves where
`triton_tiles` does not. Both have the same functions.

All of them may overwrite the tile ``s [n, m]``. Numbers like ``scale`` are 0-dim tensors of its dtype on its device.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import softplus

if TYPE_CHECKING:
    from setemb_kernels.losses.tiles import Ids
    from setemb_kernels.losses.triplet import Winners


def add_negatives(
    s: Tensor,
    ids: Ids,
    scale: Tensor,
    rows: Tensor,
    columns: Tensor,
    listed: tuple[Tensor, Tensor],
    logits: Tensor,
) -> None:
    """Add the negatives of a tile to log-sum-exps of ``z = scale s``, ``rows [n]`` and ``columns [m]``, in place; and
    write z of the positive pairs of this tile to where they are listed: all, by row, as places in the batch."""
    n, m = listed
    z = s.mul_(scale)
    first, last = torch.searchsorted(n, n.new_tensor([ids.x_start, ids.x_start + len(s)])).tolist()
    m = m[first:last] - ids.y_start
    (here,) = torch.nonzero((m >= 0) & (m < s.shape[1]), as_tuple=True)
    place = n[first:last][here] - ids.x_start, m[here]
    logits[here + first] = z[place]
    z[place] = -math.inf
    for lse, axis in ((rows, 1), (columns, 0)):
        torch.logaddexp(lse, z.logsumexp(axis), out=lse)


def infonce_gradients(
    s: Tensor, ids: Ids, scale: Tensor, weight: Tensor, rows: Tensor, columns: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradients of s ``[n, m]`` that `contrast` says, from log-sum-exps and weights ``[2, n]`` and ``[2, m]``, and
    that of scale in float64."""
    z = s * scale
    row_lse, row_weight = rows
    n, m = ids.positive().nonzero(as_tuple=True)
    pull = (row_lse[n] - z[n, m]).sigmoid()
    by_z = (z - row_lse[:, None]).exp_().mul_(row_weight[:, None])
    if columns is not None:
        column_lse, column_weight = columns
        pull += (column_lse[m] - z[n, m]).sigmoid()
        by_z += z.sub_(column_lse).exp_().mul_(column_weight)
    by_z[n, m] = -pull
    by_z *= weight
    by_scale = s.mul_(by_z).sum(dtype=torch.float64)
    return by_z.mul_(scale), by_scale


def sigmoid_cost(s: Tensor, ids: Ids, scale: Tensor, bias: Tensor) -> Tensor:
    """The sum of ``softplus(-t z)`` in float64; see `sigmoid`."""
    z = s.mul_(scale).add_(bias).mul_(_signed(s, ids)).neg_()
    # The threshold only keeps softplus from rounding early: softplus(v) = v to float64 from 40 on.
    return softplus(z, threshold=40).sum(dtype=torch.float64)


def sigmoid_gradients(
    s: Tensor, ids: Ids, scale: Tensor, bias: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`weight` times the gradients of that for s ``[n, m]``, and for scale and bias in float64."""
    sign = _signed(s, ids)
    by_z = (s * scale).add_(bias).mul_(sign).neg_().sigmoid_().mul_(sign).mul_(-weight)
    by_bias = by_z.sum(dtype=torch.float64)
    by_scale = s.mul_(by_z).sum(dtype=torch.float64)
    return by_z.mul_(scale), by_scale, by_bias


def add_candidates(s: Tensor, ids: Ids, rows: Winners, columns: Winners, starts: tuple[int, int]) -> None:
    """Let the negatives of a tile compete with the best so far of its rows and columns, in place.

    Args:
        starts: the index that its first row has among the winners of columns, and its first column among those of rows.
    """
    s = s.masked_fill_(ids.positive(), -math.inf)
    for winners, start, axis in ((rows, starts[1], 1), (columns, starts[0], 0)):
        value, index = s.max(axis)
        winners.compare(slice(None), value, index + start)


def _signed(s: Tensor, ids: Ids) -> Tensor:
    """t: 1 where a pair belongs together, else -1."""
    return ids.positive().to(s.dtype).mul_(2).sub_(1)
