"""Smooth-Chamfer on a GPU, in Triton: tile sizes, and every kernel that a call may launch."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from setemb_kernels import _triton
from setemb_kernels.ops.smooth_chamfer import triton_kernels as kernels
from setemb_kernels.ops.smooth_chamfer import triton_packing as packing


class Config(NamedTuple):
    """Tile sizes and launch options of a kernel."""

    rows: int
    columns: int
    part: int
    block_d: int
    tiles: int
    flatten: bool
    bulk: bool
    num_warps: int
    num_stages: int
    programs: int = 1
    """Of a multiprocessor, where the loop over tiles is pipelined."""

    @functools.cache  # noqa: B019 -- there are few
    def launch(self) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        names = {"rows": "ROWS", "columns": "COLUMNS", "part": "PART", "block_d": "BLOCK_D", "tiles": "TILES"}
        names |= {"flatten": "FLATTEN", "bulk": "BULK"}
        return {names.get(name, name): value for name, value in self._asdict().items() if name != "programs"} | {
            "enable_fp_fusion": True,
            "maxnreg": 255,  # left alone, the compiler may spill to make room for a second program
        }


LARGEST_PAIRED = 256
"""Features up to which two programs share a multiprocessor of sm_90: one multiplies while the other takes exponentials
and writes. On an H100, N = M = 8192, K = L = 4, multiples of the plain products: with 128 features forward 1.54 for
1.63, forward + backward 2.07 for 2.31; with 1024, where half a tile reads more for each product, forward 1.45 for 1.23.
W with masks would need more registers."""

LARGEST_LIGHT = 1 << 24
"""Up to so many scores nothing is packed; see `triton_light`."""

LARGEST_ALONE = 1 << 20
"""Up to so many, where they are, the variant for any scores is launched alone: both together take a second launch."""

GRADIENT_BLOCK = (16, 512)
"""What a program looks through for the largest upstream gradient."""


def variants(
    K: int,
    L: int,
    D: int,
    dtype: torch.dtype,
    arch: int,
    *,
    masked: bool,
    backward: bool,
    alone: bool,
    is_loss: bool = False,
) -> list[tuple[bool, Config]]:
    """Whether it shifts, and tile sizes, of each variant that a call launches.

    Args:
        K, L: vectors of a set.
        D: features.
        dtype: of the operands. Of float32, scores are made before; see `triton`.
        arch: 10 * major + minor of the compute capability.
        masked: some vectors are not valid.
        backward: the kernel that makes chunks of W, or the forward one.
        alone: the variant for any scores alone.
        is_loss: the backward kernel makes the upstream gradient itself, which takes more registers.
    """
    if dtype == torch.float32:
        return [(True, _stored_config(K, L))]
    shifted = _config(K, L, arch, 64 if backward else 128, True, 3 if backward else 4)
    if alone:
        return [(True, shifted)]
    plain = _config(K, L, arch, 128, False, 3 if backward else 4)
    if is_loss:
        narrow = masked or max(K, L) > 8
        return [(False, plain._replace(columns=min(plain.columns, plain.part)) if narrow else plain), (True, shifted)]
    if 90 <= arch < 100 and plain.rows == plain.part == 128 and D <= LARGEST_PAIRED and not (backward and masked):
        plain = plain._replace(columns=128, num_warps=4, programs=2, num_stages=3)
        if backward:  # beside what a tile of W passes through on its way to memory
            plain, shifted = plain._replace(part=64, block_d=32, num_stages=4), shifted._replace(part=64)
    return [(False, plain), (True, shifted)]


@functools.cache
def _stored_config(K: int, L: int) -> Config:
    """For scores that lie in memory. At K = 4 a row has a warp and sets have four, so a thread holds a set's columns of
    scores; 32 numbers a thread leave room for several programs, which wait for memory."""
    slots_x, slots_y = _triton.next_power_of_two(K), _triton.next_power_of_two(L)
    rows = max(32, slots_x)
    part = max(32 if min(slots_x, slots_y) < 4 else min(128, 4096 // rows), slots_y)
    warps = min(max(rows * part // 1024, 4), 8)
    return Config(rows, part, part, 16, 8, flatten=False, bulk=False, num_warps=warps, num_stages=1)


@functools.cache
def _config(K: int, L: int, arch: int, rows: int, shifted: bool, stages: int) -> Config:
    """What the compiler holds in registers without a spill, read off for each kind of chip.

    Tensor cores of sm_100 leave one row to a thread, so that sums over k go through shuffles; where K or L is below 4,
    there is a pair for every few scores. Both take small tiles.
    """
    slots_x, slots_y = _triton.next_power_of_two(K), _triton.next_power_of_two(L)
    columns, part = 128 if shifted or not 90 <= arch < 100 else 256, 128
    if min(slots_x, slots_y) < 4:
        rows, columns, part = (64, 32, 32) if arch >= 100 else (64, 64, 64)
    elif arch >= 100:
        rows, columns, part = (64, 32, 32) if shifted else (128, 64, 32)
    rows, part = max(rows, slots_x), max(part, slots_y)
    columns = part if slots_x > 128 else max(columns, part)
    return Config(
        rows=rows,
        columns=columns,
        part=part,
        block_d=64,
        tiles=8,
        flatten=90 <= arch < 100,
        bulk=arch >= 90,
        num_warps=8,
        num_stages=stages if 90 <= arch < 100 else 3,
    )


def block(slots: int, features: int, sets: int) -> dict[str, int]:
    """What one program packs or unpacks at a time: about 4096 numbers, of as many sets as divide `sets`."""
    size = min(_triton.next_power_of_two(features), max(16, 4096 // slots))
    return {"SETS": math.gcd(max(1, 4096 // (slots * size)), sets), "BLOCK": size}


def largest_exponent(features: int) -> int:
    """Of packed numbers, so that no dot product of so many overflows."""
    return (124 - math.ceil(math.log2(features))) // 2


def group(slots: int) -> int:
    """Sets of x whose rows alternate."""
    return max(1, 16 // slots)


# --- ahead of time


def configs(K: int, L: int, D: int, dtype: torch.dtype, arch: int, masked: bool = False) -> Iterator[_triton.Build]:
    """Every kernel that forward and backward launch for such sets on such a chip; with masks, for a wide result."""
    slots_x, slots_y = _triton.next_power_of_two(K), _triton.next_power_of_two(L)
    is_masked = masked or (slots_x, slots_y) != (K, L)
    part = variants(K, L, D, dtype, arch, masked=is_masked, backward=False, alone=True)[0][1].part
    limit = torch.finfo(dtype).max
    shared: dict[str, Any] = {"K": slots_x, "L": slots_y, "GROUP": group(slots_x), "ALPHA_ON_DEVICE": False}
    shared["MASKED"] = is_masked
    shared |= {"x": None, "y": None} if dtype == torch.float32 else {"scores": None}
    layout: dict[str, Any] = {
        f"{side}_{name}": value
        for side, slots, sets_a_group in (("X", slots_x, group(slots_x)), ("Y", slots_y, part // slots_y))
        for name, value in {
            "SLOTS": slots,
            "GROUP": sets_a_group,
            **block(slots, _triton.cdiv(D, 64) * 64, 4096),
        }.items()
    }
    gradient = {"GRAD_ROWS": GRADIENT_BLOCK[0], "GRAD_COLUMNS": GRADIENT_BLOCK[1], "column_stride": 1}
    adjacent = {"x_stride_d": 1, "y_stride_d": 1}
    for absent in ((), ("grad",)):
        constants = {**layout, **gradient, **adjacent, **dict.fromkeys(absent), "LARGEST_EXPONENT": 56}
        constants["NEED_PEAKS"] = True
        yield _build(packing.pack_kernel, dtype, constants, {}, is_masked, masked)
    yield _build(packing.unpack_kernel, dtype, layout, {}, is_masked, masked)
    for shifted, config in variants(K, L, D, dtype, arch, masked=is_masked, backward=False, alone=False):
        constants = {**shared, "SHIFTED": shifted, "ALONE": dtype == torch.float32, "LIMIT": limit}
        yield _build(kernels.forward_kernel, dtype, constants, config.launch(), is_masked, masked)
    for shifted, config in variants(K, L, D, dtype, arch, masked=is_masked, backward=True, alone=False):
        for need_alpha in (False, True)[: 1 + shifted]:
            constants = {**shared, "SHIFTED": shifted, "NEED_CHUNK": True, "NEED_ALPHA": need_alpha, "stride_m": 1}
            constants |= {"ALONE": need_alpha or dtype == torch.float32}
            constants |= {} if need_alpha else {"alpha_parts": None}
            yield _build(kernels.weights_kernel, dtype, constants, config.launch(), is_masked, masked)


def _build(
    kernel: Any,
    dtype: torch.dtype,
    constants: dict[str, Any],
    launch: dict[str, Any],
    has_valid: bool,
    has_masks: bool,
) -> _triton.Build:
    """With masks, for a wide result."""
    name = _triton.NAMES[dtype]
    types = {"x_valid": "*i8", "y_valid": "*i8", "alpha": "fp32", "x_mask": "*i1", "y_mask": "*i1"}
    types |= dict.fromkeys(("scores", "stats", "alpha_parts", "x_sums", "y_sums"), "*fp32")
    arrays = ("x", "y", "out", "grad", "chunk", "x_packed", "y_packed", "x_grad", "y_grad")
    types |= dict.fromkeys(arrays, f"*{name}")
    if has_masks:
        types |= {"out": "*fp32", "grad": "*fp32"}
    if launch.get("BULK"):
        for key, rows, columns in (("x", "ROWS", "BLOCK_D"), ("y", "COLUMNS", "BLOCK_D"), ("chunk", "ROWS", "PART")):
            types[key] = f"tensordesc<{name}[{launch[rows]},{launch[columns]}]>"
    if not has_valid:
        constants = constants | {"x_valid": None, "y_valid": None}
    if not has_masks:
        constants = constants | {"x_mask": None, "y_mask": None}
    on_tensor_cores = "SHIFTED" in constants and dtype != torch.float32
    return _triton.build(kernel, types, constants, launch, {"features"}, on_tensor_cores)
