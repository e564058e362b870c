"""Symmetric InfoNCE over similarities that are never stored.

With ``z = s / temperature``, and over the negatives of each row and each column ``L_n = log sum_m e^(z_nm)`` and
``L_m`` likewise, each positive pair costs ``(softplus(L_n - z_nm) + softplus(L_m - z_nm)) / 2``: the usual
cross-entropy, other positives left out of its denominator. With ``w = g / (2 P temperature)``, g the upstream gradient
and P the number of positive pairs:

    dL/ds_nm = -w (sigmoid(L_n - z) + sigmoid(L_m - z))                    for a positive pair
             =  w (R_n e^(z - L_n) + C_m e^(z - L_m))                      for a negative one

where ``R_n`` and ``C_m`` sum ``sigmoid(L - z)`` over the positives of a row, of a column. So L, R and C are all that
the forward has to keep: ``2 (N + M)`` numbers. `contrast` does the backward.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import softplus

from setemb_kernels.losses import contrast
from setemb_kernels.losses._op import define_loss
from setemb_kernels.losses.tiles import Gradients, Sets


def _forward(sets: Sets, temperature: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    x, dtype = sets.x, sets.dtype
    rows = x.new_full((len(x),), -math.inf, dtype=dtype)
    columns = x.new_full((len(sets.y),), -math.inf, dtype=dtype)
    n, m, z = add_negatives(sets, 1 / temperature.to(x.device, dtype), rows, columns)
    loss, row_weight, column_weight = costs(rows, columns, n, m, z, symmetric)
    return loss / max(len(n), 1), torch.stack((rows, row_weight)), torch.stack((columns, column_weight))


def _backward(
    sets: Sets, gradients: Gradients, grad: Tensor, rows: Tensor, columns: Tensor, temperature: Tensor, symmetric: bool
) -> list[Tensor]:
    scale = 1 / temperature.to(sets.x.device, sets.dtype)
    weight = grad / max(len(sets.positive_pairs()[0]), 1)
    return [add_gradients(sets, gradients, weight, scale, rows, columns, symmetric)]


def add_negatives(sets: Sets, scale: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Add the negatives of these sets to the log-sum-exp of each row and column; returns rows, columns and logits of
    the positive pairs."""
    n, m = sets.positive_pairs()
    # Filled as the tiles come: small results kept between large ones that are freed would leave holes in the heap.
    logits = sets.x.new_empty(len(n), dtype=sets.dtype)
    for r, c in sets.tiles():
        s = sets.similarity(r, c)
        sets.kernels.add_negatives(s, sets.ids(r, c), scale, rows[r], columns[c], (n, m), logits)
    return n, m, logits


def costs(
    rows: Tensor, columns: Tensor, n: Tensor, m: Tensor, z: Tensor, symmetric: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What the positive pairs (n, m) with logits z cost together, and the weights R of rows and C of columns."""
    by_row, by_column = rows[n] - z, columns[m] - z
    # The threshold only keeps softplus from rounding early: softplus(v) = v to float64 from 40 on.
    loss = softplus(by_row, threshold=40).sum()
    row_weight = torch.zeros_like(rows).index_add_(0, n, by_row.sigmoid())
    column_weight = torch.zeros_like(columns)
    if symmetric:
        loss = (loss + softplus(by_column, threshold=40).sum()) / 2
        column_weight.index_add_(0, m, by_column.sigmoid())
    return loss, row_weight, column_weight


def add_gradients(
    sets: Sets, gradients: Gradients, weight: Tensor, scale: Tensor, rows: Tensor, columns: Tensor, symmetric: bool
) -> Tensor:
    """Add ``weight`` times the gradients of the sum of all pairs' costs, given log-sum-exps and weights ``[2, N]``,
    ``[2, M]``; returns the gradient of the temperature."""
    weight = weight / 2 if symmetric else weight
    loss = contrast.Contrast(scale, torch.zeros_like(scale), weight, rows, columns if symmetric else None)
    by_scale = contrast.add_gradients(sets, gradients, loss)[0]
    return -by_scale * scale * scale


def _fake_state(sets: Sets, *options: object) -> tuple[Tensor, Tensor]:
    x, y = sets.x, sets.y
    return x.new_empty(2, x.shape[0], dtype=sets.dtype), y.new_empty(2, y.shape[0], dtype=sets.dtype)


OP = define_loss("set_infonce_loss", ["temperature"], "bool symmetric", _forward, _backward, _fake_state)
