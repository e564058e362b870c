"""Smooth-Chamfer on a GPU, in Triton. Same functions as `reference`, which has the maths; here is how it is laid out.

Three kernels, and plain matrix products in the backward pass:

    _pack_kernel        x, y -> packed operands  [rows, features] in tile order, masked vectors zero, features padded; and per set:
                        weight 1 / (2 |X|), longest vector, exponent
    _forward_kernel     packed operands -> similarity [N, M]
    _weights_kernel     packed operands, upstream gradient -> one chunk of W = g ds/dc  (and partial sums for d/dalpha)
    torch.addmm         dX += W Y, dY += W^T X, accumulated in float32
    _unpack_kernel      float32 accumulators in tile order -> gradients in the layout and dtype of the inputs

**Tile.** A program computes scores ``c [ROWS, COLUMNS]`` of whole sets, K and L padded to powers of two. The order of rows and
columns decides what the sums over slots cost. A tensor core leaves rows r and r + 8 of every 16, and many columns, in one
thread. So rows are slot-major within blocks of 16 (``GROUP = 16 / K`` sets to a block) and columns slot-major within the tile
(``GROUP = COLUMNS / L``): the sum over l stays in a thread, the sum over k takes one addition in a thread and one shuffle for K = 4.
Both are ``position`` below, with another GROUP.

**Why a packed copy.** It reads and writes each operand once: 4 (N K + M L) D bytes in 16 bits, against 2 N K M L D flops; at
N = M = 8192, K = L = 4, D = 1024 that is 0.06 ms at 4.3 TB/s against 2.8 ms of products at 790 TFLOP/s, 2 %. For it the main loop has
no predicates, no gathers and no masks, takes any strides and any D, and is fed by the bulk copy engine (tensor descriptors)
where there is one.

**Why the backward stores chunks of W.** With R = N K rows, C = M L columns, P = 2 R C D flops for one product:
  (a) dX and dY each by a kernel that recomputes its scores: 4 P. The accumulator ``[128, D]`` of one row block is 512 KiB at
      D = 1024, twice the register file of a multiprocessor, so D must be split in at least 4, and each part recomputes the scores: 10 P.
  (b) W by chunks in a workspace, each used twice: 3 P, 6 R C bytes of traffic in 16 bits, mostly in the L2 cache for a chunk
      of 32 MiB. At the sizes above 3 P = 8.4 ms; the 6 GB take 1.5 ms from memory, less from the cache, and run beside
      the products. The two plain products are cuBLAS's, nobody's better.
  (b) wins for D > 128; below, both are bound by the exponentials, of which (a) has twice as many. Hence (b) for every D.

**Range.** Sets whose vectors are so long that a dot product could overflow are packed times 2^-exponent. Where Cauchy-Schwarz bounds
|alpha c| for a whole tile, ``exp(alpha c)`` needs no shift and one exp serves both directions; other tiles shift by the
maximum per row and per column. A set that holds NaN or infinity has weight NaN, so that exactly its pairs become NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

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
        return {names.get(name, name): value for name, value in self._asdict().items()} | {"enable_fp_fusion": True}


WORKSPACE_BYTES = 64 << 20
"""What the backward pass allocates for chunks of W and their products."""

MAX_VECTORS = (256, 128)
"""The larger and the smaller of K and L may be at most this, so that a tile holds whole sets."""


def _next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def forward_config(K: int, L: int, D: int, dtype: torch.dtype, arch: int, shifted: bool = False) -> Config:
    """Tile sizes of the forward kernel; arch is 10 * major + minor of the compute capability."""
    return _config(K, L, dtype, arch, rows=128)


def backward_config(K: int, L: int, D: int, dtype: torch.dtype, arch: int, shifted: bool = False) -> Config:
    """Tile sizes of the kernel that makes chunks of W. The shifted variant holds more in registers."""
    return _config(K, L, dtype, arch, rows=64 if shifted else 128)


def _config(K: int, L: int, dtype: torch.dtype, arch: int, rows: int) -> Config:
    columns, part, warps, stages = 256, 128, 8, 4
    if _next_power_of_two(K) > 128:
        rows, columns = 256, 128
    rows = max(rows, _next_power_of_two(K))
    part = max(part, _next_power_of_two(L))
    block_d = 32 if dtype == torch.float32 else 64
    return Config(rows, columns, part, block_d, 8, arch == 90, arch >= 90, warps, stages)


# --- host


def forward(x: Tensor, y: Tensor, alpha: Tensor, x_mask: Tensor | None, y_mask: Tensor | None) -> Tensor:
    """The similarity ``[N, M]``, in the dtype of x. See `op.smooth_chamfer`."""
    (N, K, D), (M, L, _) = x.shape, y.shape
    if 0 in (N, M, K, L):
        return x.new_zeros(N, M)
    with torch.cuda.device_of(x):
        call = _Call(x, y, alpha, x_mask, y_mask, forward_config)
        out = x.new_empty(N, M)
        for shifted, config in enumerate(call.configs):
            tiles = call.tiles(config, len(call.x.rows), len(call.y.rows))
            kernels.forward_kernel[call.grid(config, *tiles)](
                *call.operands(config), out, call.alpha, N, M, call.features, call.x.sets, call.y.sets, *tiles,
                SHIFTED=bool(shifted), LIMIT=torch.finfo(x.dtype).max, **call.constants, **config.launch(),
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

    That of alpha is on the device of x. Memory beyond inputs and outputs: packed copies of x and y, `WORKSPACE_BYTES`, and, if
    both x and y need a gradient, one of the two (the smaller) in float32.
    """
    (N, K, D), (M, L, _) = x.shape, y.shape
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
        if max(K, L) > MAX_VECTORS[0] or min(K, L) > MAX_VECTORS[1]:
            raise ValueError(
                f"x, y: expected sets of at most {MAX_VECTORS[0]} and {MAX_VECTORS[1]} vectors on a GPU, got {K} and {L}"
            )
        self.programs, arch = _device(x)
        self.configs = [configure(K, L, D, x.dtype, arch, shifted) for shifted in (False, True)]
        rows = max(config.rows for config in self.configs)
        _, columns, part, block_d, *_ = self.configs[0]
        slots_x, slots_y = _next_power_of_two(K), _next_power_of_two(L)
        self.x = _pack(x, x_mask, slots_x, max(1, 16 // slots_x), rows, block_d)
        self.y = _pack(y, y_mask, slots_y, part // slots_y, columns, block_d)
        self.features = self.x.rows.shape[1]
        self.alpha = min(float(alpha), torch.finfo(torch.float32).max) if alpha.device.type == "cpu" else alpha
        tf32 = torch.backends.cuda.matmul.fp32_precision == "tf32"  # what torch may use for a plain product
        self.constants = {
            "K": slots_x,
            "L": slots_y,
            "GROUP": self.x.group,
            "MASKED": x_mask is not None or y_mask is not None or (K, L) != (slots_x, slots_y),
            "ALPHA_ON_DEVICE": isinstance(self.alpha, Tensor),
            "PRECISION": "tf32" if tf32 else "ieee",
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
        width = min(len(self.y.rows), 4096)
        height = WORKSPACE_BYTES // 2 // max(width * self.x.rows.element_size(), self.features * 4)
        return min(len(self.x.rows), max(rows, height // rows * rows)), max(columns, width // columns * columns)


def _device(x: Tensor) -> tuple[int, int]:
    """Multiprocessors and architecture (10 * major + minor of the compute capability)."""
    if x.device.type == "cpu":  # Triton's interpreter
        return 2, 90
    properties = torch.cuda.get_device_properties(x.device)
    return properties.multi_processor_count, 10 * properties.major + properties.minor


def _pack(v: Tensor, mask: Tensor | None, slots: int, group: int, rows: int, block_d: int) -> _Packed:
    """v in tile order, padded to whole tiles of `rows` rows and whole blocks of `block_d` features."""
    N, K, D = v.shape
    sets = triton.cdiv(N * slots, rows) * rows // slots
    features = triton.cdiv(max(D, 1), block_d) * block_d
    packed = v.new_empty(sets * slots, features)
    valid = torch.empty(sets * slots, dtype=torch.int8, device=v.device)
    stats = torch.empty(3, sets, dtype=torch.float32, device=v.device)
    block = _block(slots, features)
    kernels.pack_kernel[(triton.cdiv(sets, block["SETS"]),)](
        v, mask, packed, valid, stats, N, K, D, features, sets, *v.stride(), *_strides(mask),
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
    block = _block(like.slots, sums.shape[1])
    last = min(N, first + sets)
    kernels.unpack_kernel[(triton.cdiv(last - first, block["SETS"]),)](
        sums, mask, like.stats, exponents, out, first, last, K, D, sums.shape[1], like.sets, *_strides(mask),
        HAS_MASK=mask is not None, SLOTS=like.slots, GROUP=like.group, **block,
        LIMIT=torch.finfo(out.dtype).max, enable_fp_fusion=True,
    )  # fmt: skip


def _strides(mask: Tensor | None) -> tuple[int, ...]:
    return (0, 0) if mask is None else mask.stride()


def _block(slots: int, features: int) -> dict[str, int]:
    """What one program packs or unpacks at a time: about 4096 numbers."""
    block_d = min(_next_power_of_two(features), max(16, 4096 // slots))
    return {"SETS": max(1, 4096 // (slots * block_d)), "BLOCK_D": block_d}


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
    sharpness: Any = float(alpha) if alpha.device.type == "cpu" else alpha.double()
    total = parts.sum(dtype=torch.float64) * exponents[0].double().exp2() * -math.log(2)
    limit = torch.finfo(alpha.dtype).max
    return (total / sharpness / sharpness).clamp(-limit, limit).to(alpha.dtype)


# --- ahead of time


class Build(NamedTuple):
    """Arguments of ``triton.compiler.ASTSource`` and ``triton.compile`` for one kernel that a call may launch."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attrs: dict[tuple[int], list[list[Any]]]
    options: dict[str, Any]


_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def configs(K: int, L: int, D: int, dtype: torch.dtype, arch: int, masked: bool = False) -> Iterator[Build]:
    """Every kernel that forward and backward launch for such sets on such a chip."""
    slots_x, slots_y = _next_power_of_two(K), _next_power_of_two(L)
    group = max(1, 16 // slots_x)
    limit = torch.finfo(dtype).max
    shared = {"K": slots_x, "L": slots_y, "GROUP": group, "PRECISION": "ieee", "ALPHA_ON_DEVICE": False}
    shared["MASKED"] = masked or (K, L) != (slots_x, slots_y)
    block = _block(slots_x, triton.cdiv(D, 64) * 64)
    layout = {"HAS_MASK": masked, "SLOTS": slots_x, "GROUP": group, **block}
    yield _build(kernels.pack_kernel, dtype, {**layout, "LARGEST_EXPONENT": 56, "stride_d": 1}, {})
    yield _build(kernels.unpack_kernel, dtype, {**layout, "LIMIT": limit}, {})
    for shifted in (False, True):
        config = forward_config(K, L, D, dtype, arch, shifted)
        yield _build(kernels.forward_kernel, dtype, {**shared, "SHIFTED": shifted, "LIMIT": limit}, config.launch())
        for need_alpha in (False, True)[: 1 + shifted]:
            config = backward_config(K, L, D, dtype, arch, shifted)
            constants = {**shared, "SHIFTED": shifted, "NEED_CHUNK": True, "NEED_ALPHA": need_alpha, "stride_m": 1}
            yield _build(kernels.weights_kernel, dtype, constants, config.launch())


def _build(kernel: Any, dtype: torch.dtype, constants: dict[str, Any], launch: dict[str, Any]) -> Build:
    name = _NAMES[dtype]
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    options |= {key: value for key, value in launch.items() if key in options}
    constants = constants | {key: value for key, value in launch.items() if key not in options}
    pointers = {"v": name, "mask": "i1", "valid": "i8", "x_valid": "i8", "y_valid": "i8", "exponents": "i32"}
    pointers |= dict.fromkeys(("stats", "x_stats", "y_stats", "x_peak", "y_peak", "alpha_parts"), "fp32")
    pointers |= dict.fromkeys(("x", "y", "out", "grad", "chunk"), name)
    pointers["packed"] = "fp32" if kernel is kernels.unpack_kernel else name
    signature = {key: "i32" for key in kernel.arg_names} | {"alpha": "fp32"}
    signature |= {key: f"*{value}" for key, value in pointers.items()} | dict.fromkeys(constants, "constexpr")
    if constants.get("BULK"):
        for key, rows in (("x", "ROWS"), ("y", "COLUMNS")):
            signature[key] = f"tensordesc<{name}[{constants[rows]},{constants['BLOCK_D']}]>"
    signature = {key: signature[key] for key in kernel.arg_names}
    if signature.get("mask") and not constants["HAS_MASK"]:
        signature["mask"], constants = "constexpr", constants | {"mask": None}
    aligned = [key for key, value in signature.items() if value.startswith("*") or key == "features"]
    attrs = {(kernel.arg_names.index(key),): [["tt.divisibility", 16]] for key in aligned}
    return Build(kernel, signature, constants, attrs, options)
