"""Smooth-Chamfer of sets with sets stored in another type, for search: forward only, the similarity in float32.

The C++ kernel decodes as it reads (``csrc/cpu/smooth_chamfer_mixed.cpp``); where none serves, a part of y at a time is
decoded and goes through ``setemb::smooth_chamfer``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from setemb_kernels._direct import ops
from setemb_kernels._library import define, implement
from setemb_kernels.ops.smooth_chamfer import op  # noqa: F401  (defines setemb::smooth_chamfer)

FORWARD = "setemb::smooth_chamfer_mixed"
PART_ELEMENTS = 1 << 22
"""Elements of y that are decoded at a time."""

GPU_PART_ELEMENTS = 1 << 26
"""The same on a GPU, where a launch costs as much as a small part."""

define(FORWARD, "(Tensor x, Tensor y, Tensor alpha, Tensor? x_mask, Tensor? y_mask, Tensor? y_scale) -> Tensor")


def similarity(
    x: Tensor, y: Tensor, alpha: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, y_scale: Tensor | None
) -> Tensor:
    """The similarity ``[N, M]`` of x, float32 or float64, with y of any dtype, in the dtype of x.

    Arguments are those of `op.smooth_chamfer`, checked. y may also be of int8; ``y_scale [M, L]``, of the dtype of x,
    says what its vectors are multiplied by.
    """
    if x.dtype == torch.float32 and y.dtype != torch.float64:
        result: Tensor = ops.smooth_chamfer_mixed(x, y, alpha, x_mask, y_mask, y_scale)
        return result
    return _decoded(x, y, alpha, x_mask, y_mask, y_scale)


def _decoded(
    x: Tensor, y: Tensor, alpha: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, y_scale: Tensor | None
) -> Tensor:
    out = x.new_empty(len(x), len(y))
    for part, some in decoded(y, x.dtype, y_scale):
        mask = None if y_mask is None else y_mask[part]
        out[:, part] = ops.smooth_chamfer(x, some, alpha, x_mask, mask, False)
    return out


def decoded(y: Tensor, dtype: torch.dtype, y_scale: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """y a part at a time, as numbers of dtype."""
    elements = PART_ELEMENTS if y.device.type == "cpu" else GPU_PART_ELEMENTS
    step = max(1, elements // max(1, y.shape[1] * y.shape[2]))
    for first in range(0, len(y), step):
        part = slice(first, min(first + step, len(y)))
        some = y[part].to(dtype)
        yield part, some if y_scale is None else some * y_scale[part, :, None]


implement(FORWARD)(_decoded)


@torch.library.register_fake(FORWARD)
def _(
    x: Tensor, y: Tensor, alpha: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, y_scale: Tensor | None
) -> Tensor:
    return x.new_empty(x.shape[0], y.shape[0])
