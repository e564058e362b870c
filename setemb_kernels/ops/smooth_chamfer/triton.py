"""Smooth-Chamfer on a GPU, in Triton: the host side. `triton_kernels` and `triton_packing` have the kernels,
`triton_config` tile sizes, `triton_plan` the launches, `triton_light` a shorter way for few scores, `reference` the
maths.

    pack_kernel      x, y -> packed operands ``[rows, features]`` in tile order, masked vectors zero, features padded;
                     and per set: weight 1 / (2 |X|), longest vector, exponent; their maxima, and that of the gradient
    forward_kernel   packed operands -> similarity ``[N, M]``
    weights_kernel   packed operands, upstream gradient -> a chunk of W = g ds/dc, and partial sums for d/dalpha
    torch.addmm      dX += W Y, dY += W^T X, accumulated in float32
    unpack_kernel    float32 accumulators in tile order -> gradients in the layout and dtype of the inputs

**Tile.** A program computes scores ``c [ROWS, COLUMNS]`` of whole sets, K and L padded to powers of two. The order
of rows and columns decides what the sums over slots cost. A tensor core (sm_80, sm_90) leaves rows r and r + 8 of
every 16, and many columns, to one thread. So rows are slot-major within blocks of 16 (16 / K sets to a block) and
columns slot-major within parts of a tile: the sum over l stays in a thread, and that over k takes one addition
there and one shuffle, K = 4.

**Why a packed copy.** It reads and writes each operand once: 4 (N K + M L) D bytes in 16 bits, against 2 N K M L D
flops; at N = M = 8192, K = L = 4, D = 1024 that is 0.06 ms at 4.3 TB/s against 2.8 ms of products at 790 TFLOP/s (2 %).
For it the main loop has no predicates, gathers or masks, takes any strides and any D, and is fed by the bulk
copy engine. (These are counts, not timings.)

**Why the backward stores chunks of W.** With R = N K rows, C = M L columns, P = 2 R C D flops for one product:

  (a) dX and dY each by a kernel that recomputes its scores: 4 P. But the accumulator ``[128, D]`` of one block of
      rows is 512 KiB at D = 1024, twice the registers of a multiprocessor; D is split in four, each recomputes the
      scores: 10 P.
  (b) W by chunks in a workspace, each used twice: 3 P, and 6 R C bytes in 16 bits, mostly in the L2 cache for a
      chunk of 32 MiB. At the sizes above 3 P = 8.4 ms; the 6 GB take 1.5 ms from memory, less from the cache,
      beside the products. Sums over chunks cost 8 D (4096 + 4096) bytes a chunk, another 4 GB. The plain products
      are those of cuBLAS.

By this count (b) wins for D > 128; below, both are bound by the exponentials, of which (a) has twice as many.
Hence (b).

**Float32** takes no tensor cores, unless torch may use tf32 for a plain product. Its scores are that product, a chunk
of them at a time in the workspace; the same kernels read them, and W takes their place.

**Range.** Sets whose vectors are so long that a dot product could overflow are packed times a power of two. Each
kernel is launched in two variants, and reads on the device which one serves: where Cauchy-Schwarz bounds |alpha c|
for all pairs, ``exp(alpha c)`` needs no shift and one exp serves both directions; else scores are shifted by the
maximum of each row and of each column. The other variant ends at once. A set that holds NaN or infinity has weight
NaN: its pairs become NaN, no others do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from setemb_kernels import _device
from setemb_kernels.ops.smooth_chamfer import triton_light
from setemb_kernels.ops.smooth_chamfer import triton_packing as packing
from setemb_kernels.ops.smooth_chamfer.triton_config import configs
from setemb_kernels.ops.smooth_chamfer.triton_plan import Operands, Plan, plan_of

__all__ = ["add_chunks", "as_argument", "backward", "configs", "forward"]

WORKSPACE_BYTES = 512 << 20
"""What a call allocates at most for chunks of scores or W and their products; see `_device.workspace_bytes`."""

CHUNK_COLUMNS = 16384
"""Columns of a chunk, or more where all rows take less than the workspace: with 8192 rows, 256 MiB in 16 bits. Measured
on an H100, N = M = 8192, K = L = 4: chunks of W of 4096 x 4096, which stay in the cache, took 1.3 x (D = 1024) to 3.4 x
the time (D = 128), for their many launches."""


def forward(
    x: Tensor, y: Tensor, alpha: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, wide: bool = False
) -> Tensor:
    """The similarity ``[N, M]``, in the dtype of x or, if `wide`, in float32. See `op.smooth_chamfer`."""
    (N, K), (M, L) = x.shape[:2], y.shape[:2]
    dtype = torch.float32 if wide else x.dtype
    if 0 in (N, M, K, L):
        return x.new_zeros(N, M, dtype=dtype)
    with torch.cuda.device_of(x):
        sharpness = as_argument(alpha)
        light = triton_light.forward(x, y, sharpness, x_mask, y_mask, dtype)
        if light is not None:
            return light
        plan = plan_of(x, y, x_mask, y_mask, sharpness, out=dtype)
        operands = plan.pack(x, y, x_mask, y_mask)
        out = x.new_empty(N, M, dtype=dtype)
        height, width = plan.x.height, plan.y.height
        if not plan.stored:
            plan.forward(operands, None, out, sharpness, slice(0, height), slice(0, width))
            return out
        down, across = _chunk_shape(plan, _device.workspace_bytes(WORKSPACE_BYTES, x.device))
        chunk = operands.x.new_empty(down * across)
        for top in range(0, height, down):
            for left in range(0, width, across):
                rows, columns = slice(top, min(top + down, height)), slice(left, min(left + across, width))
                scores = _stored_scores(operands, chunk, rows, columns)
                plan.forward(operands, scores, out, sharpness, rows, columns)
    return out


def backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    alpha: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    need_x: bool,
    need_y: bool,
    need_alpha: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients for x, y and alpha from the upstream ``grad [N, M]``; one that is not needed comes back empty ``[0]``.

    That of alpha is on the device of x. Memory beyond inputs and outputs: packed copies of x and y, at most
    `WORKSPACE_BYTES`, and, if both x and y need a gradient, one of the two (the smaller) in float32.
    """
    (N, K), (M, L) = x.shape[:2], y.shape[:2]
    if not need_alpha and (need_x or need_y):
        with torch.cuda.device_of(x):
            light = triton_light.backward(grad, x, y, as_argument(alpha), x_mask, y_mask, need_x, need_y)
        if light is not None:
            return *light, x.new_empty(0)
    if need_y and (not need_x or M * L > N * K):  # s(X, Y) = s(Y, X), and the side of x needs the smaller accumulator
        grad_y, grad_x, grad_alpha = backward(grad.T, y, x, alpha, y_mask, x_mask, need_y, need_x, need_alpha)
        return grad_x, grad_y, grad_alpha
    allocate = x.new_zeros if 0 in (N, M, K, L) else x.new_empty
    grad_x = allocate(x.shape if need_x else 0)
    grad_y = allocate(y.shape if need_y else 0)
    grad_alpha = torch.zeros((), dtype=alpha.dtype, device=x.device) if need_alpha else x.new_empty(0)
    if 0 in (N, M, K, L) or not (need_x or need_y or need_alpha):
        return grad_x, grad_y, grad_alpha
    with torch.cuda.device_of(x):
        sharpness = as_argument(alpha)
        need_chunk = need_x or need_y
        plan = plan_of(
            x, y, x_mask, y_mask, sharpness, grad=grad, need_alpha=need_alpha, need_chunk=need_chunk
        )  # fmt: skip
        operands = plan.pack(x, y, x_mask, y_mask, grad)
        parts = None
        if need_alpha:
            shape = plan.x.height // plan.rows, plan.y.height // plan.part
            parts = grad.new_empty(shape, dtype=torch.float32)
        if need_chunk or plan.stored:

            def make(scores: Tensor | None, chunk: Tensor | None, rows: slice, columns: slice) -> None:
                plan.weights(operands, scores, grad, chunk, parts, sharpness, rows, columns)

            gradients = grad_x if need_x else None, grad_y if need_y else None
            add_chunks(make, plan, operands, (x_mask, y_mask), *gradients)
        else:
            every = slice(0, plan.x.height), slice(0, plan.y.height)
            plan.weights(operands, None, grad, None, parts, sharpness, *every)
        if parts is not None:
            grad_alpha = _alpha_gradient(parts, operands.stats[packing.GRADIENT.value], alpha)
    return grad_x, grad_y, grad_alpha


