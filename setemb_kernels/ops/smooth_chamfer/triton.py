"""Smooth-Chamfer on a GPU, in Triton: the host side. `triton_kernels` has the kernels, `reference` the maths.

    pack_kernel      x, y -> packed operands ``[rows, features]`` in tile order, masked vectors zero, features padded;
                     and per set: weight 1 / (2 |X|), longest vector, exponent
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

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from setemb_kernels import _triton
from setemb_kernels.ops.smooth_chamfer import triton_kernels as kernels

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

    def launch(self) -> dict[str, Any]:
        """Keyword arguments of a launch."""
        names = {"rows": "ROWS", "columns": "COLUMNS", "part": "PART", "block_d": "BLOCK_D", "tiles": "TILES"}
        names |= {"flatten": "FLATTEN", "bulk": "BULK"}
        return {names.get(name, name): value for name, value in self._asdict().items()} | {
            "enable_fp_fusion": True,
            "maxnreg": 255,  # left alone, the compiler may spill to make room for a second program
        }


WORKSPACE_BYTES = 64 << 20
"""What the backward pass allocates for chunks of W and their products."""

CHUNK_COLUMNS = 4096
"""Columns of a chunk of W: with 4096 rows, 32 MiB in 16 bits, products of D = 1024 make 128 tiles of 128 x 256 each."""

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
            tiles = call.tiles(config, len(call.x.rows), len(call.y.rows))
            kernels.forward_kernel[call.grid(config, *tiles)](
                *call.operands(config), out, call.alpha, N, M, call.features, call.x.sets, call.y.sets, *tiles,
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

    That of alpha is on the device of x. Memory beyond inputs and outputs: packed copies of x and y, `WORKSPACE_BYTES`,
    and, if both x and y need a gradient, one of the two (the smaller) in float32.
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
        call = _Call(x, y, alpha, x_mask, y_mask, backward_config)
        if need_alpha:  # which the unshifted variant does not compute
            call.configs = [call.configs[1]] * 2
        part_rows, part_columns = call.configs[1].rows, call.configs[1].part
        exponents = _exponents(grad, call)
        alpha_parts = grad.new_empty(
            (len(call.x.rows) // part_rows, len(call.y.rows) // part_columns) if need_alpha else 1, dtype=torch.float32
        )
        height, width = call.chunk_shape() if need_x or need_y else (len(call.x.rows), len(call.y.rows))
        chunk = x.new_empty(height * width if need_x or need_y else 1)
        x_sum = chunk.new_empty(height if need_x else 0, call.features, dtype=torch.float32)
        y_sum = chunk.new_empty(len(call.y.rows) if need_y else 0, call.features, dtype=torch.float32)
        for top in range(0, len(call.x.rows), height):
            x_rows = call.x.rows[top : top + height]
            for left in range(0, len(call.y.rows), width):
                y_rows = call.y.rows[left : left + width]
                for shifted, config in enumerate(call.configs):
                    if need_alpha and not shifted:
                        continue
                    tiles = call.tiles(config, len(x_rows), len(y_rows))
                    kernels.weights_kernel[call.grid(config, *tiles)](
                        *call.operands(config), grad, exponents, chunk, alpha_parts,
                        call.alpha, N, M, call.features, call.x.sets, call.y.sets, *grad.stride(),
                        *call.tiles(config, top, left), *tiles, len(call.y.rows) // config.part, SHIFTED=bool(shifted),
                        NEED_CHUNK=need_x or need_y, NEED_ALPHA=need_alpha, **call.constants, **config.launch(),
                    )  # fmt: skip
                if need_x or need_y:
                    w = chunk[: len(x_rows) * len(y_rows)].view(len(x_rows), len(y_rows))
                if need_x:
                    _add_product(x_sum[: len(x_rows)], w, y_rows, first=left == 0)
                if need_y:
                    _add_product(y_sum[left : left + width], w.T, x_rows, first=top == 0)
            if need_x:
                _unpack(x_sum, call.x, x_mask, exponents, grad_x, top // call.x.slots, len(x_rows) // call.x.slots)
        if need_y:
            _unpack(y_sum, call.y, y_mask, exponents, grad_y, 0, call.y.sets)
        if need_alpha:
            grad_alpha = _alpha_gradient(alpha_parts, exponents, alpha)
    return grad_x, grad_y, grad_alpha


class _Packed(NamedTuple):
    """One packed operand."""

    rows: Tensor  # [sets * slots, features], tile order
    valid: Tensor  # [sets * slots] int8
    stats: Tensor  # [3, sets]
    peak: Tensor  # [3]
    sets: int
    slots: int
    group: int


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
    ) -> None:
        (_, K, D), (_, L, _) = x.shape, y.shape
        larger, smaller = MAX_VECTORS
        if max(K, L) > larger or min(K, L) > smaller:
            raise ValueError(f"x, y: expected sets of at most {larger} and {smaller} vectors on a GPU, got {K} and {L}")
        self.programs, arch = _triton.device(x)
        self.configs = [configure(K, L, D, x.dtype, arch, shifted) for shifted in (False, True)]
        rows = max(config.rows for config in self.configs)
        _, columns, part, block_d, *_ = self.configs[0]
        slots_x, slots_y = _triton.next_power_of_two(K), _triton.next_power_of_two(L)
        self.x = _pack(x, x_mask, slots_x, max(1, 16 // slots_x), rows, block_d)
        self.y = _pack(y, y_mask, slots_y, part // slots_y, columns, block_d)
        self.features = self.x.rows.shape[1]
        self.alpha = min(float(alpha), torch.finfo(torch.float32).max) if _on_host(alpha) else alpha
        self.constants = {
            "K": slots_x,
            "L": slots_y,
            "GROUP": self.x.group,
            "MASKED": x_mask is not None or y_mask is not None or (slots_x, slots_y) != (K, L),
            "ALPHA_ON_DEVICE": isinstance(self.alpha, Tensor),
            "PRECISION": _triton.precision(),
        }

    def operands(self, config: Config) -> tuple[Any, ...]:
        """The first arguments of both kernels."""
        x, y = self.x, self.y
        rows: list[Any] = [x.rows, y.rows]
        if config.bulk:
            rows = [
                TensorDescriptor.from_tensor(v, [size, config.block_d])
                for v, size in zip(rows, (config.rows, config.columns), strict=True)
            ]
        return *rows, x.valid, y.valid, x.stats, y.stats, x.peak, y.peak

    @staticmethod
    def tiles(config: Config, rows: int, columns: int) -> tuple[int, int]:
        """How many tiles make up so many rows and columns."""
        return rows // config.rows, columns // config.columns

    def grid(self, config: Config, row_tiles: int, column_tiles: int) -> tuple[int]:
        """A program for each multiprocessor where the loop over tiles is pipelined, else for each tile."""
        tiles = row_tiles * column_tiles
        return (min(tiles, self.programs) if config.flatten else tiles,)

    def chunk_shape(self) -> tuple[int, int]:
        """Rows and columns of a chunk of W: half of `WORKSPACE_BYTES` for it and half for the sum over its columns."""
        rows, columns = max(config.rows for config in self.configs), self.configs[0].columns
        width = min(len(self.y.rows), CHUNK_COLUMNS)
        height = WORKSPACE_BYTES // 2 // max(width * self.x.rows.element_size(), self.features * 4)
        return min(len(self.x.rows), max(rows, height // rows * rows)), max(columns, width // columns * columns)


def _on_host(alpha: Tensor) -> bool:
    """Whether alpha can be read without waiting for a device."""
    return alpha.device.type == "cpu"


def _pack(v: Tensor, mask: Tensor | None, slots: int, group: int, rows: int, block_d: int) -> _Packed:
    """v in tile order, padded to whole tiles of `rows` rows and whole blocks of `block_d` features."""
    N, K, D = v.shape
    sets = triton.cdiv(N * slots, rows) * rows // slots
    features = triton.cdiv(max(D, 1), block_d) * block_d
    packed = v.new_empty(sets * slots, features)
    valid = v.new_empty(sets * slots, dtype=torch.int8)
    stats = v.new_empty(3, sets, dtype=torch.float32)
    block = _block(slots, features, sets)
    kernels.pack_kernel[(sets // block["SETS"],)](
        v, mask, packed, valid, stats, N, K, D, features, sets, *v.stride(), *_triton.strides(mask, 2),
        HAS_MASK=mask is not None, SLOTS=slots, GROUP=group, **block,
        LARGEST_EXPONENT=(124 - math.ceil(math.log2(features))) // 2, enable_fp_fusion=True,
    )  # fmt: skip
    return _Packed(packed, valid, stats, stats.amax(1), sets, slots, group)


def _unpack(
    sums: Tensor, like: _Packed, mask: Tensor | None, exponents: Tensor, out: Tensor, first: int, sets: int
) -> None:
    """Write sums ``[sets * slots, features]`` to ``out [N, K, D]``, from set `first` on."""
    N, K, D = out.shape
    if first >= N or D == 0:
        return
    block = _block(like.slots, sums.shape[1], like.sets)
    last = min(N, first + sets)
    kernels.unpack_kernel[(triton.cdiv(last - first, block["SETS"]),)](
        sums, mask, like.stats, exponents, out, first, last, K, D, sums.shape[1], like.sets, *_triton.strides(mask, 2),
        HAS_MASK=mask is not None, SLOTS=like.slots, GROUP=like.group, **block,
        enable_fp_fusion=True,
    )  # fmt: skip


def _block(slots: int, features: int, sets: int) -> dict[str, int]:
    """What one program packs or unpacks at a time: about 4096 numbers, of as many sets as divide `sets`."""
    block_d = min(_triton.next_power_of_two(features), max(16, 4096 // slots))
    return {"SETS": math.gcd(max(1, 4096 // (slots * block_d)), sets), "BLOCK_D": block_d}


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
    both = (call.x.peak[2] + call.y.peak[2]).to(torch.int32)
    return torch.stack([exponent, exponent + both]).to(torch.int32)


def _alpha_gradient(parts: Tensor, exponents: Tensor, alpha: Tensor) -> Tensor:
    """From sums of entropy (in bits) times gradient (divided by a power of two); on the device of parts."""
    sharpness: Any = float(alpha) if _on_host(alpha) else alpha.double()
    total = parts.sum(dtype=torch.float64) * exponents[0].double().exp2() * -math.log(2)
    gradient: Tensor = total / sharpness / sharpness
    return gradient.to(alpha.dtype)


# --- ahead of time


def configs(K: int, L: int, D: int, dtype: torch.dtype, arch: int, masked: bool = False) -> Iterator[_triton.Build]:
    """Every kernel that forward and backward launch for such sets on such a chip; with masks, for a wide result."""
    slots_x, slots_y = _triton.next_power_of_two(K), _triton.next_power_of_two(L)
    group = max(1, 16 // slots_x)
    limit = torch.finfo(dtype).max
    shared = {"K": slots_x, "L": slots_y, "GROUP": group, "PRECISION": "ieee", "ALPHA_ON_DEVICE": False}
    shared["MASKED"] = masked or (slots_x, slots_y) != (K, L)
    block = _block(slots_x, triton.cdiv(D, 64) * 64, 4096)
    layout = {"HAS_MASK": masked, "SLOTS": slots_x, "GROUP": group, **block}
    yield _build(kernels.pack_kernel, dtype, {**layout, "LARGEST_EXPONENT": 56, "stride_d": 1}, {})
    yield _build(kernels.unpack_kernel, dtype, layout, {})
    for shifted in (False, True):
        config = forward_config(K, L, D, dtype, arch, shifted)
        constants = {**shared, "SHIFTED": shifted, "LIMIT": limit}
        yield _build(kernels.forward_kernel, dtype, constants, config.launch(), wide=masked)
        for need_alpha in (False, True)[: 1 + shifted]:
            config = backward_config(K, L, D, dtype, arch, shifted)
            constants = {**shared, "SHIFTED": shifted, "NEED_CHUNK": True, "NEED_ALPHA": need_alpha, "stride_m": 1}
            yield _build(kernels.weights_kernel, dtype, constants, config.launch(), wide=masked)


def _build(
    kernel: Any, dtype: torch.dtype, constants: dict[str, Any], launch: dict[str, Any], wide: bool = False
) -> _triton.Build:
    name = _triton.NAMES[dtype]
    types = {"mask": "*i1", "valid": "*i8", "x_valid": "*i8", "y_valid": "*i8", "exponents": "*i32", "alpha": "fp32"}
    types |= dict.fromkeys(("stats", "x_stats", "y_stats", "x_peak", "y_peak", "alpha_parts"), "*fp32")
    types |= dict.fromkeys(("v", "x", "y", "out", "grad", "chunk"), f"*{name}")
    if wide:
        types |= {"out": "*fp32", "grad": "*fp32"}
    types["packed"] = "*fp32" if kernel is kernels.unpack_kernel else f"*{name}"
    if launch.get("BULK"):
        for key, rows in (("x", "ROWS"), ("y", "COLUMNS")):
            types[key] = f"tensordesc<{name}[{launch[rows]},{launch['BLOCK_D']}]>"
    if not constants.get("HAS_MASK"):
        constants = constants | {"mask": None}
    on_tensor_cores = "SHIFTED" in constants and dtype != torch.float32
    return _triton.build(kernel, types, constants, launch, {"features"}, on_tensor_cores)
