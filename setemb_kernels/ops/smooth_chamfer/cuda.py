"""Smooth-Chamfer on a GPU, in CUDA C++: the host side. ``csrc/cuda/smooth_chamfer.h`` says what the kernels do and how
a packed operand lies in memory, `reference` has the maths.

    pack, forward, hardest, weights, unpack    our kernels, registered with torch by the compiled module
    torch.addmm                                dX += W Y, dY += W^T X, accumulated in float32

**Why the two plain products are torch's.** They are two of the backward's three, and cuBLAS makes them with the fastest
tensor-core instructions that a chip has (wgmma on sm_90, which our kernels do not use); float32 follows torch's
settings by itself. They are called from here rather than from C++, so that the tests run this very code without a GPU.
What a kernel of ours could save is the way of W through the level-2 cache.

**Range.** Sets whose vectors are so long that a dot product could overflow are packed times a power of two. A warp
looks at the longest vectors of its two groups of sets: where Cauchy-Schwarz bounds |alpha c|, ``exp(alpha c)`` needs no
shift and one exponential serves both directions; else scores are shifted by the maximum of each row and each column.

No call waits for the device; memory is torch's; all sizes come from shapes. So a CUDA graph can hold it.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from setemb_kernels import _cuda, _device

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_VECTORS = 64
SLOTS = (1, 2, 4, 8, 16, 64)
"""To which K and L are padded, each."""

WORKSPACE_BYTES = 512 << 20
"""What the backward pass allocates at most for chunks of W and their products; see `_device.workspace_bytes`."""

CHUNK_COLUMNS = 16384
"""Columns of a chunk of W."""

_GROUP, _TILE, _STEP_BYTES, _WEIGHT_EXPONENT = 64, 128, 64, 15  # csrc/cuda/smooth_chamfer.h


def refusal(x: Tensor, y: Tensor) -> str:
    """Why these kernels cannot serve sets like x and y; empty when they can."""
    if x.dtype not in DTYPES:
        return f"x: expected float32, bfloat16 or float16, got {str(x.dtype)[6:]}"
    if max(x.shape[1], y.shape[1]) > MAX_VECTORS:
        return f"x, y: expected sets of at most {MAX_VECTORS} vectors, got {x.shape[1]} and {y.shape[1]}"
    return ""


def forward(
    x: Tensor, y: Tensor, alpha: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, wide: bool = False
) -> Tensor:
    """The similarity ``[N, M]``, in the dtype of x or, if `wide`, in float32. See `op.smooth_chamfer`."""
    (N, K), (M, L) = x.shape[:2], y.shape[:2]
    dtype = torch.float32 if wide else x.dtype
    if 0 in (N, M, K, L):
        return x.new_zeros(N, M, dtype=dtype)
    out = x.new_empty(N, M, dtype=dtype)
    if _slots(K) >= _slots(L):
        call, pairs = _Call(x, y, alpha, x_mask, y_mask), out
    else:  # s(X, Y) = s(Y, X)
        call, pairs = _Call(y, x, alpha, y_mask, x_mask), out.T
    _cuda.kernels().smooth_chamfer_forward(*call.operands(), pairs, *call.alpha, *call.slots(), call.arithmetic, wide)
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

    That of alpha is on the device of x. Memory beyond inputs and outputs: packed copies of x and y, `WORKSPACE_BYTES`,
    and, if both x and y need a gradient, one of the two (the smaller) in float32.
    """
    (N, K), (M, L) = x.shape[:2], y.shape[:2]
    if _slots(K) < _slots(L):
        grad_y, grad_x, grad_alpha = backward(grad.T, y, x, alpha, y_mask, x_mask, need_y, need_x, need_alpha)
        return grad_x, grad_y, grad_alpha
    allocate = x.new_zeros if 0 in (N, M, K, L) else x.new_empty
    grad_x = allocate(x.shape if need_x else 0)
    grad_y = allocate(y.shape if need_y else 0)
    grad_alpha = torch.zeros((), dtype=alpha.dtype, device=x.device) if need_alpha else x.new_empty(0)
    if 0 in (N, M, K, L) or not (need_x or need_y or need_alpha):
        return grad_x, grad_y, grad_alpha
    call = _Call(x, y, alpha, x_mask, y_mask)
    exponents = _exponents(grad, call)
    alpha_parts = x.new_empty(call.x.groups, call.y.groups, dtype=torch.float32) if need_alpha else None
    if need_x or need_y:
        _add_chunks(grad, call, exponents, alpha_parts, grad_x if need_x else None, grad_y if need_y else None)
    else:
        call.weights(grad, exponents, None, alpha_parts, slice(0, call.x.groups), slice(0, call.y.groups))
    if alpha_parts is not None:
        grad_alpha = _alpha_gradient(alpha_parts, exponents, alpha)
    return grad_x, grad_y, grad_alpha