def add_chunks(
    make: Callable[[Tensor | None, Tensor | None, slice, slice], None],
    plan: Plan,
    operands: Operands,
    masks: tuple[Tensor | None, Tensor | None],
    grad_x: Tensor | None,
    grad_y: Tensor | None,
) -> None:
    """W by chunks, each used for both products. Gradients of x are complete with each band of rows.

    Args:
        make: of scores, unless None, or operands writes W to a chunk, unless None, for rows and columns.
    """
    height, width = plan.x.height, plan.y.height
    room = _device.workspace_bytes(WORKSPACE_BYTES, operands.x.device) // 2
    down, across = _chunk_shape(plan, room, plan.features * 4)
    chunk = operands.x.new_empty(down * across)
    x_sum = None if grad_x is None else chunk.new_empty(down, plan.features, dtype=torch.float32)
    y_sum = None if grad_y is None else chunk.new_empty(width, plan.features, dtype=torch.float32)
    for top in range(0, height, down):
        bottom = min(top + down, height)
        rows = slice(top, bottom)
        for left in range(0, width, across):
            columns = slice(left, min(left + across, width))
            if plan.stored:
                w = scores = _stored_scores(operands, chunk, rows, columns)
            else:
                w, scores = _view(chunk, rows, columns), None
            make(scores, None if grad_x is None and grad_y is None else w, rows, columns)
            if x_sum is not None:
                _add_product(x_sum[: bottom - top], w, operands.y[columns], first=left == 0)
            if y_sum is not None:
                _add_product(y_sum[columns], w.T, operands.x[rows], first=top == 0)
        y_sum_done = y_sum if bottom == height else None
        first, last = top // plan.x.slots, bottom // plan.x.slots
        plan.unpack(operands, x_sum, y_sum_done, *masks, grad_x, grad_y, first, last)


