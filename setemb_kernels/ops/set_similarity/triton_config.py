"""Set similarities on a GPU, in Triton: tile sizes, how a kind is made of directions, and every kernel that a call may
launch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from setemb_kernels import _triton
from setemb_kernels.ops.set_similarity import triton_kernels as kernels
from setemb_kernels.ops.set_similarity.triton_gradient_kernels import gradient_kernel

# --- tile sizes


class Limits(NamedTuple):
    """How much is done at a time."""

    workspace_bytes: int = 256 << 20
    """What the state of as many sets as are processed at a time takes; one set with all others may need more."""
    programs: int = 1 << 30
    """Of one launch."""
    programs_each: int = 4
    """For each multiprocessor, before a pair is no longer split."""
    band: int = 32
    """Sets of x that share a set of y in the cache."""


LIMITS = Limits()

COMBINE = 1024
"""Numbers that a program of combine_kernel adds up."""


class Config(NamedTuple):
    """Tile sizes and launch options of a kernel: rows and columns of scores, features at a time."""

    rows: int
    columns: int
    block_d: int
    whole: bool
    """All features are held at once."""
    features: int
    """Of a gradient that a program makes."""
    num_warps: int
    num_stages: int

    def launch(self, kernel: Any) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        names = {"ROWS": self.rows, "COLUMNS": self.columns}
        if kernel is gradient_kernel:
            names = {"OWN": self.rows, "OTHER": self.columns, "FEATURES": self.features}
        options: dict[str, Any] = {"num_warps": self.num_warps, "num_stages": self.num_stages}
        options |= {"enable_fp_fusion": True, "maxnreg": 255}  # left alone, the compiler may spill to run more programs
        return names | options | {"BLOCK_D": self.block_d, "WHOLE": self.whole}


def pair_config(a_mean: int, b_mean: int, D: int, dtype: torch.dtype) -> Config:
    """Tile sizes of the kernels with a program for each pair, for sets of so many vectors in the mean."""
    largest = 32 if dtype == torch.float32 else 64
    block_d, whole = _block_d(D, dtype)
    rows, columns = _block(a_mean, largest), _block(b_mean, largest)
    return Config(rows, columns, block_d, whole, 0, 4, 3)


def gradient_config(own_mean: int, other_mean: int, D: int, dtype: torch.dtype) -> Config:
    """Tile sizes of the kernel that owns blocks of rows."""
    largest = 32 if dtype == torch.float32 else 64
    block_d, whole = _block_d(D, dtype)
    features = min(64 if dtype == torch.float32 else 256, max(16, _triton.next_power_of_two(D)))
    rows, columns = _block(own_mean, largest), _block(other_mean, largest)
    return Config(rows, columns, block_d, whole, features, 8 if rows * features > 64 * 128 else 4, 2)


def _block(mean: int, largest: int) -> int:
    """Rows of a tile: three sizes, so that little of a tile is empty, and of lengths no more is compiled for than
    whether they are up to 16, up to 32, or more in the mean."""
    return min(largest, max(16, _triton.next_power_of_two(mean)))


def _block_d(D: int, dtype: torch.dtype) -> tuple[int, bool]:
    """Features at a time, and whether these are all."""
    if dtype == torch.float32:  # whose products hold both operands in registers
        return 16, D <= 16
    if dtype.itemsize == 1:  # a product takes 32 of them at least
        return (max(32, _triton.next_power_of_two(D)), True) if D <= 256 else (128, False)
    return (max(16, _triton.next_power_of_two(D)), True) if D <= 128 else (64, False)


# --- directions


class Direction(NamedTuple):
    """Rows of one side are reduced over the other's: how, and what the sum over rows is times."""

    swap: bool
    """Rows are of y."""
    how: int
    best: bool
    """Of all rows the largest alone counts."""
    mean: bool
    """Over the rows."""
    factor: float


def directions(kind: str, mean: bool) -> list[Direction]:
    hard, soft, sigmoid = kernels.HARD.value, kernels.SOFT.value, kernels.SIGMOID.value
    if kind in ("smooth_chamfer", "chamfer"):
        how = soft if kind == "smooth_chamfer" else hard
        return [Direction(swap, how, False, True, 0.5) for swap in (False, True)]
    if kind == "match_probability":
        return [Direction(False, sigmoid, False, False, 1.0)]
    return [Direction(False, soft if kind == "soft_maxsim" else hard, kind == "max", mean, 1.0)]


# --- ahead of time