class Hardest(NamedTuple):
    """The most similar negatives of the sets of one side."""

    value: Tensor
    """float32: how similar; -inf where there is none."""
    who: Tensor
    """int64: which set of the other side, the lowest of equals; -1 where there is none."""


def hardest(
    x: Tensor,
    y: Tensor,
    alpha: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    x_group: Tensor | None = None,
    y_group: Tensor | None = None,
) -> tuple[Hardest, Hardest]:
    """For each set of x and each set of y its most similar negative; no similarity is stored.

    Negatives are pairs of different ``x_group [N]`` and ``y_group [M]`` (integers; where None, of different index).
    Similarities are compared in float32; one that is NaN takes no part.
    """
    (N, K), (M, L) = x.shape[:2], y.shape[:2]
    best_x, best_y = (torch.zeros(n, dtype=torch.int64, device=x.device) for n in (N, M))
    if 0 not in (N, M, K, L):
        x_side, y_side = (x, x_mask, x_group, best_x), (y, y_mask, y_group, best_y)
        if _slots(K) < _slots(L):
            x_side, y_side = y_side, x_side
        call = _Call(x_side[0], y_side[0], alpha, x_side[1], y_side[1], least_slots=2)
        ids = (None if group is None else group.long().contiguous() for group in (x_side[2], y_side[2]))
        _cuda.kernels().smooth_chamfer_hardest(
            *call.operands(), *ids, x_side[3], y_side[3], *call.alpha, *call.slots(), call.arithmetic
        )
    return _winners(best_x), _winners(best_y)


def _winners(keys: Tensor) -> Hardest:
    """From keys: in the upper half of their bits similarities as ordered integers, in the lower ~index."""
    upper, lower = keys >> 32 & 0xFFFFFFFF, keys & 0xFFFFFFFF
    bits = torch.where(upper >= 1 << 31, upper - (1 << 31), -1 - upper)
    value = bits.to(torch.int32).view(torch.float32)
    return Hardest(value.masked_fill(keys == 0, -math.inf), (0xFFFFFFFF - lower).masked_fill(keys == 0, -1))


