"""Smooth-Chamfer on a GPU, in Triton: the host side. `triton_kernels` has the kernels, `reference` the maths.

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

**Range.** Sets whose vectors are so long that a dot product could overflow are packed times a power of two. Each
kernel is launched in two variants, and reads on the device which one serves: where Cauchy-Schwarz bounds |alpha c|
for all pairs, ``exp(alpha c)`` needs no shift and one exp serves both directions; else scores are shifted by the
maximum of each row and of each column. The other variant ends at once. A set that holds NaN or infinity has weight
NaN: its pairs become NaN, no others do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from setemb_kernels import _device, _triton
from setemb_kernels.ops.smooth_chamfer import triton_kernels as kernels
from setemb_kernels.ops.smooth_chamfer import triton_packing as packing

# --- tile sizes


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

    @functools.cache  # noqa: B019 -- there are few
    def launch(self) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        names = {"rows": "ROWS", "columns": "COLUMNS", "part": "PART", "block_d": "BLOCK_D", "tiles": "TILES"}
        names |= {"flatten": "FLATTEN", "bulk": "BULK"}
        return {names.get(name, name): value for name, value in self._asdict().items()} | {
            "enable_fp_fusion": True,
            "maxnreg": 255,  # left alone, the compiler may spill to make room for a second program
        }


WORKSPACE_BYTES = 512 << 20
"""What the backward pass allocates at most for chunks of W and their products; see `_device.workspace_bytes`."""

CHUNK_COLUMNS = 16384
"""Columns of a chunk of W: with 8192 rows, 256 MiB in 16 bits. Measured on an H100, N = M = 8192, K = L = 4: chunks of
4096 x 4096, which stay in the cache, took 1.3 x (D = 1024) to 3.4 x the time (D = 128), for their many launches."""

GRADIENT_BLOCK = (16, 512)
"""What a program looks through for the largest upstream gradient."""

MAX_VECTORS = (256, 128)
"""The larger and the smaller of K and L may be at most this, so that a tile holds whole sets. The sizes in
tests/kernels/test_triton_aot.py are compiled without spills; a few others spill some bytes (K = 32, L = 4, masked,
with a gradient for alpha, on sm_90: 24), and above 64 vectors more do."""


def forward_config(K: int, L: int, D: int, dtype: torch.dtype, arch: int, shifted: bool = False) -> Config:
    """Tile sizes of the forward kernel; arch is 10 * major + minor of the compute capability."""
    return _config(K, L, dtype, arch, rows=128, shifted=shifted, stages=4)


def backward_config(K: int, L: int, D: int, dtype: torch.dtype, arch: int, shifted: bool = False) -> Config:
    """Tile sizes of the kernel that makes chunks of W."""
    return _config(K, L, dtype, arch, rows=64 if shifted else 128, shifted=shifted, stages=3)


@functools.cache
def _config(K: int, L: int, dtype: torch.dtype, arch: int, rows: int, shifted: bool, stages: int) -> Config:
    """What the compiler holds in registers without a spill, read off for each kind of chip.

    Tensor cores of sm_100 leave one row to a thread, so that sums over k go through shuffles; float32 products use no
    tensor cores and hold both operands in registers; where K or L is below 4, there is a pair for every few scores. All
    three take small tiles.
    """
    slots_x, slots_y = _triton.next_power_of_two(K), _triton.next_power_of_two(L)
    columns, part = 128 if shifted or not 90 <= arch < 100 else 256, 128
    if min(slots_x, slots_y) < 4:
        rows, columns, part = (64, 32, 32) if dtype == torch.float32 or arch >= 100 else (64, 64, 64)
    elif dtype == torch.float32:
        rows, columns, part = 32 if shifted else 64, 64, 64
    elif arch >= 100:
        rows, columns, part = (64, 32, 32) if shifted else (128, 64, 32)
    rows, part = max(rows, slots_x), max(part, slots_y)
    columns = part if slots_x > 128 else max(columns, part)
    return Config(
        rows=rows,
        columns=columns,
        part=part,
        block_d=16 if dtype == torch.float32 else 64,
        tiles=8,
        flatten=90 <= arch < 100,
        bulk=arch >= 90,
        num_warps=8,
        num_stages=stages if 90 <= arch < 100 else 3,
    )


# --- host


def forward(
    x: Tensor, y: Tensor, alpha: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, wide: bool = False
) -> Tensor:
    """The similarity ``[N, M]``, in the dtype of x or, if `wide`, in float32. See `op.smooth_chamfer`."""
    (N, K), (M, L) = x.shape[:2], y.shape[:2]
    dtype = torch.float32 if wide else x.dtype
    if 0 in (N, M, K, L):
        return x.new_zeros(N, M, dtype=dtype)
    with torch.cuda.device_of(x):
        call = _Call(x, y, alpha, x_mask, y_mask, forward_config)
        out = x.new_empty(N, M, dtype=dtype)
        for shifted, config in enumerate(call.configs):
            tiles = call.tiles(config, call.x.height, call.y.height)
            _triton.launch(
                kernels.forward_kernel, call.programs_for(config, *tiles),
                (*call.operands(config), out, call.alpha, N, M, call.features, call.x.sets, call.y.sets, *tiles),
                SHIFTED=bool(shifted), LIMIT=torch.finfo(dtype).max, **call.constants, **config.launch(),
            )  # fmt: skip
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
        call = _Call(x, y, alpha, x_mask, y_mask, backward_config, grad)
        if need_alpha:  # which the unshifted variant does not compute
            call.configs = [call.configs[1]] * 2
        alpha_parts = None
        if need_alpha:
            shape = call.x.height // call.configs[1].rows, call.y.height // call.configs[1].part
            alpha_parts = grad.new_empty(shape, dtype=torch.float32)
        if not (need_x or need_y):
            call.weights(grad, None, alpha_parts, slice(0, call.x.height), slice(0, call.y.height))
        else:
            _add_chunks(grad, call, alpha_parts, grad_x if need_x else None, grad_y if need_y else None)
        if alpha_parts is not None:
            grad_alpha = _alpha_gradient(alpha_parts, call.stats[packing.GRADIENT.value], alpha)
    return grad_x, grad_y, grad_alpha


def _add_chunks(
    grad: Tensor, call: _Call, alpha_parts: Tensor | None, grad_x: Tensor | None, grad_y: Tensor | None
) -> None:
    """W by chunks, each used for both products. Gradients of x are complete with each band of rows."""
    x, y = call.x, call.y
    height, width = call.chunk_shape()
    chunk = x.rows.new_empty(height * width)
    x_sum = None if grad_x is None else chunk.new_empty(height, call.features, dtype=torch.float32)
    y_sum = None if grad_y is None else chunk.new_empty(y.height, call.features, dtype=torch.float32)
    for top in range(0, x.height, height):
        bottom = min(top + height, x.height)
        for left in range(0, y.height, width):
            right = min(left + width, y.height)
            w = chunk[: (bottom - top) * (right - left)].view(bottom - top, right - left)
            call.weights(grad, w, alpha_parts, slice(top, bottom), slice(left, right))
            if x_sum is not None:
                _add_product(x_sum[: bottom - top], w, y.rows[left:right], first=left == 0)
            if y_sum is not None:
                _add_product(y_sum[left:right], w.T, x.rows[top:bottom], first=top == 0)
        is_last = bottom == x.height
        call.unpack(x_sum, grad_x, top // x.slots, bottom // x.slots, y_sum if is_last else None, grad_y)


class _Packed(NamedTuple):
    """One packed operand."""

    rows: Tensor
    """``[sets * slots, features]``, in tile order."""
    valid: Tensor | None
    """``[sets * slots]`` int8; None where all are."""
    mask: Tensor | None
    sets: int
    slots: int
    group: int
    block: dict[str, int]
    """What a program packs and unpacks at a time; see `_block`."""

    @property
    def height(self) -> int:
        """How many rows."""
        return self.sets * self.slots


class _Call:
    """What the launches of one call share: packed operands, tile sizes, alpha."""

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        alpha: Tensor,
        x_mask: Tensor | None,
        y_mask: Tensor | None,
        configure: Callable[..., Config],
        grad: Tensor | None = None,
    ) -> None:
        (self.N, K, D), (self.M, L, _) = x.shape, y.shape
        self.K, self.L, self.D = K, L, D
        larger, smaller = MAX_VECTORS
        if max(K, L) > larger or min(K, L) > smaller:
            raise ValueError(f"x, y: expected sets of at most {larger} and {smaller} vectors on a GPU, got {K} and {L}")
        self.programs, arch = _device.processors(x)
        self.configs = [configure(K, L, D, x.dtype, arch, shifted) for shifted in (False, True)]
        rows = max(config.rows for config in self.configs)
        _, columns, part, block_d, *_ = self.configs[0]
        slots_x, slots_y = _triton.next_power_of_two(K), _triton.next_power_of_two(L)
        self.features = _triton.cdiv(max(D, 1), block_d) * block_d
        is_masked = x_mask is not None or y_mask is not None or (slots_x, slots_y) != (K, L)
        self.x = _place(x, x_mask, is_masked, slots_x, max(1, 16 // slots_x), rows, self.features)
        self.y = _place(y, y_mask, is_masked, slots_y, part // slots_y, columns, self.features)
        self.stats = x.new_zeros(packing.PEAKS.value + 3 * (self.x.sets + self.y.sets), dtype=torch.float32)
        self.layout = {
            f"{side}_{name}": value
            for side, operand in (("X", self.x), ("Y", self.y))
            for name, value in {"SLOTS": operand.slots, "GROUP": operand.group, **operand.block}.items()
        }
        self._pack(x, y, grad)
        self.alpha = min(float(alpha), torch.finfo(torch.float32).max) if _on_host(alpha) else alpha
        self.constants = {
            "K": slots_x,
            "L": slots_y,
            "GROUP": self.x.group,
            "MASKED": is_masked,
            "ALPHA_ON_DEVICE": isinstance(self.alpha, Tensor),
            "PRECISION": _device.precision(),
        }

    def _pack(self, x: Tensor, y: Tensor, grad: Tensor | None) -> None:
        """Fill the packed operands and `stats`."""
        x_programs, y_programs = (operand.sets // operand.block["SETS"] for operand in (self.x, self.y))
        rows, columns, strides, grad_programs = 0, 0, (0, 0), 0
        if grad is not None:
            rows, columns = grad.shape
            strides = grad.stride(0), grad.stride(1)
            if strides[0] < strides[1]:  # neighbours in memory go to neighbours in a program
                rows, columns, strides = columns, rows, (strides[1], strides[0])
            grad_programs = _triton.cdiv(rows, GRADIENT_BLOCK[0]) * _triton.cdiv(columns, GRADIENT_BLOCK[1])
        x_mask, y_mask = self.x.mask, self.y.mask
        _triton.launch(
            packing.pack_kernel, x_programs + y_programs + grad_programs,
            (
                x, y, grad, x_mask, y_mask, self.x.rows, self.y.rows, self.x.valid, self.y.valid, self.stats,
                x_programs, y_programs, self.N, self.K, self.M, self.L, self.D, self.features,
                self.x.sets, self.y.sets, *x.stride(), *y.stride(),
                *_triton.strides(x_mask, 2), *_triton.strides(y_mask, 2), rows, columns, *strides,
            ),
            **self.layout, LARGEST_EXPONENT=_largest_exponent(self.features),
            GRAD_ROWS=GRADIENT_BLOCK[0], GRAD_COLUMNS=GRADIENT_BLOCK[1], enable_fp_fusion=True,
        )  # fmt: skip

    def weights(self, grad: Tensor, chunk: Tensor | None, alpha_parts: Tensor | None, x: slice, y: slice) -> None:
        """A chunk of W, of rows x and columns y."""
        for shifted, config in enumerate(self.configs):
            if alpha_parts is not None and not shifted:
                continue
            first = self.tiles(config, x.start, y.start)
            tiles = self.tiles(config, x.stop - x.start, y.stop - y.start)
            target = chunk
            if chunk is not None and config.bulk:
                target = TensorDescriptor.from_tensor(chunk, [config.rows, config.part])
            _triton.launch(
                kernels.weights_kernel, self.programs_for(config, *tiles),
                (
                    *self.operands(config), grad, target, alpha_parts, self.alpha, self.N, self.M, self.features,
                    self.x.sets, self.y.sets, *grad.stride(), *first, *tiles, self.y.height // config.part,
                ),
                SHIFTED=bool(shifted), NEED_CHUNK=chunk is not None, NEED_ALPHA=alpha_parts is not None,
                **self.constants, **config.launch(),
            )  # fmt: skip

    def unpack(
        self, x_sum: Tensor | None, grad_x: Tensor | None, first: int, last: int, y_sum: Tensor | None,
        grad_y: Tensor | None,
    ) -> None:  # fmt: skip
        """Write sums in tile order, those of x from set `first` on, to the gradients; those that are not None."""
        x_programs = 0 if x_sum is None else _triton.cdiv(max(0, min(last, self.N) - first), self.x.block["SETS"])
        y_programs = 0 if y_sum is None else _triton.cdiv(self.M, self.y.block["SETS"])
        if not (x_programs + y_programs) or not self.D:
            return
        x_mask, y_mask = self.x.mask, self.y.mask
        _triton.launch(
            packing.unpack_kernel, x_programs + y_programs,
            (
                x_sum, y_sum, x_mask, y_mask, self.stats, grad_x, grad_y, x_programs, first, min(last, self.N), self.M,
                self.K, self.L, self.D, self.features, self.x.sets, self.y.sets,
                *_triton.strides(x_mask, 2), *_triton.strides(y_mask, 2),
            ),
            **self.layout, enable_fp_fusion=True,
        )  # fmt: skip

    def operands(self, config: Config) -> tuple[Any, ...]:
        """The first arguments of both kernels."""
        rows: list[Any] = [self.x.rows, self.y.rows]
        if config.bulk:
            rows = [
                TensorDescriptor.from_tensor(v, [size, config.block_d])
                for v, size in zip(rows, (config.rows, config.columns), strict=True)
            ]
        return *rows, self.x.valid, self.y.valid, self.stats

    @staticmethod
    def tiles(config: Config, rows: int, columns: int) -> tuple[int, int]:
        """How many tiles make up so many rows and columns."""
        return rows // config.rows, columns // config.columns

    def programs_for(self, config: Config, row_tiles: int, column_tiles: int) -> int:
        """A program for each multiprocessor where the loop over tiles is pipelined, else for each tile."""
        tiles = row_tiles * column_tiles
        return min(tiles, self.programs) if config.flatten else tiles

    def chunk_shape(self) -> tuple[int, int]:
        """Rows and columns of a chunk of W: half of the workspace for it and half for the sum over its columns."""
        rows, columns = max(config.rows for config in self.configs), self.configs[0].columns
        width = min(self.y.height, CHUNK_COLUMNS)
        room = _device.workspace_bytes(WORKSPACE_BYTES, self.stats.device) // 2
        height = room // max(width * self.x.rows.element_size(), self.features * 4)
        return min(self.x.height, max(rows, height // rows * rows)), max(columns, width // columns * columns)


def _on_host(alpha: Tensor) -> bool:
    """Whether alpha can be read without waiting for a device."""
    return alpha.device.type == "cpu"


def _place(
    v: Tensor, mask: Tensor | None, is_masked: bool, slots: int, group: int, rows: int, features: int
) -> _Packed:
    """Memory for v in tile order, padded to whole tiles of `rows` rows and to `features`."""
    sets = _triton.cdiv(len(v) * slots, rows) * rows // slots
    valid = v.new_empty(sets * slots, dtype=torch.int8) if is_masked else None
    packed = v.new_empty(sets * slots, features)
    return _Packed(packed, valid, mask, sets, slots, group, _block(slots, features, sets))


def _block(slots: int, features: int, sets: int) -> dict[str, int]:
    """What one program packs or unpacks at a time: about 4096 numbers, of as many sets as divide `sets`."""
    block = min(_triton.next_power_of_two(features), max(16, 4096 // slots))
    return {"SETS": math.gcd(max(1, 4096 // (slots * block)), sets), "BLOCK": block}


def _largest_exponent(features: int) -> int:
    """Of packed numbers, so that no dot product of so many overflows."""
    return (124 - math.ceil(math.log2(features))) // 2


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


# --- ahead of time


def configs(K: int, L: int, D: int, dtype: torch.dtype, arch: int, masked: bool = False) -> Iterator[_triton.Build]:
    """Every kernel that forward and backward launch for such sets on such a chip; with masks, for a wide result."""
    slots_x, slots_y = _triton.next_power_of_two(K), _triton.next_power_of_two(L)
    group, part = max(1, 16 // slots_x), forward_config(K, L, D, dtype, arch).part
    limit = torch.finfo(dtype).max
    shared: dict[str, Any] = {"K": slots_x, "L": slots_y, "GROUP": group, "PRECISION": "ieee", "ALPHA_ON_DEVICE": False}
    shared["MASKED"] = masked or (slots_x, slots_y) != (K, L)
    layout: dict[str, Any] = {
        f"{side}_{name}": value
        for side, slots, sets_a_group in (("X", slots_x, group), ("Y", slots_y, part // slots_y))
        for name, value in {
            "SLOTS": slots,
            "GROUP": sets_a_group,
            **_block(slots, _triton.cdiv(D, 64) * 64, 4096),
        }.items()
    }
    gradient = {"GRAD_ROWS": GRADIENT_BLOCK[0], "GRAD_COLUMNS": GRADIENT_BLOCK[1], "column_stride": 1}
    adjacent = {"x_stride_d": 1, "y_stride_d": 1}
    for absent in ((), ("grad",)):
        constants = {**layout, **gradient, **adjacent, **dict.fromkeys(absent), "LARGEST_EXPONENT": 56}
        yield _build(packing.pack_kernel, dtype, constants, {}, shared["MASKED"], masked)
    yield _build(packing.unpack_kernel, dtype, layout, {}, shared["MASKED"], masked)
    for shifted in (False, True):
        config = forward_config(K, L, D, dtype, arch, shifted)
        constants = {**shared, "SHIFTED": shifted, "LIMIT": limit}
        yield _build(kernels.forward_kernel, dtype, constants, config.launch(), shared["MASKED"], masked)
        for need_alpha in (False, True)[: 1 + shifted]:
            config = backward_config(K, L, D, dtype, arch, shifted)
            constants = {**shared, "SHIFTED": shifted, "NEED_CHUNK": True, "NEED_ALPHA": need_alpha, "stride_m": 1}
            constants |= {} if need_alpha else {"alpha_parts": None}
            yield _build(kernels.weights_kernel, dtype, constants, config.launch(), shared["MASKED"], masked)


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
    types |= dict.fromkeys(("stats", "alpha_parts", "x_sums", "y_sums"), "*fp32")
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
