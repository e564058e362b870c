"""What the Triton backend's two ways through the tokens share: tile sizes, sums of parts."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from setemb_kernels import _triton
from setemb_kernels.ops.slot_attention import triton_kernels as kernels

SPLIT_TOKENS = 256
"""Tokens that a program sums over at least, before more programs are worth their launch."""


class Config(NamedTuple):
    """Tile sizes and launch options of a kernel."""

    rows: int
    tokens: int
    block_d: int
    num_warps: int
    num_stages: int
    is_large: bool = False
    """Left alone, the compiler would spill a little of such a tile to make room for one more program."""

    def launch(self) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        options = {"ROWS": self.rows, "TOKENS": self.tokens, "BLOCK_D": self.block_d, "enable_fp_fusion": True}
        options |= {"num_warps": self.num_warps, "num_stages": self.num_stages}
        return options | ({"maxnreg": 255} if self.is_large else {})


def block_d_of(D: int, largest: int) -> int:
    return min(largest, max(16, _triton.next_power_of_two(D)))


def layout(K: int) -> dict[str, int]:
    """The order of rows in a tile of weights: GROUP heads of SLOTS slots to a block of 16."""
    slots = _triton.next_power_of_two(K)
    return {"SLOTS": slots, "GROUP": max(1, 16 // slots)}


def combine(
    partial: Tensor, sums: Tensor | None, out: Tensor, total: Tensor | None, splits: int, token_blocks: int, eps: float
) -> None:
    """Add up parts ``[splits, B, H, K, D]`` into out; given sums of weights, fill total, and divide by it."""
    has_sums = sums is not None, total is not None
    launch = _combining(out.shape, out.stride(), out.dtype, out.device, has_sums, splits, token_blocks, eps)
    launch(partial, sums, out, total)


@functools.lru_cache(_triton.LAYOUTS)
def _combining(
    shape: torch.Size,
    strides: tuple[int, ...],
    dtype: torch.dtype,
    device: torch.device,
    has_sums: tuple[bool, bool],
    splits: int,
    token_blocks: int,
    eps: float,
) -> _triton.Launch:
    B, H, K, D = shape
    block = rows_block(D)
    feature_blocks = max(1, _triton.cdiv(D, block["BLOCK_D"]))
    programs = _triton.cdiv(B * H * K, block["ROWS"]) * feature_blocks
    numbers = feature_blocks, splits, B * H * K, H, K, D, token_blocks, eps, *strides
    return _triton.Launch(kernels.combine_kernel, programs, numbers, **block)


def rows_block(D: int) -> dict[str, int]:
    """What a program that sums over rows or splits takes at a time: about 1024 numbers."""
    block_d = block_d_of(D, 256)
    return {"ROWS": 1024 // block_d, "BLOCK_D": block_d}


def factors_of(grad: Tensor) -> Tensor:
    """For each item a power of two above its largest upstream gradient; 1 where that is not finite."""
    if not grad.numel():
        return grad.new_ones(len(grad), dtype=torch.float32)
    largest = torch.linalg.vector_norm(grad, ord=math.inf, dim=(1, 2, 3), dtype=torch.float32)
    return torch.where(largest.isfinite(), torch.frexp(largest).exponent.float(), 0.0).exp2()
