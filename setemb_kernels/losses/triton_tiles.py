"""What the losses do with a tile of similarities on a GPU, in Triton: the functions of `torch_tiles`, each with one
read of the tile, and nothing that waits for the device. `triton_kernels` has the kernels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from setemb_kernels import _triton
from setemb_kernels.losses import triton_kernels as kernels

if TYPE_CHECKING:
    from setemb_kernels.losses.tiles import Ids
    from setemb_kernels.losses.triplet import Winners

BLOCK: dict[str, Any] = {"ROWS": 64, "COLUMNS": 128, "num_warps": 8, "enable_fp_fusion": False}
"""Of a tile, for a program: partial results are a twentieth of a tile's bytes. Without fused multiply-adds a logit is
the same number wherever it is computed; these kernels wait for memory anyway."""

COMBINE = {"ITEMS": 64, "PARTS": 32}
"""Rows or columns that a program combines, and blocks at a time."""

TAKE = {"BLOCK": 1024}


def add_negatives(
    s: Tensor,
    ids: Ids,
    scale: Tensor,
    rows: Tensor,
    columns: Tensor,
    listed: tuple[Tensor, Tensor],
    logits: Tensor,
) -> None:
    (n, m), (down, across) = s.shape, _blocks(s)
    arguments: tuple[Any, ...]
    row_parts = s.new_empty(2, across, n)
    column_parts = s.new_empty(2, down, m)
    with torch.cuda.device_of(s):
        arguments = s, scale, *_ids(ids), row_parts, column_parts, *_layout(s, ids)
        _triton.launch(kernels.negatives_kernel, (across, down), arguments, GROUPS=_grouped(ids), **BLOCK)
        arguments = row_parts, column_parts, rows, columns, n, m, down, across
        _triton.launch(kernels.combine_kernel, _combining(s), arguments, **COMBINE)
        if len(logits):
            arguments = s, scale, *listed, logits, len(logits), *_layout(s, ids)
            _triton.launch(kernels.take_kernel, _triton.cdiv(len(logits), TAKE["BLOCK"]), arguments, **TAKE)


def infonce_gradients(
    s: Tensor, ids: Ids, scale: Tensor, weight: Tensor, rows: Tensor, columns: Tensor | None
) -> tuple[Tensor, Tensor]:
    down, across = _blocks(s)
    parts = s.new_empty(down * across)
    symmetric = columns is not None
    columns = rows if columns is None else columns  # not read
    with torch.cuda.device_of(s):
        _triton.launch(
            kernels.infonce_gradient_kernel, (across, down),
            (
                s, scale, weight * scale, *_ids(ids), rows[0], rows[1], columns[0], columns[1], parts,
                *_layout(s, ids), rows.stride(1), columns.stride(1),
            ),
            GROUPS=_grouped(ids), SYMMETRIC=symmetric, **BLOCK,
        )  # fmt: skip
    return s, parts.sum(dtype=torch.float64) / scale


def sigmoid_cost(s: Tensor, ids: Ids, scale: Tensor, bias: Tensor) -> Tensor:
    down, across = _blocks(s)
    parts = s.new_empty(down * across)
    with torch.cuda.device_of(s):
        arguments = s, scale, bias, *_ids(ids), parts, *_layout(s, ids)
        _triton.launch(kernels.sigmoid_kernel, (across, down), arguments, GROUPS=_grouped(ids), **BLOCK)
    return parts.sum(dtype=torch.float64)


def sigmoid_gradients(
    s: Tensor, ids: Ids, scale: Tensor, bias: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    down, across = _blocks(s)
    parts = s.new_empty(2, down * across)
    with torch.cuda.device_of(s):
        arguments = s, scale, bias, weight, *_ids(ids), parts, *_layout(s, ids)
        _triton.launch(kernels.sigmoid_gradient_kernel, (across, down), arguments, GROUPS=_grouped(ids), **BLOCK)
    by_scale, by_bias = parts.sum(1, dtype=torch.float64)
    return s, by_scale, by_bias


def add_candidates(s: Tensor, ids: Ids, rows: Winners, columns: Winners, starts: tuple[int, int]) -> None:
    (n, m), (down, across) = s.shape, _blocks(s)
    arguments: tuple[Any, ...]
    row_parts = s.new_empty(across, n, dtype=torch.int64)
    column_parts = s.new_empty(down, m, dtype=torch.int64)
    with torch.cuda.device_of(s):
        arguments = s, *_ids(ids), row_parts, column_parts, *_layout(s, ids)
        _triton.launch(kernels.candidates_kernel, (across, down), arguments, GROUPS=_grouped(ids), **BLOCK)
        arguments = row_parts, column_parts, *rows, *columns, n, m, down, across, *starts
        _triton.launch(kernels.winners_kernel, _combining(s), arguments, **COMBINE)


def _blocks(s: Tensor) -> tuple[int, int]:
    """How many are below each other and side by side."""
    return _triton.cdiv(s.shape[0], BLOCK["ROWS"]), _triton.cdiv(s.shape[1], BLOCK["COLUMNS"])


def _combining(s: Tensor) -> tuple[int, int]:
    """The programs that combine what was found for rows, and those for columns."""
    return _triton.cdiv(max(s.shape), COMBINE["ITEMS"]), 2


def _layout(s: Tensor, ids: Ids) -> tuple[int, ...]:
    """n, m, the stride of rows, and where rows and columns begin in the batch."""
    assert s.stride(1) == 1 or s.shape[1] == 1
    return *s.shape, s.stride(0), ids.x_start, ids.y_start


def _grouped(ids: Ids) -> bool:
    return ids.x is not None


def _ids(ids: Ids) -> tuple[Tensor | None, Tensor | None]:
    return tuple(v if v is None else v.contiguous() for v in (ids.x, ids.y))  # type: ignore[return-value]


# --- ahead of time


def configs() -> Iterator[_triton.Build]:
    """Every kernel that a loss launches for a tile, with and without groups."""
    for groups in (False, True):
        constants: dict[str, Any] = {"GROUPS": groups, **({} if groups else {"x_ids": None, "y_ids": None})}
        for kernel in (kernels.negatives_kernel, kernels.sigmoid_kernel, kernels.sigmoid_gradient_kernel):
            yield _build(kernel, constants, BLOCK)
        for symmetric in (False, True):
            strides = {"row_stride": 1, "column_stride": 1}
            yield _build(kernels.infonce_gradient_kernel, {**constants, **strides, "SYMMETRIC": symmetric}, BLOCK)
        yield _build(kernels.candidates_kernel, constants, BLOCK, parts="*i64")
    yield _build(kernels.combine_kernel, {}, COMBINE)
    yield _build(kernels.winners_kernel, {}, COMBINE, parts="*i64")
    yield _build(kernels.take_kernel, {}, TAKE, places="*i64")


def _build(
    kernel: Any, constants: dict[str, Any], launch: dict[str, Any], parts: str = "*fp32", places: str = "*fp32"
) -> _triton.Build:
    floats = ("s", "scale", "bias", "weight", "parts", "out", "row_value", "column_value")
    types = dict.fromkeys((*floats, "row_lse", "row_weight", "column_lse", "column_weight"), "*fp32")
    types |= dict.fromkeys(("x_ids", "y_ids", "row_who", "column_who"), "*i64")
    types |= {"row_parts": parts, "column_parts": parts, "rows": places, "columns": places}
    return _triton.build(kernel, types, constants, launch, {"stride", "n", "m"})
