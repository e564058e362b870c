"""Smooth-Chamfer of few scores on a GPU, in Triton: 1 launch forward, 3 backward, where a packed call has 3 and 7.

A small call is bound by the host, which a launch costs 5 to 40 us. So sets are taken as they lie in memory, by the bulk
copy engine, W of all pairs fits into a workspace, and its plain products with x and y are the gradients as they are:

    light_forward_kernel    x, y -> similarity ``[N, M]``
    light_weights_kernel    x, y, upstream gradient -> W ``[N K, M L]``
    torch.addmm             dX = W Y, dY = W^T X

In bfloat16, which has the range of float32; forward also in float16. Sets of 1, 2, 4, ... 64 vectors without masks.
Sums over slots pass through more shuffles than those of a packed tile, which costs a kernel less than a launch. The
last products are plain ones, which torch lets round partial sums to bfloat16
(``torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction``).

**Range.** Each tile looks at its own scores: where ``|alpha c|`` is bounded, one exp serves both directions; else they
are shifted; and where one is not finite, vectors were too long, and the tile is made again from vectors over powers of
two. W is stored times 2^-12, so that no sum over columns overflows before its end.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from setemb_kernels import _device, _triton
from setemb_kernels.ops.smooth_chamfer import triton_config as sizes
from setemb_kernels.ops.smooth_chamfer import triton_light_kernels as kernels

MAX_VECTORS = 64
"""Of a set."""

TYPES = {False: (torch.bfloat16, torch.float16), True: (torch.bfloat16,)}
"""Forward, and backward."""

LEAST_TILES = 128
"""With fewer tiles of 128 columns they are of 64."""


class Plan(NamedTuple):
    """What calls of one layout share."""

    launch: _triton.Launch
    x: tuple[tuple[int, int], tuple[int, int]]
    """Shape and block of the descriptor of all vectors."""
    y: tuple[tuple[int, int], tuple[int, int]]
    weights: tuple[tuple[int, int], tuple[int, int]]


def forward(
    x: Tensor, y: Tensor, alpha: float | Tensor, x_mask: Tensor | None, y_mask: Tensor | None, dtype: torch.dtype
) -> Tensor | None:
    """The similarity ``[N, M]`` in so many bits, where this serves."""
    plan = _plan_of(x, y, alpha, x_mask, y_mask, dtype, None)
    if plan is None:
        return None
    out = x.new_empty(x.shape[0], y.shape[0], dtype=dtype)
    plan.launch(_triton.descriptor(x, *plan.x), _triton.descriptor(y, *plan.y), out, alpha)
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    alpha: float | Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    need_x: bool,
    need_y: bool,
) -> tuple[Tensor, Tensor] | None:
    """Gradients of x and y, where this serves; one that is not needed is empty ``[0]``."""
    plan = _plan_of(x, y, alpha, x_mask, y_mask, x.dtype, grad)
    if plan is None:
        return None
    w = x.new_empty(plan.weights[0])
    x_rows, y_rows = _triton.descriptor(x, *plan.x), _triton.descriptor(y, *plan.y)
    plan.launch(x_rows, y_rows, grad, _triton.descriptor(w, *plan.weights), alpha)
    grad_x = _product(w, y, plan.y[0], x) if need_x else x.new_empty(0)
    grad_y = _product(w.T, x, plan.x[0], y) if need_y else x.new_empty(0)
    return grad_x, grad_y


def _product(w: Tensor, v: Tensor, shape: tuple[int, int], like: Tensor) -> Tensor:
    """``W V`` of the vectors of all sets, in the shape of the sets it is the gradient of."""
    out = like.new_empty(like.shape)
    rows, factor = out.view(w.shape[0], shape[1]), 2.0**-kernels.WEIGHT_EXPONENT.value
    if out.device.type == "cpu":  # interpreted; there an operand is multiplied, not the sum
        torch.mm(w, v.view(shape), out=rows).mul_(factor)
    else:
        torch.addmm(rows, w, v.view(shape), beta=0, alpha=factor, out=rows)
    return out


def _plan_of(
    x: Tensor,
    y: Tensor,
    alpha: float | Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    dtype: torch.dtype,
    grad: Tensor | None,
) -> Plan | None:
    if x_mask is not None or y_mask is not None or not (x.is_contiguous() and y.is_contiguous()):
        return None
    if (x.data_ptr() | y.data_ptr()) % 16:
        return None
    return _plan(
        x.shape, y.shape, x.dtype, dtype, x.device, _device.processors(x)[1],
        alpha.dtype if isinstance(alpha, Tensor) else None,
        None if grad is None else (*grad.stride(), grad.dtype), sizes.LARGEST_LIGHT,
    )  # fmt: skip


@functools.lru_cache(_triton.LAYOUTS)
def _plan(
    x: torch.Size,
    y: torch.Size,
    dtype: torch.dtype,
    out: torch.dtype,
    device: torch.device,
    arch: int,
    alpha_on_device: torch.dtype | None,
    grad: tuple[int, int, torch.dtype] | None,
    largest: int,
) -> Plan | None:
    (N, K, D), (M, L, _) = x, y
    if not serves(N, K, M, L, D, dtype, arch, backward=grad is not None) or largest < N * K * M * L:
        return None
    config = config_of(N * K, M * L, K, L, backward=grad is not None)
    rows, columns, block_d = config["ROWS"], config["COLUMNS"], config["BLOCK_D"]
    down, across = _triton.cdiv(N * K, rows), _triton.cdiv(M * L, columns)
    constants: dict[str, Any] = {
        "K": K,
        "L": L,
        "ALPHA_ON_DEVICE": alpha_on_device is not None,
        "LARGEST_EXPONENT": sizes.largest_exponent(D),
    }
    numbers: tuple[int, ...] = (N, M, D, across)
    if grad is None:
        kernel, constants = kernels.light_forward_kernel, constants | {"LIMIT": torch.finfo(out).max}
    else:
        kernel, numbers = kernels.light_weights_kernel, (*numbers, *grad[:2])
    return Plan(
        _triton.Launch(kernel, down * across, numbers, **constants, **config),
        ((N * K, D), (rows, block_d)),
        ((M * L, D), (columns, block_d)),
        ((N * K, M * L), (rows, columns)),
    )


def serves(N: int, K: int, M: int, L: int, D: int, dtype: torch.dtype, arch: int, *, backward: bool) -> bool:
    """Whether the kernels take such sets: tiles of whole ones, by a bulk copy engine, which wants 16 bytes a step."""
    whole = all(0 < v <= MAX_VECTORS and v & (v - 1) == 0 for v in (K, L))
    steps = D > 0 and D % 8 == 0 and (M * L % 8 == 0 or not backward)
    return whole and steps and 90 <= arch < 100 and dtype in TYPES[backward] and min(N, M) > 0


def config_of(rows: int, columns: int, K: int, L: int, *, backward: bool) -> dict[str, Any]:
    """Tile sizes and options of a launch, for so many vectors in all: what compiles without a spill."""
    across = 128 if _triton.cdiv(rows, 64) * _triton.cdiv(columns, 128) >= LEAST_TILES else 64
    warps = 8 if across == 128 and (backward or min(K, L) < 4) else 4
    sizes = {"ROWS": 64, "COLUMNS": across, "BLOCK_D": 64, "num_warps": warps, "num_stages": 4}
    return sizes | {"enable_fp_fusion": True, "maxnreg": 255}


# --- ahead of time


def configs(K: int, L: int, D: int, dtype: torch.dtype, arch: int) -> Iterator[_triton.Build]:
    """The kernels that serve such sets, in both sizes of tiles."""
    name = _triton.NAMES[dtype]
    for few in (False, True):
        n, m = (64, 64) if few else (4096, 4096)
        for is_backward, kernel in enumerate((kernels.light_forward_kernel, kernels.light_weights_kernel)):
            if not serves(n, K, m, L, D, dtype, arch, backward=bool(is_backward)):
                continue
            config = config_of(1 if few else n * K, 1 if few else m * L, K, L, backward=bool(is_backward))
            constants: dict[str, Any] = {"K": K, "L": L, "ALPHA_ON_DEVICE": False}
            constants |= {"LARGEST_EXPONENT": sizes.largest_exponent(D), "LIMIT": torch.finfo(dtype).max}
            constants |= {"stride_m": 1}
            blocks = {"x": ("ROWS", "BLOCK_D"), "y": ("COLUMNS", "BLOCK_D"), "weights": ("ROWS", "COLUMNS")}
            types = {
                key: f"tensordesc<{name}[{config[down]},{config[across]}]>" for key, (down, across) in blocks.items()
            }
            types |= {"out": f"*{name}", "grad": f"*{name}", "alpha": "fp32"}
            yield _triton.build(kernel, types, constants, config, {"features", "M"}, True)
