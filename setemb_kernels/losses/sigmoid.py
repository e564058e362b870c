"""The pairwise sigmoid loss over similarities that are never stored.

With ``z = scale s + bias`` and t = 1 for positive pairs, -1 for others, ``loss = sum softplus(-t z) / N``, and
``dL/dz = -t sigmoid(-t z) / N``. Nothing has to be kept for the backward: it makes the similarities again, which is one
product more than gradients made in the forward would take, and no second copy of the gradients. See `contrast`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from setemb_kernels.losses import contrast
from setemb_kernels.losses._op import define_loss
from setemb_kernels.losses.tiles import Gradients, Sets


def _forward(sets: Sets, scale: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    loss = total(sets, scale, bias) / max(len(sets.x), 1)
    return loss.to(sets.dtype), sets.x.new_empty(0), sets.x.new_empty(0)


def _backward(
    sets: Sets, gradients: Gradients, grad: Tensor, rows: Tensor, columns: Tensor, scale: Tensor, bias: Tensor
) -> list[Tensor]:
    return add_gradients(sets, gradients, grad / max(len(sets.x), 1), scale, bias)


def total(sets: Sets, scale: Tensor, bias: Tensor) -> Tensor:
    """What all pairs cost together, in float64."""
    scale, bias = (v.to(sets.x.device, sets.dtype) for v in (scale, bias))
    loss = sets.x.new_zeros((), dtype=torch.float64)
    for r, c in sets.tiles():
        loss += sets.kernels.sigmoid_cost(sets.similarity(r, c), sets.ids(r, c), scale, bias)
    return loss


def add_gradients(sets: Sets, gradients: Gradients, weight: Tensor, scale: Tensor, bias: Tensor) -> list[Tensor]:
    """Add ``weight`` times the gradients of `total`; returns those of scale and bias."""
    scale, bias = (v.to(sets.x.device, sets.dtype) for v in (scale, bias))
    return list(contrast.add_gradients(sets, gradients, contrast.Contrast(scale, bias, weight)))


def _fake_state(sets: Sets, *options: object) -> tuple[Tensor, Tensor]:
    return sets.x.new_empty(0), sets.x.new_empty(0)


OP = define_loss("set_sigmoid_loss", ["scale", "bias"], "", _forward, _backward, _fake_state)