class _Packed(NamedTuple):
    """One packed operand."""

    rows: Tensor  # [groups * 64, features]
    valid: Tensor  # [groups, 2] int32
    stats: Tensor  # [2 * sets + groups]: weights, exponents, longest vectors
    mask: Tensor | None
    slots: int
    groups: int
    largest_exponent: Tensor  # []

    def unpack(self, sums: Tensor, exponents: Tensor, out: Tensor, first_row: int, dtype_code: int) -> None:
        """Write sums, from a row of a first set on, to the gradient of all sets."""
        first = first_row // self.slots
        last = min(out.shape[0], first + len(sums) // self.slots)
        if first < last and out.shape[2]:
            _cuda.kernels().smooth_chamfer_unpack(
                sums, self.mask, self.stats, exponents, out, self.groups, first, last, self.slots, dtype_code
            )


class _Call:
    """What the launches of one call share: packed operands, alpha. x has at least as many slots as y."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        alpha: Tensor,
        x_mask: Tensor | None,
        y_mask: Tensor | None,
        least_slots: int = 1,  # of x
    ) -> None:
        self.arithmetic = _cuda.arithmetic(x.dtype)
        self.x = _pack(x, x_mask, max(_slots(x.shape[1]), least_slots), self.arithmetic)
        self.y = _pack(y, y_mask, _slots(y.shape[1]), self.arithmetic)
        self.alpha: tuple[float, Tensor | None] = (float(alpha), None) if _on_host(alpha) else (0.0, alpha.float())

    def operands(self) -> tuple[Tensor, ...]:
        return *self.x[:3], *self.y[:3]

    def slots(self) -> tuple[int, int]:
        return self.x.slots, self.y.slots

    def weights(
        self, grad: Tensor, exponents: Tensor, chunk: Tensor | None, alpha_parts: Tensor | None, x: slice, y: slice
    ) -> None:
        """A chunk of W, of groups x and y."""
        _cuda.kernels().smooth_chamfer_weights(
            *self.operands(), grad, exponents, chunk, alpha_parts, *self.alpha, *self.slots(),
            x.start, y.start, x.stop - x.start, y.stop - y.start, self.arithmetic, grad.dtype != self.x.rows.dtype,
        )  # fmt: skip


def _slots(vectors: int) -> int:
    return next(slots for slots in SLOTS if slots >= vectors)


def _on_host(alpha: Tensor) -> bool:
    """Whether alpha can be read without waiting for a device."""
    return alpha.device.type == "cpu"


def _up(n: int, step: int) -> int:
    return (n + step - 1) // step * step


def _pack(v: Tensor, mask: Tensor | None, slots: int, code: int) -> _Packed:
    N, _, D = v.shape
    rows = _up(N * slots, _TILE)
    groups, sets = rows // _GROUP, rows // slots
    packed = v.new_empty(rows, _up(max(D, 1), _STEP_BYTES // v.element_size()))
    valid = v.new_empty(groups, 2, dtype=torch.int32)
    stats = v.new_empty(2 * sets + groups, dtype=torch.float32)
    _cuda.kernels().smooth_chamfer_pack(v, mask, packed, valid, stats, slots, code)
    return _Packed(packed, valid, stats, mask, slots, groups, stats[sets : 2 * sets].amax())


def _add_chunks(
    grad: Tensor,
    call: _Call,
    exponents: Tensor,
    alpha_parts: Tensor | None,
    grad_x: Tensor | None,
    grad_y: Tensor | None,
) -> None:
    """W by chunks, each used for both products. The larger side is gone through once: its sums are those of a chunk."""
    x_first = call.x.rows.shape[0] >= call.y.rows.shape[0]
    outer, inner = (call.x, call.y) if x_first else (call.y, call.x)
    outer_grad, inner_grad = (grad_x, grad_y) if x_first else (grad_y, grad_x)
    features = outer.rows.shape[1]
    width = min(len(inner.rows), CHUNK_COLUMNS)
    height = (
        _device.workspace_bytes(WORKSPACE_BYTES, outer.rows.device)
        // 2
        // max(width * outer.rows.element_size(), features * 4)
    )
    height = min(len(outer.rows), max(_TILE, height // _TILE * _TILE))
    chunk = outer.rows.new_empty(height * width)
    outer_sum = chunk.new_empty(height if outer_grad is not None else 0, features, dtype=torch.float32)
    inner_sum = chunk.new_empty(len(inner.rows) if inner_grad is not None else 0, features, dtype=torch.float32)
    for top in range(0, len(outer.rows), height):
        outer_rows = outer.rows[top : top + height]
        for left in range(0, len(inner.rows), width):
            inner_rows = inner.rows[left : left + width]
            outer_groups = slice(top // _GROUP, (top + len(outer_rows)) // _GROUP)
            inner_groups = slice(left // _GROUP, (left + len(inner_rows)) // _GROUP)
            x_groups, y_groups = (outer_groups, inner_groups) if x_first else (inner_groups, outer_groups)
            shape = (len(outer_rows), len(inner_rows)) if x_first else (len(inner_rows), len(outer_rows))
            w = chunk[: shape[0] * shape[1]].view(shape)
            call.weights(grad, exponents, w, alpha_parts, x_groups, y_groups)
            w = w if x_first else w.T
            if outer_grad is not None:
                _add_product(outer_sum[: len(outer_rows)], w, inner_rows, first=left == 0)
            if inner_grad is not None:
                _add_product(inner_sum[left : left + width], w.T, outer_rows, first=top == 0)
        if outer_grad is not None:
            outer.unpack(outer_sum[: len(outer_rows)], exponents, outer_grad, top, call.arithmetic)
    if inner_grad is not None:
        inner.unpack(inner_sum, exponents, inner_grad, 0, call.arithmetic)


def _add_product(total: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """``total += a @ b``, or ``=`` the first time, in float32."""
    beta = 0 if first else 1
    if a.dtype == torch.float32 or a.device.type == "cpu":
        total.addmm_(a.float(), b.float(), beta=beta)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, beta=beta, out=total)


def _exponents(grad: Tensor, call: _Call) -> Tensor:
    """``[2]`` int32: e of ``max |grad| < 2^e``, 0 if that is not finite; and its sum with the exponents of x and y."""
    largest = torch.linalg.vector_norm(grad, ord=math.inf, dtype=torch.float32)
    exponent = torch.where(largest.isfinite(), torch.frexp(largest).exponent, 0)
    both = (call.x.largest_exponent + call.y.largest_exponent).to(torch.int32)
    return torch.stack([exponent, exponent + both]).to(torch.int32)


def _alpha_gradient(parts: Tensor, exponents: Tensor, alpha: Tensor) -> Tensor:
    """From sums of entropy (in bits) times gradient (divided by a power of two); on the device of parts."""
    sharpness: Any = float(alpha) if _on_host(alpha) else alpha.double()
    total = parts.sum(dtype=torch.float64) * exponents[0].double().exp2() * -math.log(2)
    gradient: Tensor = total / sharpness / sharpness
    return gradient.to(alpha.dtype)
