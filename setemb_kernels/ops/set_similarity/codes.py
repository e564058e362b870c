"""Similarities of sets stored as codes, int8 or float8_e4m3fn with a scale for each vector: for scoring, forward only.

A vector is its codes times its scale, so that a score is ``x_scale y_scale sum_d x_d y_d``. Where both sides are codes
of one type the sums are made of the codes themselves: of int8 by the processor's own products of int8
(``csrc/cpu/set_similarity_codes.h``), of int8 and float8 by a GPU's (`triton`). Next to x of float32 the CPU's kernel
decodes y as it reads it. Else codes are decoded, of y a part at a time, and go through ``setemb::set_similarity``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from setemb_kernels._direct import ops
from setemb_kernels._library import define
from setemb_kernels.ops.set_similarity.layout import CODES, PackedSets, check_offsets

FORWARD = "setemb::set_similarity_codes"

PART_ELEMENTS = 1 << 22
"""Elements of y that are decoded at a time: whole sets of about so many."""

MOST_FEATURES = 1 << 16
"""Whose int8 products int32 can sum; the CPU's kernel knows by itself."""

FLOAT8_CAPABILITY = (8, 9)
"""Of a GPU that multiplies float8."""

define(
    # y: packed rows of codes, x likewise of one dtype with y, or (on the CPU) of float32; scales float32 [rows]; the
    # rest as in the op
    FORWARD,
    "(Tensor x, Tensor? x_scale, Tensor x_offsets, Tensor y, Tensor? y_scale, Tensor y_offsets, Tensor? candidates,"
    " Tensor alpha, Tensor bias, str kind, bool mean) -> Tensor",
)


def similarity(
    xs: PackedSets,
    ys: PackedSets,
    candidates: Tensor | None,
    alpha: Tensor,
    bias: Tensor,
    kind: str,
    mean: bool,
) -> Tensor:
    """The similarity ``[N, M]`` or ``[N, C]`` in float32, or in float64 where one side is of that."""
    both = (xs.rows.dtype, ys.rows.dtype)
    dtype = torch.float64 if torch.float64 in both else torch.float32
    if ys.rows.dtype not in CODES or dtype == torch.float64:
        return _decoded(xs.decoded(dtype), ys, candidates, alpha, bias, kind, mean)
    if both[0] != both[1] or not _has_products(xs.rows):
        xs = xs.decoded(dtype)
        if xs.rows.device.type != "cpu":
            return _decoded(xs, ys, candidates, alpha, bias, kind, mean)
    scales = (None if s.scale is None else s.scale.float() for s in (xs, ys))
    result: Tensor = ops.set_similarity_codes(
        xs.rows, next(scales), xs.offsets, ys.rows, next(scales), ys.offsets, candidates, alpha, bias, kind, mean
    )
    return result


def _has_products(x: Tensor) -> bool:
    """Whether the device multiplies such codes."""
    if x.dtype == torch.int8:
        return x.device.type == "cpu" or x.shape[1] <= MOST_FEATURES
    return x.device.type == "cuda" and torch.cuda.get_device_capability(x.device) >= FLOAT8_CAPABILITY


def _decoded(
    xs: PackedSets, ys: PackedSets, candidates: Tensor | None, alpha: Tensor, bias: Tensor, kind: str, mean: bool
) -> Tensor:
    dtype = xs.rows.dtype

    def some(part: PackedSets) -> Tensor:
        y = part.decoded(dtype)
        with torch.autocast(xs.rows.device.type, enabled=False):
            result: Tensor = ops.set_similarity(
                xs.rows, xs.offsets, y.rows, y.offsets, candidates, alpha, bias, kind, mean, True
            )
        return result

    step = max(1, PART_ELEMENTS * ys.sets // max(1, ys.rows.numel()))
    if candidates is not None or step >= ys.sets:
        return some(ys)
    out = xs.rows.new_empty(xs.sets, ys.sets)
    if ys.offsets.device.type == "cpu":
        check_offsets("y_offsets", ys.offsets, len(ys.rows))
    bounds = torch.cat((ys.offsets[:-1:step], ys.offsets[-1:])).tolist()
    for number, first in enumerate(range(0, ys.sets, step)):
        rows = slice(bounds[number], bounds[number + 1])
        part = slice(first, min(first + step, ys.sets))
        offsets = ys.offsets[first : part.stop + 1] - ys.offsets[first]
        out[:, part] = some(PackedSets(ys.rows[rows], offsets, None if ys.scale is None else ys.scale[rows]))
    return out


@torch.library.register_fake(FORWARD)
def _(
    x: Tensor,
    x_scale: Tensor | None,
    x_offsets: Tensor,
    y: Tensor,
    y_scale: Tensor | None,
    y_offsets: Tensor,
    candidates: Tensor | None,
    alpha: Tensor,
    bias: Tensor,
    kind: str,
    mean: bool,
) -> Tensor:
    shape = (x_offsets.shape[0] - 1, y_offsets.shape[0] - 1) if candidates is None else candidates.shape
    return x.new_empty(shape, dtype=torch.float32)