def _chunk_shape(plan: Plan, room: int, least_bytes: int = 0) -> tuple[int, int]:
    """Rows and columns of a chunk in the plan's dtype, in so many bytes; `least_bytes` for each row."""
    size = plan.dtype.itemsize
    rows = room // max(min(plan.y.height, CHUNK_COLUMNS) * size, least_bytes)
    rows = min(plan.x.height, max(plan.rows, rows // plan.rows * plan.rows))
    columns = max(CHUNK_COLUMNS, room // (rows * size))
    return rows, min(plan.y.height, max(plan.columns, columns // plan.columns * plan.columns))


def _view(chunk: Tensor, rows: slice, columns: slice) -> Tensor:
    """A chunk's memory, of so many rows and columns."""
    shape = rows.stop - rows.start, columns.stop - columns.start
    return chunk[: math.prod(shape)].view(shape)


def _stored_scores(operands: Operands, chunk: Tensor, rows: slice, columns: slice) -> Tensor:
    """Scores of rows and columns, by a plain product."""
    return torch.mm(operands.x[rows], operands.y[columns].T, out=_view(chunk, rows, columns))


def as_argument(alpha: Tensor) -> float | Tensor:
    """As the kernels take it: a number, or where it can't be read without waiting for a device, a tensor."""
    return min(float(alpha), torch.finfo(torch.float32).max) if _on_host(alpha) else alpha


def _on_host(alpha: Tensor) -> bool:
    return alpha.device.type == "cpu"


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``total += a @ b``, or ``=`` the first time, in float32."""
    beta = 0 if first else 1
    if a.dtype == torch.float32 or a.device.type == "cpu":
        total.addmm_(a.float(), b.float(), beta=beta)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, out=total)


def _alpha_gradient(parts: Tensor, largest: Tensor, alpha: Tensor) -> Tensor:
    """From sums of entropy (in bits) times gradient (divided by a power of two above the largest); on the device of
    parts."""
    sharpness: Any = float(alpha) if _on_host(alpha) else alpha.double()
    bits = largest.view(torch.int32) >> 23  # as `triton_packing.gradient_exponent`
    exponent = torch.where(bits < 255, bits - 126, 0)
    total = parts.sum(dtype=torch.float64) * exponent.double().exp2() * -math.log(2)
    gradient: Tensor = total / sharpness / sharpness
    return gradient.to(alpha.dtype)