def configs_of_codes(
    kind: str, x_mean: int, y_mean: int, D: int, dtype: torch.dtype, scaled: bool
) -> Iterator[_triton.Build]:
    """The kernel that `forward_of_codes` launches, in one direction."""
    direction = directions(kind, False)[0]
    types = dict.fromkeys(("a", "b"), f"*{_triton.NAMES[dtype]}") | dict.fromkeys(("a_offsets", "b_offsets"), "*i64")
    types |= dict.fromkeys(("out", "parts", "a_scale", "b_scale"), "*fp32")
    types |= dict.fromkeys(("alpha", "bias", "factor"), "fp32")
    constants: dict[str, Any] = {"HOW": direction.how, "MEAN": direction.mean, "BEST": direction.best, "SWAP": False}
    constants |= {"PRECISION": "ieee", "ALPHA_ON_DEVICE": False, "BIAS_ON_DEVICE": False, "BAND": LIMITS.band}
    constants["LIMIT"] = torch.finfo(torch.float32).max
    constants |= {"a_stride_d": 1, "b_stride_d": 1, "candidates": None}
    if not scaled:
        constants |= {"a_scale": None, "b_scale": None}
    launch = pair_config(x_mean, y_mean, D, dtype).launch(kernels.similarity_kernel)
    yield _triton.build(kernels.similarity_kernel, types, constants, launch, {"D", "a_stride", "b_stride"}, True)


def configs(
    kind: str, x_mean: int, y_mean: int, D: int, dtype: torch.dtype, has_candidates: bool = False, add: bool = False
) -> Iterator[_triton.Build]:
    """Every kernel that forward and backward launch for sets of so many vectors in the mean, in one direction, with
    gradients for alpha and bias. add: with a result and sums of gradients in float32, as where there are several
    windows."""
    direction = directions(kind, False)[0]
    hard = direction.how == kernels.HARD.value
    name = _triton.NAMES[dtype]
    types = dict.fromkeys(("a", "b", "own", "other", "grad"), f"*{name}")
    types |= dict.fromkeys(("a_offsets", "b_offsets", "own_offsets", "other_offsets"), "*i64")
    types |= dict.fromkeys(("candidates", "order", "bounds"), "*i64")
    types |= dict.fromkeys(("parts", "sums"), "*fp32") | {"out": "*fp32" if add else f"*{name}"}
    types |= dict.fromkeys(("alpha", "bias", "factor"), "fp32") | {"state": "*i32" if hard else "*fp32"}
    constants: dict[str, Any] = {"HOW": direction.how, "MEAN": direction.mean, "BEST": direction.best, "SWAP": False}
    constants |= {"PRECISION": "ieee", "ALPHA_ON_DEVICE": False, "BIAS_ON_DEVICE": False}
    constants |= {"BAND": 1 if has_candidates else LIMITS.band}
    constants["LIMIT"] = torch.finfo(torch.float32 if add else dtype).max
    constants |= {"STORE": direction.how != kernels.SIGMOID.value, "SUM": not hard}
    constants |= {"sums": None} if hard else {}
    constants |= {"state": None} if direction.how == kernels.SIGMOID.value else {}
    constants |= dict.fromkeys(("a_stride_d", "b_stride_d", "own_stride_d", "other_stride_d", "grad_stride_j"), 1)
    constants |= {"a_scale": None, "b_scale": None}
    if not has_candidates:
        constants |= {"candidates": None, "order": None, "bounds": None}
    aligned = {"D", "a_stride", "b_stride", "own_stride", "other_stride"}
    products = dtype != torch.float32

    def build(kernel: Any, config: Config, uses_tensor_cores: bool, **more: Any) -> _triton.Build:
        return _triton.build(kernel, types, constants | more, config.launch(kernel), aligned, uses_tensor_cores)

    pair = pair_config(x_mean, y_mean, D, dtype)
    yield build(kernels.similarity_kernel, pair, products)
    yield build(kernels.state_kernel, pair, products)
    for options in ({}, {"candidates": None, "BEST": False, "LIMIT": None}):  # parts of a similarity, of a gradient
        yield _triton.build(kernels.combine_kernel, types, constants | options, {"BLOCK": COMBINE})
    factor = 2.0**15 if dtype == torch.float16 else 1.0
    for is_x, own, other in ((True, x_mean, y_mean), (False, y_mean, x_mean)):
        config = gradient_config(own, other, D, dtype)
        for adds in (False, True)[: 1 + add]:
            yield build(
                gradient_kernel, config, products and not (hard and is_x),
                OWN_IS_X=is_x, OWN_IS_A=is_x, ADD=adds, FACTOR=factor,
            )  # fmt: skip
