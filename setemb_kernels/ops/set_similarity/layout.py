"""Sets as the op takes them: packed rows and offsets, out of padded, ragged or nested tensors; and who meets whom."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from setemb_kernels import _check
from setemb_kernels._library import define
from setemb_kernels.ops import gather_rows

SIZES = "setemb::set_sizes"

define(SIZES, "(Tensor offsets, SymInt rows, str name) -> Tensor")


class PackedSets(NamedTuple):
    """Set i is the rows ``offsets[i]`` to ``offsets[i + 1]``; rows beyond the last offset belong to no set."""

    rows: Tensor
    """``[X, D]``"""
    offsets: Tensor
    """int64 ``[N + 1]``, from 0, never decreasing, at most X."""
    scale: Tensor | None = None
    """Of codes: floating ``[X]``, what each row is times; None: 1."""

    @property
    def sets(self) -> int:
        return self.offsets.shape[0] - 1

    def decoded(self, dtype: torch.dtype) -> PackedSets:
        """The vectors as numbers of a dtype, without scales."""
        rows = self.rows.to(dtype)
        return PackedSets(rows if self.scale is None else rows * self.scale.to(dtype)[:, None], self.offsets)


CODES = (torch.int8, torch.float8_e4m3fn)
"""What sets may be stored as for scoring, beside the floating dtypes."""


def packed(
    name: str, v: Tensor, mask: Tensor | None, offsets: Tensor | None, scale: Tensor | None = None
) -> PackedSets:
    """Packs one side, and says what is wrong with it. Nothing is copied but the valid rows next to a mask, and rows
    without unit stride in between."""
    nested = isinstance(v, Tensor) and v.is_nested
    if scale is not None:
        return _with_scale(name, packed(name, v, mask, offsets), v, mask, scale)
    if nested or offsets is not None:
        if mask is not None:
            form = "a nested tensor" if nested else f"{name}_offsets"
            raise ValueError(f"{name}_mask: expected None beside {form}, which says what is valid")
        if nested and offsets is not None:
            raise ValueError(f"{name}_offsets: expected None beside a nested tensor, which has its own")
    if nested:
        return _of_nested(name, v)
    if offsets is None:
        _check.floating(name, v, _check.SETS, also=CODES)
        _check.mask(f"{name}_mask", mask, v.shape[:2], name, v)
        N, K, _ = v.shape
        rows = v.flatten(0, 1)
        if mask is None:
            return PackedSets(rows, torch.arange(N + 1, device=v.device) * K)
        return PackedSets(_valid_of(rows, mask), _offsets_of(mask.sum(1)))
    _check.floating(name, v, ("vectors", "features"), also=CODES)
    label = f"{name}_offsets"
    if not isinstance(offsets, Tensor):
        raise TypeError(f"{label}: expected a torch.Tensor of int32 or int64 or None, got {type(offsets).__name__}")
    if offsets.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{label}: expected int32 or int64, got {str(offsets.dtype).removeprefix('torch.')}")
    if offsets.dim() != 1 or offsets.shape[0] < 1:
        raise ValueError(f"{label}: expected shape [sets + 1], got {list(offsets.shape)}")
    if offsets.device != v.device:
        raise ValueError(f"{label}: expected device {v.device} as of {name}, got {offsets.device}")
    return PackedSets(v, offsets.to(torch.int64))


def _with_scale(name: str, sets: PackedSets, v: Tensor, mask: Tensor | None, scale: Tensor) -> PackedSets:
    label, padded = f"{name}_scale", v.dim() == 3 and not v.is_nested
    _check.floating(label, scale, ("sets", "vectors") if padded else ("vectors",))
    expected = tuple(v.shape[:2]) if padded else (sets.rows.shape[0],)
    if tuple(scale.shape) != expected:
        raise ValueError(f"{label}: expected shape {list(expected)} as of {name}, got {list(scale.shape)}")
    if sets.rows.dtype not in CODES:
        dtype = str(sets.rows.dtype).removeprefix("torch.")
        raise ValueError(f"{label}: expected None beside {name} of {dtype}, which are no codes")
    if scale.device != sets.rows.device:
        raise ValueError(f"{label}: expected device {sets.rows.device} as of {name}, got {scale.device}")
    flat = scale.flatten()
    if mask is not None:
        flat = _valid_of(flat[:, None], mask).squeeze(1)
    return sets._replace(scale=flat)


def _valid_of(rows: Tensor, mask: Tensor) -> Tensor:
    """The valid rows, in order. On a GPU, which nothing is to wait for, and where shapes are traced, as many as the
    mask has places: the rest are copies of row 0."""
    if gather_rows.pays(mask):
        return gather_rows.masked_rows(rows, mask.flatten())
    places = torch.nonzero_static(mask.flatten(), size=mask.numel(), fill_value=0).squeeze(1)
    if rows.dtype in CODES:  # not every torch can do it for float8
        return rows.view(torch.uint8).index_select(0, places).view(rows.dtype)
    return rows.index_select(0, places)


def _of_nested(name: str, v: Any) -> PackedSets:
    if v.layout != torch.jagged:
        raise ValueError(f"{name}: expected a nested tensor of layout torch.jagged, got {v.layout}")
    if v.dim() != 3 or v.lengths() is not None:
        raise ValueError(f"{name}: expected a nested tensor [sets, *, features] without holes, got shape {v.shape}")
    rows: Tensor = v.values()
    if rows.dim() != 2:
        raise ValueError(f"{name}: expected a nested tensor [sets, *, features], got shape {v.shape}")
    _check.floating(name, rows, ("vectors", "features"), also=CODES)
    return PackedSets(rows, v.offsets().to(torch.int64))


def _offsets_of(counts: Tensor) -> Tensor:
    return torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def means(name: str, sets: PackedSets, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The mean vector of each set ``[N, D]``, accumulated in dtype, and which sets have a vector ``[N]``."""
    rows = sets.decoded(dtype).rows
    counts = _sizes(f"{name}_offsets", sets.offsets, rows)
    last = sets.rows.shape[0] - sets.offsets[-1:]  # rows of no set are a segment of their own
    total = torch.segment_reduce(rows, "sum", lengths=torch.cat([counts, last]), initial=0.0, unsafe=True)[:-1]
    return total / counts.clamp(min=1).to(rows.dtype)[:, None], counts > 0


