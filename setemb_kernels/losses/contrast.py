r"""The backward pass of losses whose derivative by a logit follows from that logit, and a few numbers of its row and
column: InfoNCE and sigmoid.

With logits ``z = scale s + bias``, of all pairs of a row n and a column m, ``dL/dz = weight h``:

    InfoNCE (see `infonce`)   h = -(sigmoid(L_n - z) + sigmoid(L_m - z))    for a positive pair
                                =  R_n e^(z - L_n) + C_m e^(z - L_m)        for a negative one
    sigmoid (see `sigmoid`)   h = -sigmoid(-z), sigmoid(z)                  for a positive, a negative pair

so ``dL/ds = scale weight h``. On a CPU, where a compiled kernel serves, one op does all of the backward: it makes a
tile of scores, from them the similarities, from those h, and at once the gradients: three products, where similarities
first and their backward after that take four, as scores are made for each. `triton_contrast` is the same for a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from setemb_kernels._library import define, forbid_double_backward, implement
from setemb_kernels.losses import torch_tiles
from setemb_kernels.losses.tiles import Gradients, Sets

FUSED_ON_GPU = False
"""Whether `triton_contrast` serves on a GPU. Its kernel has not run on one: until a run has shown it right and faster,
benchmarks and tests alone set this."""

LARGEST_FUSED = 64
"""Vectors of a set that it takes: of more, registers are spilled."""

BACKWARD = "setemb::smooth_chamfer_contrast_backward"
define(
    BACKWARD,
    "(Tensor x, Tensor y, Tensor alpha, Tensor? x_mask, Tensor? y_mask, Tensor scale, Tensor bias, Tensor weight,"
    " Tensor? rows, Tensor? columns, Tensor? x_group, Tensor? y_group, bool need_x, bool need_y, bool need_alpha)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


class Contrast(NamedTuple):
    """One of these losses: 0-dim numbers, and log-sum-exps L and weights R or C, in `Sets.dtype`, on the sets' device.

    Without rows ``[2, N]`` it is the sigmoid loss, without columns ``[2, M]`` rows alone compete."""

    scale: Tensor
    bias: Tensor
    weight: Tensor
    rows: Tensor | None = None
    columns: Tensor | None = None


def add_gradients(sets: Sets, gradients: Gradients, loss: Contrast) -> Tensor:
    """Add the gradients of a loss; returns those of scale and bias, ``[2]`` in float64: the sums over all pairs of
    ``dL/dz s`` and ``dL/dz`` (0 of InfoNCE, which has no bias)."""
    if sets.measure.has_contrast(sets.x, sets.y):
        need_x, need_y, need_alpha, _ = gradients.needs
        ids = (None if group is None else group.long() for group in (sets.x_group, sets.y_group))
        x, y, alpha, sums = sets.measure.contrast_backward(
            sets.x, sets.y, sets.x_mask, sets.y_mask, (*loss, *ids), (need_x, need_y, need_alpha)
        )
        gradients.add(x, y, alpha)
        return sums
    if fused_on_gpu(sets, gradients.needs):
        from setemb_kernels.losses import triton_contrast

        x, y, sums = triton_contrast.backward(sets, loss, *gradients.needs[:2])
        gradients.add(x, y, gradients.alpha)
        return sums
    return _add_tiles(sets, gradients, loss)


def fused_on_gpu(sets: Sets, needs: tuple[bool, ...]) -> bool:
    """Whether `triton_contrast` serves: 16-bit sets, of some vectors and features, and no gradient for alpha."""
    need_x, need_y, need_alpha, _ = needs
    sizes = *sets.x.shape, *sets.y.shape
    return (
        FUSED_ON_GPU
        and sets.kind == "smooth_chamfer"
        and sets.kernels is not torch_tiles
        and sets.x.dtype in (torch.bfloat16, torch.float16)
        and 0 not in sizes
        and max(sizes[1], sizes[4]) <= LARGEST_FUSED
        and (need_x or need_y)
        and not need_alpha
    )


def _add_tiles(sets: Sets, gradients: Gradients, loss: Contrast) -> Tensor:
    """The same from similarities of a tile at a time, whatever serves those."""
    sums = torch.zeros(2, dtype=torch.float64, device=sets.x.device)
    scale, bias, weight, rows, columns = loss
    for r, c in sets.tiles():
        s, ids = sets.similarity(r, c), sets.ids(r, c)
        if rows is None:
            g, *parts = sets.kernels.sigmoid_gradients(s, ids, scale, bias, weight)
            sums += torch.stack(parts)
        else:
            of_columns = None if columns is None else columns[:, c]
            g, by_scale = sets.kernels.infonce_gradients(s, ids, scale, weight, rows[:, r], of_columns)
            sums[0] += by_scale
        gradients.add_tile(r, c, g)
    return sums


@implement(BACKWARD)
def backward_by_tiles(
    x: Tensor,
    y: Tensor,
    alpha: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    scale: Tensor,
    bias: Tensor,
    weight: Tensor,
    rows: Tensor | None,
    columns: Tensor | None,
    x_group: Tensor | None,
    y_group: Tensor | None,
    need_x: bool,
    need_y: bool,
    need_alpha: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the op is, in terms of others; losses do without it where no compiled kernel serves."""
    sets = Sets(x, y, alpha, alpha, x_mask, y_mask, x_group, y_group)
    gradients = Gradients(sets, need_x, need_y, need_alpha, False)
    sums = _add_tiles(sets, gradients, Contrast(scale, bias, weight, rows, columns))
    by_x = gradients.x.contiguous() if need_x else x.new_empty(0, dtype=sets.dtype)
    by_y = gradients.y.contiguous() if need_y else y.new_empty(0, dtype=sets.dtype)
    return by_x, by_y, gradients.alpha, sums


@torch.library.register_fake(BACKWARD)
def _(x: Tensor, y: Tensor, alpha: Tensor, *args: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_x, need_y, _ = args[-3:]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return (
        x.new_empty(x.shape if need_x else 0, dtype=dtype),
        y.new_empty(y.shape if need_y else 0, dtype=dtype),
        x.new_empty((), dtype=torch.float64),
        x.new_empty(2, dtype=torch.float64),
    )


forbid_double_backward(BACKWARD)
