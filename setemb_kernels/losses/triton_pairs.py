"""Listed pairs of small padded sets under smooth-Chamfer on a GPU, in Triton; what `pairs` does, without copies of the
sets, and nothing that waits for the device. `triton_kernels` has the kernels.

    similarities     pair_kernel             vectors of each pair -> its similarity
    add_gradients    pair_kernel             vectors of each pair, upstream gradient -> W = g ds/dc; entropies
                     pair_gradient_kernel    W, y -> what is added to dX, once for each set of x that has pairs;
                                             and once more with the sides swapped
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from setemb_kernels import _device, _triton
from setemb_kernels.losses import triton_kernels as kernels
from setemb_kernels.losses.tiles import Gradients, Sets

MOST_VECTORS = 16
"""Of a set, here."""

WEIGHTS = 1 << 24
"""Of pairs at a time, in the backward: 64 MiB."""


def serves(sets: Sets) -> bool:
    """Whether these kernels take sets of such a kind and size."""
    vectors = sets.x.shape[1], sets.y.shape[1]
    return sets.kind == "smooth_chamfer" and min(vectors) > 0 and max(vectors) <= MOST_VECTORS


def similarities(sets: Sets, rows: Tensor, columns: Tensor) -> Tensor:
    """As `pairs.similarities`."""
    out = sets.x.new_empty(len(rows), dtype=torch.float32)
    _launch(sets, rows, columns, None, out, None)
    return out


def add_gradients(gradients: Gradients, rows: Tensor, columns: Tensor, by_similarity: Tensor) -> None:
    """As `pairs.add_gradients`; pairs whose gradient is 0 are not read."""
    sets, (need_x, need_y, need_alpha, _) = gradients.sets, gradients.needs
    slots = _slots(sets)
    step = WEIGHTS // math.prod(slots)
    for start in range(0, len(rows), step):
        n, m, g = (v[start : start + step].contiguous() for v in (rows, columns, by_similarity))
        w = sets.x.new_empty(len(n), *slots, dtype=torch.float32)
        entropies = w.new_empty(len(n)) if need_alpha else None
        _launch(sets, n, m, g, w, entropies)
        if need_x:
            _add(gradients.x, n, w, g, sets.y, sets.y_mask, m)
        if need_y:
            _add(gradients.y, m, w.transpose(1, 2), g, sets.x, sets.x_mask, n)
        if entropies is not None:
            total = (entropies.double() * g.double()).sum()
            gradients.alpha -= total / sets.alpha.to(total.device, torch.float64).square()


def _launch(
    sets: Sets, rows: Tensor, columns: Tensor, grad: Tensor | None, out: Tensor, entropies: Tensor | None
) -> None:
    if not len(rows):
        return
    (_, K, D), (_, L, _) = sets.x.shape, sets.y.shape
    on_host = sets.alpha.device.type == "cpu"
    config = _pair_config(K, L, sets.x.dtype)
    with torch.cuda.device_of(sets.x):
        _triton.launch(
            kernels.pair_kernel, _triton.cdiv(len(rows), config["PAIRS"]),
            (
                sets.x, sets.y, sets.x_mask, sets.y_mask, rows, columns, grad, out, entropies,
                min(float(sets.alpha), torch.finfo(torch.float32).max) if on_host else sets.alpha,
                len(rows), K, L, D, *sets.x.stride(), *sets.y.stride(),
                *_triton.strides(sets.x_mask, 2), *_triton.strides(sets.y_mask, 2),
            ),
            X_MASKED=sets.x_mask is not None, Y_MASKED=sets.y_mask is not None, PRECISION=_device.precision(),
            ALPHA_ON_DEVICE=not on_host, BACKWARD=grad is not None, NEED_ALPHA=entropies is not None, **config,
        )  # fmt: skip


def _add(
    target: Tensor, own: Tensor, w: Tensor, grad: Tensor, other: Tensor, other_mask: Tensor | None, partner: Tensor
) -> None:
    """Add to ``target [N, K, D]`` at `own` what pairs with `partner` give; ``w [P, own slots, other slots]``."""
    (count, K, D), L = target.shape, other.shape[1]
    ordered, order = torch.sort(own, stable=True)
    offsets = torch.searchsorted(ordered, torch.arange(count + 1, device=own.device))
    config = _gradient_config(K, L, D)
    with torch.cuda.device_of(target):
        _triton.launch(
            kernels.pair_gradient_kernel, (count, _triton.cdiv(D, config["BLOCK_D"])),
            (
                w, grad, other, other_mask, partner, order, offsets, target, K, L, D, *w.stride()[1:],
                *other.stride(), *_triton.strides(other_mask, 2), *target.stride(),
            ),
            MASKED=other_mask is not None, **config,
        )  # fmt: skip


def _slots(sets: Sets) -> tuple[int, int]:
    """What a set is padded to on either side."""
    return _triton.next_power_of_two(sets.x.shape[1]), _triton.next_power_of_two(sets.y.shape[1])


def _pair_config(K: int, L: int, dtype: torch.dtype) -> dict[str, Any]:
    """As many pairs to a program as fill a product of 16 x 16 rows."""
    slots_x, slots_y = _triton.next_power_of_two(K), _triton.next_power_of_two(L)
    pairs = 16 // min(slots_x, slots_y)
    scores = pairs * slots_x * pairs * slots_y  # 256 to 4096
    block_d = 128 if scores <= 1024 else 32
    if dtype == torch.float32:  # whose products hold both operands in registers
        block_d = 32 if scores <= 1024 else 16
    return {
        "X_SLOTS": slots_x,
        "Y_SLOTS": slots_y,
        "PAIRS": pairs,
        "BLOCK_D": block_d,
        "num_warps": max(2, scores // 512),
        "num_stages": 3,
        "maxnreg": 255,  # left alone, the compiler may spill to make room for a second program
    }


def _gradient_config(K: int, L: int, D: int) -> dict[str, Any]:
    """16 vectors of the other side at a time, and as many features as registers hold sums of."""
    own, other = _triton.next_power_of_two(K), _triton.next_power_of_two(L)
    block_d = min(_triton.next_power_of_two(D), 1024, 2048 // own)
    return {"OWN": own, "OTHER": other, "PAIRS": 16 // other, "BLOCK_D": block_d, "num_warps": 4}


# --- ahead of time


def configs(K: int, L: int, D: int, dtype: torch.dtype, masked: bool) -> Iterator[_triton.Build]:
    """Every kernel that a loss launches for listed pairs of such sets; with masks, for an alpha on the device
    and its gradient."""
    nothing = {} if masked else {"x_mask": None, "y_mask": None, "other_mask": None}
    strides = {"x_stride_d": 1, "y_stride_d": 1, "stride_d": 1, "target_stride_d": 1}
    for backward in (False, True):
        constants = {**nothing, **strides, "X_MASKED": masked, "Y_MASKED": masked, "PRECISION": "ieee"}
        constants |= {"ALPHA_ON_DEVICE": masked, "BACKWARD": backward, "NEED_ALPHA": masked and backward}
        constants |= {} if backward else {"grad": None}
        constants |= {} if masked and backward else {"entropies": None}
        yield _build(kernels.pair_kernel, dtype, constants, _pair_config(K, L, dtype))
    constants = {**nothing, **strides, "MASKED": masked, "w_stride_other": 1}
    yield _build(kernels.pair_gradient_kernel, dtype, constants, _gradient_config(K, L, D))


def _build(kernel: Any, dtype: torch.dtype, constants: dict[str, Any], launch: dict[str, Any]) -> _triton.Build:
    types = dict.fromkeys(("x", "y", "other"), f"*{_triton.NAMES[dtype]}")
    types |= dict.fromkeys(("grad", "out", "entropies", "w", "target"), "*fp32")
    types |= dict.fromkeys(("x_mask", "y_mask", "other_mask"), "*i1")
    types["alpha"] = "*fp32" if constants.get("ALPHA_ON_DEVICE") else "fp32"
    types |= dict.fromkeys(("rows", "columns", "partner", "order", "offsets"), "*i64")
    aligned = ("D", "stride_n", "stride_k", *(f"{v}_stride_{axis}" for v in ("x", "y", "target") for axis in "nk"))
    on_tensor_cores = kernel is kernels.pair_kernel and dtype != torch.float32
    return _triton.build(kernel, types, constants, launch, aligned, on_tensor_cores)