def _sizes(name: str, offsets: Tensor, rows: Tensor) -> Tensor:
    """How many vectors each set has; offsets are checked where the kernels of the other kinds check them."""
    if rows.device.type != "cpu":
        return offsets.diff()
    sizes: Tensor = torch.ops.setemb.set_sizes(offsets, rows.shape[0], name)
    return sizes


@torch.library.impl(SIZES, "CompositeExplicitAutograd")
def _(offsets: Tensor, rows: int, name: str) -> Tensor:
    """An op, as what is traced cannot depend on values."""
    check_offsets(name, offsets, rows)
    return offsets.diff()


@torch.library.register_fake(SIZES)
def _(offsets: Tensor, rows: int, name: str) -> Tensor:
    return offsets.new_empty(offsets.shape[0] - 1)


def check_offsets(name: str, offsets: Tensor, rows: int) -> None:
    """Offsets whose values can be read without waiting for a device."""
    before = torch.cat((offsets.new_zeros(1), offsets[:-1]))
    wrong = (offsets < before) | (offsets > rows)
    wrong[0] |= offsets[0] != 0
    if bool(wrong.any()):
        i = int(wrong.nonzero()[0])
        got = f"{int(offsets[i])} at [{i}]" + (f", after {int(offsets[i - 1])}" if i else "")
        raise ValueError(f"{name}: expected offsets from 0 that never decrease, at most {rows}, got {got}")


def check_candidates(candidates: Tensor, sets: int) -> None:
    """Candidates whose values can be read, likewise."""
    least, most = (int(v) for v in candidates.aminmax()) if candidates.numel() else (-1, -1)
    if least < -1 or most >= sets:
        raise ValueError(
            f"candidates: expected -1 (none) or the index of one of {sets} sets of y, got {least} to {most}"
        )
