"""Smooth-Chamfer on a GPU, in Triton: what calls of inputs of one layout share, made once; a small call is bound by the
host."""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from setemb_kernels import _device, _triton
from setemb_kernels.ops.smooth_chamfer import triton_config as sizes
from setemb_kernels.ops.smooth_chamfer import triton_kernels as kernels
from setemb_kernels.ops.smooth_chamfer import triton_packing as packing
from setemb_kernels.ops.smooth_chamfer.op import MAX_VECTORS


class Place(NamedTuple):
    """Where one operand is packed: ``[sets * slots, features]`` in tile order."""

    sets: int
    slots: int
    group: int
    block: dict[str, int]
    """What a program packs and unpacks at a time."""

    @property
    def height(self) -> int:
        """How many rows."""
        return self.sets * self.slots


class Operands(NamedTuple):
    """What a call packed; see `triton_packing`."""

    x: Tensor
    y: Tensor
    x_valid: Tensor | None
    y_valid: Tensor | None
    stats: Tensor


Strides = tuple[int, ...]


def plan_of(
    x: Tensor,
    y: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    alpha: float | Tensor,
    *,
    out: torch.dtype | None = None,
    grad: Tensor | None = None,
    need_alpha: bool = False,
    need_chunk: bool = False,
    is_loss: bool = False,
) -> Plan:
    """The plan of a forward call, whose result has dtype `out`, of a backward call with the upstream gradient, or of
    one whose kernel makes that of a loss."""
    return _plan(
        x.shape, x.stride(), y.shape, y.stride(), x.dtype, x.device, _device.processors(x),
        None if x_mask is None else x_mask.stride(), None if y_mask is None else y_mask.stride(),
        alpha.dtype if isinstance(alpha, Tensor) else None, out,
        None if grad is None else (grad.stride(), grad.dtype), need_alpha, need_chunk,
        is_loss, sizes.LARGEST_ALONE,
    )  # fmt: skip


class Plan:
    """Of a device, so that it may hold launches: places of the operands, tile sizes, constants."""

    def __init__(
        self,
        x_shape: torch.Size,
        x_strides: Strides,
        y_shape: torch.Size,
        y_strides: Strides,
        dtype: torch.dtype,
        device: torch.device,
        processors: tuple[int, int],
        x_mask: Strides | None,
        y_mask: Strides | None,
        alpha_on_device: torch.dtype | None,
        out: torch.dtype | None,
        grad: tuple[Strides, torch.dtype] | None,
        need_alpha: bool,
        need_chunk: bool,
        is_loss: bool,
        largest_alone: int,
    ) -> None:
        (self.N, K, self.D), (self.M, L, _) = x_shape, y_shape
        larger, smaller = MAX_VECTORS
        if max(K, L) > larger or min(K, L) > smaller:
            raise ValueError(f"x, y: expected sets of at most {larger} and {smaller} vectors on a GPU, got {K} and {L}")
        self.dtype, (self.programs, arch) = dtype, processors
        self.stored = dtype == torch.float32
        """Whether scores are made by a plain product."""
        x_slots, y_slots = _triton.next_power_of_two(K), _triton.next_power_of_two(L)
        self.masked = x_mask is not None or y_mask is not None or (x_slots, y_slots) != (K, L)
        alone = need_alpha or largest_alone >= self.N * K * self.M * L
        self.variants = sizes.variants(
            K, L, self.D, dtype, arch,
            masked=self.masked, backward=grad is not None or is_loss, is_loss=is_loss, alone=alone,
        )  # fmt: skip
        configs = [config for _, config in self.variants]
        self.rows, self.columns = max(config.rows for config in configs), max(config.columns for config in configs)
        self.part, block_d = configs[0].part, max(config.block_d for config in configs)
        self.features = _triton.cdiv(max(self.D, 1), block_d) * block_d
        self.strides: Strides = (0, 0) if grad is None else grad[0]
        self.x = _place(self.N, x_slots, sizes.group(x_slots), self.rows, self.features)
        self.y = _place(self.M, y_slots, self.part // y_slots, self.columns, self.features)
        self.need_peaks = grad is not None or is_loss or len(configs) > 1
        self.constants: dict[str, Any] = {
            "K": x_slots,
            "L": y_slots,
            "GROUP": self.x.group,
            "MASKED": self.masked,
            "ALPHA_ON_DEVICE": alpha_on_device is not None,
            "ALONE": len(configs) == 1,
        }
        if out is not None:
            self.constants["LIMIT"] = torch.finfo(out).max
        elif not is_loss:
            self.constants |= {"NEED_CHUNK": need_chunk, "NEED_ALPHA": need_alpha}
        self.layout = {
            f"{side}_{name}": value
            for side, place in (("X", self.x), ("Y", self.y))
            for name, value in {"SLOTS": place.slots, "GROUP": place.group, **place.block}.items()
        }
        self.mask_strides = *(x_mask or (0, 0)), *(y_mask or (0, 0))
        self.set_sizes = K, L
        self._pack = self._packing(x_strides, y_strides, grad is not None)
        self._launches: dict[Any, Any] = {}

    def _packing(self, x_strides: Strides, y_strides: Strides, has_grad: bool) -> _triton.Launch:
        x_programs, y_programs = (place.sets // place.block["SETS"] for place in (self.x, self.y))
        rows, columns, strides, grad_programs = 0, 0, self.strides, 0
        if has_grad:
            rows, columns = self.N, self.M
            if strides[0] < strides[1]:  # neighbours in memory go to neighbours in a program
                rows, columns, strides = columns, rows, strides[::-1]
            down, across = sizes.GRADIENT_BLOCK
            grad_programs = _triton.cdiv(rows, down) * _triton.cdiv(columns, across)
        K, L = self.set_sizes
        return _triton.Launch(
            packing.pack_kernel, x_programs + y_programs + grad_programs,
            (
                x_programs, y_programs, self.N, K, self.M, L, self.D, self.features, self.x.sets, self.y.sets,
                *x_strides, *y_strides, *self.mask_strides, rows, columns, *strides,
            ),
            **self.layout, LARGEST_EXPONENT=sizes.largest_exponent(self.features), NEED_PEAKS=self.need_peaks,
            GRAD_ROWS=sizes.GRADIENT_BLOCK[0], GRAD_COLUMNS=sizes.GRADIENT_BLOCK[1], enable_fp_fusion=True,
        )  # fmt: skip

    def pack(
        self, x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, grad: Tensor | None = None
    ) -> Operands:
        """Both operands in tile order, and what all kernels know of them and of the gradient, if there is one."""
        allocate = x.new_zeros if self.need_peaks else x.new_empty
        stats = allocate(packing.PEAKS.value + 3 * (self.x.sets + self.y.sets), dtype=torch.float32)
        x_valid = x.new_empty(self.x.height, dtype=torch.int8) if self.masked else None
        y_valid = x.new_empty(self.y.height, dtype=torch.int8) if self.masked else None
        packed = x.new_empty(self.x.height, self.features), x.new_empty(self.y.height, self.features)
        self._pack(x, y, grad, x_mask, y_mask, *packed, x_valid, y_valid, stats)
        return Operands(*packed, x_valid, y_valid, stats)

    def forward(
        self, a: Operands, scores: Tensor | None, out: Tensor, alpha: float | Tensor, x: slice, y: slice
    ) -> None:
        """Similarities of rows x and columns y."""
        for config, launch in self.launches(kernels.forward_kernel, x, y):
            launch(*self.rows_of(a, config), scores, a.x_valid, a.y_valid, a.stats, out, alpha)

    def weights(
        self,
        a: Operands,
        scores: Tensor | None,
        grad: Tensor,
        chunk: Tensor | None,
        alpha_parts: Tensor | None,
        alpha: float | Tensor,
        x: slice,
        y: slice,
    ) -> None:
        """A chunk of W, of rows x and columns y, and sums over its parts for the gradient of alpha."""
        for config, launch in self.launches(kernels.weights_kernel, x, y):
            rows, target = self.rows_of(a, config), None if chunk is None else chunk_of(chunk, config)
            launch(*rows, scores, a.x_valid, a.y_valid, a.stats, grad, target, alpha_parts, alpha)

    def launches(self, kernel: Any, x: slice, y: slice) -> list[tuple[sizes.Config, _triton.Launch]]:
        """The launches of a kernel, always the same of a plan, for one chunk."""
        key = "chunk", x.start, x.stop, y.start, y.stop
        found: list[tuple[sizes.Config, _triton.Launch]] | None = self._launches.get(key)
        if found is None:
            found = self._launches[key] = [
                (config, self._launch(kernel, shifted, config, x, y)) for shifted, config in self.variants
            ]
        return found

    def _launch(self, kernel: Any, shifted: bool, config: sizes.Config, x: slice, y: slice) -> _triton.Launch:
        first = x.start // config.rows, y.start // config.columns
        tiles = (x.stop - x.start) // config.rows, (y.stop - y.start) // config.columns
        programs = math.prod(tiles)
        if config.flatten:  # the loop over tiles is pipelined
            programs = min(programs, self.programs * config.programs)
        numbers: tuple[int, ...] = *first, *tiles
        if kernel is kernels.weights_kernel:
            numbers = *self.strides, *first, *tiles, self.y.height // config.part
        numbers = self.N, self.M, self.features, self.x.sets, self.y.sets, *numbers
        return _triton.Launch(kernel, programs, numbers, SHIFTED=shifted, **self.constants, **config.launch())

    def rows_of(self, a: Operands, config: sizes.Config) -> tuple[Any, Any]:
        """The first arguments of every kernel that makes scores."""
        if self.stored:
            return None, None
        if not config.bulk:
            return a.x, a.y
        x = _triton.descriptor(a.x, a.x.shape, (config.rows, config.block_d))
        return x, _triton.descriptor(a.y, a.y.shape, (config.columns, config.block_d))

    def unpack(
        self,
        a: Operands,
        x_sum: Tensor | None,
        y_sum: Tensor | None,
        x_mask: Tensor | None,
        y_mask: Tensor | None,
        grad_x: Tensor | None,
        grad_y: Tensor | None,
        first: int,
        last: int,
    ) -> None:
        """Write sums in tile order, those of x of sets `first` to `last`, to the gradients; those that are not None."""
        last = min(last, self.N)
        key = "sums", x_sum is None, y_sum is None, first, last
        launch = self._launches.get(key)
        if launch is None:
            x_programs = 0 if x_sum is None else _triton.cdiv(max(0, last - first), self.x.block["SETS"])
            y_programs = 0 if y_sum is None else _triton.cdiv(self.M, self.y.block["SETS"])
            numbers = x_programs, first, last, self.M, *self.set_sizes, self.D, self.features, self.x.sets, self.y.sets
            launch = self._launches[key] = _triton.Launch(
                packing.unpack_kernel, x_programs + y_programs, (*numbers, *self.mask_strides),
                **self.layout, enable_fp_fusion=True,
            )  # fmt: skip
        if launch.programs and self.D:
            launch(x_sum, y_sum, x_mask, y_mask, a.stats, grad_x, grad_y)


_plan = functools.lru_cache(_triton.LAYOUTS)(Plan)


def chunk_of(chunk: Tensor, config: sizes.Config) -> Any:
    """A chunk of W as a kernel writes to it."""
    return _triton.descriptor(chunk, chunk.shape, (config.rows, config.part)) if config.bulk else chunk


def _place(count: int, slots: int, group: int, rows: int, features: int) -> Place:
    """For so many sets, padded to whole tiles of `rows` rows."""
    sets = _triton.cdiv(count * slots, rows) * rows // slots
    return Place(sets, slots, group, sizes.block(slots, features, rows // slots))
