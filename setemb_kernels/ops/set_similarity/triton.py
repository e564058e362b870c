"""Similarities of sets of any sizes on a GPU, in Triton: the host side. `triton_kernels` has the kernels, `reference`
the maths.

    forward     similarity_kernel   x, y -> similarity of each pair in one direction; both-way kinds: once each way
    backward    state_kernel        x, y -> for each row of a pair what its reduction gave; sums for d/dalpha, d/dbias
                gradient_kernel     x, y, grad, state -> dX, and once more with the sides swapped, dY

**Direction.** A similarity reduces each row of scores over the columns of the pair, then sums over rows. Chamfer and
smooth-Chamfer are two such similarities, the second with x and y swapped, and so are their gradients. Thus one set of
kernels, in which `a` has the rows and `b` the columns, serves all kinds; both-way ones make each product twice.

**A pair is a program**, which streams both sets through tiles of ROWS x COLUMNS scores; where there are few pairs, each
is split by rows over several programs whose sums are added in order. Pairs are taken down a band of sets of x before
the next set of y, so that both come from the cache. The price: a tile holds one pair, 16 x 16 at least, and sets of
fewer vectors leave the rest of it empty. (All pairs of small padded sets under smooth-Chamfer have an op of their own.)

**Backward.** No atomics: a program owns a block of rows of one set and adds up what all sets that it meets give, in
order. For that it needs, of the rows of each pair, the state: where the maximum was (4 bytes), or the maximum and the
sum of exponentials (8 bytes). Scores are made again; not for hard maxima, where dX is a gather and dY one product with
ones and zeros. State is held for as many sets at a time as `WORKSPACE_BYTES` allow: never of all scores, and with any
number of pairs. With R rows, C columns, P = 2 R C D flops for a product, soft reductions take 5 P a direction (state 1,
dX 2, dY 2) for D <= 128, and more where a block's features do not fit into registers: scores are then made again for
every 256 features. Storing weights would cost 3 P, but weights of ragged candidates have no plain layout.

**Nothing waits for the device.** How many blocks of rows there are depends on the offsets; the host launches as many as
there can be, ``X / OWN + N``, and the rest end at once. Which sets of x have a set of y as candidate: a stable sort.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from setemb_kernels import _device, _triton
from setemb_kernels.ops.set_similarity import triton_kernels as kernels

# --- tile sizes

WORKSPACE_BYTES = 256 << 20
"""What the state of as many sets as are processed at a time takes; one set with all others may need more."""

MOST_PROGRAMS = 1 << 30
"""Of one launch."""

PROGRAMS_EACH = 4
"""Programs for each multiprocessor, before a pair is no longer split."""

BAND = 32
"""Sets of x that share a set of y in the cache."""


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
        if kernel is kernels.gradient_kernel:
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
    """Rows of a tile: three sizes, so that little of a tile is empty and little is compiled."""
    return min(largest, max(16, _triton.next_power_of_two(mean)))


def _block_d(D: int, dtype: torch.dtype) -> tuple[int, bool]:
    """Features at a time, and whether these are all."""
    if dtype == torch.float32:  # whose products hold both operands in registers
        return 16, D <= 16
    if dtype.itemsize == 1:  # a product takes 32 of them at least
        return (max(32, _triton.next_power_of_two(D)), True) if D <= 256 else (128, False)
    return (max(16, _triton.next_power_of_two(D)), True) if D <= 128 else (64, False)


# --- directions


class _Direction(NamedTuple):
    """Rows of one side are reduced over the other's: how, and what the sum over rows is times."""

    swap: bool
    """Rows are of y."""
    how: int
    best: bool
    """Of all rows the largest alone counts."""
    mean: bool
    """Over the rows."""
    factor: float


def _directions(kind: str, mean: bool) -> list[_Direction]:
    hard, soft, sigmoid = kernels.HARD.value, kernels.SOFT.value, kernels.SIGMOID.value
    if kind in ("smooth_chamfer", "chamfer"):
        how = soft if kind == "smooth_chamfer" else hard
        return [_Direction(swap, how, False, True, 0.5) for swap in (False, True)]
    if kind == "match_probability":
        return [_Direction(False, sigmoid, False, False, 1.0)]
    return [_Direction(False, soft if kind == "soft_maxsim" else hard, kind == "max", mean, 1.0)]


class _Window(NamedTuple):
    """Pairs that are processed at a time: sets n of x, and j of y or of the candidates."""

    first_n: int
    first_j: int
    end_n: int
    end_j: int

    @property
    def pairs(self) -> int:
        return (self.end_n - self.first_n) * (self.end_j - self.first_j)


class _Side(NamedTuple):
    """Packed sets."""

    rows: Tensor
    offsets: Tensor
    scale: Tensor | None = None
    """Of codes, for each row."""

    @property
    def sets(self) -> int:
        return self.offsets.shape[0] - 1

    @property
    def mean(self) -> int:
        """Vectors of a set in the mean."""
        return _triton.cdiv(self.rows.shape[0], max(1, self.sets))


# --- host


def forward(
    x: Tensor,
    x_offsets: Tensor,
    y: Tensor,
    y_offsets: Tensor,
    candidates: Tensor | None,
    alpha: Tensor,
    bias: Tensor,
    kind: str,
    mean: bool,
    wide: bool = False,
) -> Tensor:
    """The similarity ``[N, M]`` or ``[N, C]``, in the dtype of x or, if `wide`, in float32. See `op.set_similarity`.

    Memory beyond inputs and output: a float32 for each pair, two for both-way kinds.
    """
    call = _Call(x, x_offsets, y, y_offsets, candidates, alpha, bias)
    return _forward(call, kind, mean, torch.float32 if wide else x.dtype)


def forward_of_codes(
    x: Tensor,
    x_scale: Tensor | None,
    x_offsets: Tensor,
    y: Tensor,
    y_scale: Tensor | None,
    y_offsets: Tensor,
    candidates: Tensor | None,
    alpha: Tensor,
    bias: Tensor,
    kind: str,
    mean: bool,
) -> Tensor:
    """The same in float32 of int8 or float8 codes, one dtype on both sides, with their scales; see `codes`."""
    call = _Call(x, x_offsets, y, y_offsets, candidates, alpha, bias, x_scale, y_scale)
    return _forward(call, kind, mean, torch.float32)


def _forward(call: _Call, kind: str, mean: bool, dtype: torch.dtype) -> Tensor:
    if call.is_empty:
        s = call.x.rows.new_zeros(call.N, call.J, dtype=dtype)
    else:
        with torch.cuda.device_of(call.x.rows):
            parts = call.similarities(_directions(kind, mean))
            s = parts[0] if len(parts) == 1 else parts.amax(0) if kind == "max" else parts.sum(0)
            limit = torch.finfo(dtype).max
            s = s.clamp_(-limit, limit).to(dtype)
    return s if call.candidates is None else s.masked_fill_(call.candidates < 0, -math.inf)


def backward(
    grad: Tensor,
    x: Tensor,
    x_offsets: Tensor,
    y: Tensor,
    y_offsets: Tensor,
    candidates: Tensor | None,
    alpha: Tensor,
    bias: Tensor,
    kind: str,
    mean: bool,
    need_x: bool,
    need_y: bool,
    need_alpha: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for x, y, alpha and bias from the upstream ``grad [N, M]`` or ``[N, C]``; one that is not needed comes
    back empty ``[0]``.

    Memory beyond inputs and outputs: `WORKSPACE_BYTES`, and float32 sums of 16-bit gradients where those are made by
    more than one launch; and for few sets some partial sums.
    """
    call = _Call(x, x_offsets, y, y_offsets, candidates, alpha, bias)
    directions = _directions(kind, mean)
    sums = x.new_zeros(2, dtype=torch.float64)  # for alpha and bias
    hard = directions[0].how == kernels.HARD.value
    need_sums = (need_alpha or need_bias) and not hard
    grad_x, grad_y = x.new_zeros(x.shape if need_x else 0), y.new_zeros(y.shape if need_y else 0)
    if not call.is_empty and (need_x or need_y or need_sums):
        with torch.cuda.device_of(x):
            steps = [(direction, window) for direction in directions for window in call.windows(direction)]
            owners = [
                _Owner(call, is_x, out, len(steps))
                for is_x, need, out in ((True, need_x, grad_x), (False, need_y, grad_y))
                if need
            ]
            for direction, window in steps:
                state = call.state(direction, window, grad, sums, bool(owners), need_sums)
                for owner in owners:
                    owner.add(direction, window, grad, state)
            for owner in owners:
                owner.finish()
    by_alpha, by_bias = sums.unbind()
    if kind in ("smooth_chamfer", "soft_maxsim"):  # so far a sum of entropies in bits
        sharpness: Any = float(alpha) if _on_host(alpha) else alpha.double()
        by_alpha = by_alpha * -math.log(2) / sharpness / sharpness
    return (
        grad_x,
        grad_y,
        by_alpha.to(alpha.device, alpha.dtype) if need_alpha else alpha.new_empty(0),
        by_bias.to(bias.device, bias.dtype) if need_bias else bias.new_empty(0),
    )


def _on_host(v: Tensor) -> bool:
    """Whether v can be read without waiting for a device."""
    return v.device.type == "cpu"


def _argument(v: Tensor) -> float | Tensor:
    """A scalar as a kernel takes it, within the range of float32."""
    largest = torch.finfo(torch.float32).max
    return min(max(float(v), -largest), largest) if _on_host(v) else v


class _Call:
    """What the launches of one call share."""

    def __init__(
        self,
        x: Tensor,
        x_offsets: Tensor,
        y: Tensor,
        y_offsets: Tensor,
        candidates: Tensor | None,
        alpha: Tensor,
        bias: Tensor,
        x_scale: Tensor | None = None,
        y_scale: Tensor | None = None,
    ) -> None:
        self.x, self.y = (
            _Side(v, offsets.contiguous(), None if scale is None else scale.contiguous())
            for v, offsets, scale in ((x, x_offsets, x_scale), (y, y_offsets, y_scale))
        )
        self.candidates = None if candidates is None else candidates.contiguous()
        self.N = self.x.sets
        self.J = self.y.sets if candidates is None else candidates.shape[1]
        self.D = x.shape[1]
        self.is_empty = 0 in (self.N, self.J, self.y.sets)
        self.programs = PROGRAMS_EACH * _device.processors(x)[0]
        self.sharpness = _argument(alpha), _argument(bias)
        self.constants = {
            "ALPHA_ON_DEVICE": not _on_host(alpha),
            "BIAS_ON_DEVICE": not _on_host(bias),
            "PRECISION": _device.precision(),
        }

    def _pairs_launch(self, direction: _Direction) -> tuple[tuple[_Side, _Side], Config, dict[str, Any]]:
        """Sides `a` and `b`, tile sizes and constants of the kernels with a program for each pair."""
        a, b = (self.y, self.x) if direction.swap else (self.x, self.y)
        config = pair_config(a.mean, b.mean, self.D, a.rows.dtype)
        constants = {"SWAP": direction.swap, "HOW": direction.how, "BEST": direction.best, "MEAN": direction.mean}
        return (a, b), config, constants | self.constants | {"BAND": BAND if self.candidates is None else 1}

    def _splits(self, pairs: int, a: _Side, config: Config) -> int:
        """Over how many programs the rows of a pair are split."""
        return max(1, min(_triton.cdiv(self.programs, pairs), _triton.cdiv(a.rows.shape[0], config.rows)))

    def similarities(self, directions: list[_Direction]) -> Tensor:
        """Parts of the similarities ``[parts, N, J]`` float32, to be added (of the largest row: to be compared)."""
        launches = [(direction, *self._pairs_launch(direction)) for direction in directions]
        splits = [self._splits(self.N * self.J, sides[0], config) for _, sides, config, _ in launches]
        parts = self.x.rows.new_empty(sum(splits), self.N, self.J, dtype=torch.float32)
        for own, count, (direction, (a, b), config, constants) in zip(
            parts.split(splits), splits, launches, strict=True
        ):
            step = max(1, MOST_PROGRAMS // (self.J * count))
            for first in range(0, self.N, step):
                sets = min(step, self.N - first)
                _triton.launch(
                    kernels.similarity_kernel, sets * self.J * count,
                    (
                        a.rows, b.rows, a.offsets, b.offsets, self.candidates, a.scale, b.scale, own,
                        *self.sharpness, direction.factor, self.J, first, sets, self.J, self.N * self.J, count, self.D,
                        *a.rows.stride(), *b.rows.stride(),
                    ),
                    **constants, **config.launch(kernels.similarity_kernel),
                )  # fmt: skip
        return parts

    def windows(self, direction: _Direction) -> Iterator[_Window]:
        """All pairs, so many sets at a time that their state fits into `WORKSPACE_BYTES`."""
        (a, _), *_ = self._pairs_launch(direction)
        along_n = direction.swap or direction.how == kernels.SIGMOID.value
        each = 4 if direction.how == kernels.HARD.value else 8
        rows = self.J if direction.how == kernels.SIGMOID.value else a.rows.shape[0]
        sets = self.N if along_n else self.J
        most = max(1, WORKSPACE_BYTES // (each * max(rows, a.sets, self.J)))
        for first in range(0, sets, most):
            end = min(sets, first + most)
            yield _Window(first, 0, end, self.J) if along_n else _Window(0, first, self.N, end)

    def state(
        self, direction: _Direction, window: _Window, grad: Tensor, sums: Tensor, store: bool, need_sums: bool
    ) -> Tensor:
        """The state ``[1 or 2, sets, rows of a]`` of the pairs of a window, and their part added to `sums`."""
        (a, b), config, constants = self._pairs_launch(direction)
        is_hard = direction.how == kernels.HARD.value
        store = store and direction.how != kernels.SIGMOID.value
        width = window.end_n - window.first_n if direction.swap else window.end_j - window.first_j
        rows = a.rows.shape[0]
        state = a.rows.new_empty(
            (1 if is_hard else 2, width, rows) if store else (1, 1, 1),
            dtype=torch.int32 if is_hard else torch.float32,
        )
        if direction.best:
            state.fill_(kernels.NONE.value)
        if not (store or need_sums):
            return state
        splits = 1 if direction.best else self._splits(window.pairs, a, config)
        programs = window.pairs * splits
        parts = a.rows.new_empty((2 if direction.how == kernels.SIGMOID.value else 1, programs), dtype=torch.float32)
        _triton.launch(
            kernels.state_kernel, programs,
            (
                a.rows, b.rows, a.offsets, b.offsets, self.candidates, grad, state, parts,
                *self.sharpness, direction.factor, rows, self.J, window.first_n, window.first_j,
                window.end_n - window.first_n, window.end_j - window.first_j, splits, width * rows, self.D,
                *a.rows.stride(), *b.rows.stride(), *grad.stride(),
            ),
            STORE=store, SUM=need_sums, **constants, **config.launch(kernels.state_kernel),
        )  # fmt: skip
        if need_sums:
            sums[: len(parts)] += parts.sum(1, dtype=torch.float64)
        return state


class _Owner:
    """The gradient of one side, to which each direction and window adds its part."""

    def __init__(self, call: _Call, is_x: bool, out: Tensor, steps: int) -> None:
        self.call, self.is_x, self.out = call, is_x, out
        self.own, self.other = (call.x, call.y) if is_x else (call.y, call.x)
        self.config = gradient_config(self.own.mean, self.other.mean, call.D, out.dtype)
        rows = self.config.rows
        self.blocks = out.shape[0] // rows + self.own.sets  # there cannot be more
        self.block_ends = torch.div(self.own.offsets.diff() + (rows - 1), rows, rounding_mode="floor").cumsum(0)
        numbers = torch.arange(self.blocks, device=out.device)
        self.block_sets = torch.searchsorted(self.block_ends, numbers, right=True)
        self.order = self.bounds = None
        meets = call.J if is_x else call.N
        if not is_x and call.candidates is not None:
            chosen, self.order = call.candidates.flatten().sort(stable=True)
            self.bounds = torch.searchsorted(chosen, torch.arange(self.own.sets + 1, device=out.device))
            meets = chosen.shape[0]
        self.feature_blocks = _triton.cdiv(call.D, self.config.features)
        wanted = _triton.cdiv(call.programs, max(1, self.blocks * self.feature_blocks))
        self.splits = max(1, min(wanted, meets))
        self.is_direct = steps == 1 and self.splits == 1
        self.sums = out if self.is_direct else out.new_zeros(self.splits, *out.shape, dtype=torch.float32)

    def add(self, direction: _Direction, window: _Window, grad: Tensor, state: Tensor) -> None:
        call, own, other = self.call, self.own, self.other
        if 0 in self.out.shape:
            return
        _triton.launch(
            kernels.gradient_kernel, self.blocks * self.feature_blocks * self.splits,
            (
                own.rows, other.rows, own.offsets, other.offsets, self.block_sets, self.block_ends,
                call.candidates, self.order, self.bounds, grad, state, self.sums, *call.sharpness, direction.factor,
                own.rows.shape[0], own.sets, state.shape[2], call.J, *window, self.splits,
                state.shape[1] * state.shape[2], self.blocks, call.D,
                *own.rows.stride(), *other.rows.stride(), *grad.stride(),
            ),
            OWN_IS_X=self.is_x, OWN_IS_A=self.is_x != direction.swap, HOW=direction.how, MEAN=direction.mean,
            ADD=not self.is_direct, FACTOR=2.0**15 if own.rows.dtype == torch.float16 else 1.0,
            **call.constants, **self.config.launch(kernels.gradient_kernel),
        )  # fmt: skip

    def finish(self) -> None:
        if not self.is_direct:
            self.out.copy_(self.sums[0] if self.splits == 1 else self.sums.sum(0))


# --- ahead of time


def configs_of_codes(
    kind: str, x_mean: int, y_mean: int, D: int, dtype: torch.dtype, scaled: bool
) -> Iterator[_triton.Build]:
    """The kernel that `forward_of_codes` launches, in one direction."""
    direction = _directions(kind, False)[0]
    types = dict.fromkeys(("a", "b"), f"*{_triton.NAMES[dtype]}") | dict.fromkeys(("a_offsets", "b_offsets"), "*i64")
    types |= dict.fromkeys(("parts", "a_scale", "b_scale"), "*fp32") | dict.fromkeys(
        ("alpha", "bias", "factor"), "fp32"
    )
    constants: dict[str, Any] = {"HOW": direction.how, "MEAN": direction.mean, "BEST": direction.best, "SWAP": False}
    constants |= {"PRECISION": "ieee", "ALPHA_ON_DEVICE": False, "BIAS_ON_DEVICE": False, "BAND": BAND}
    constants |= {"a_stride_d": 1, "b_stride_d": 1, "candidates": None}
    if not scaled:
        constants |= {"a_scale": None, "b_scale": None}
    launch = pair_config(x_mean, y_mean, D, dtype).launch(kernels.similarity_kernel)
    yield _triton.build(kernels.similarity_kernel, types, constants, launch, {"D", "a_stride", "b_stride"}, True)


def configs(
    kind: str, x_mean: int, y_mean: int, D: int, dtype: torch.dtype, has_candidates: bool = False, add: bool = False
) -> Iterator[_triton.Build]:
    """Every kernel that forward and backward launch for sets of so many vectors in the mean, in one direction, with
    gradients for alpha and bias. add: to sums of float32, as where there are several windows."""
    direction = _directions(kind, False)[0]
    hard = direction.how == kernels.HARD.value
    name = _triton.NAMES[dtype]
    types = dict.fromkeys(("a", "b", "own", "other", "grad", "out"), f"*{name}")
    types |= dict.fromkeys(("a_offsets", "b_offsets", "own_offsets", "other_offsets"), "*i64")
    types |= dict.fromkeys(("block_sets", "block_ends", "candidates", "order", "bounds"), "*i64")
    types |= dict.fromkeys(("parts", "sums"), "*fp32")
    types |= dict.fromkeys(("alpha", "bias", "factor"), "fp32") | {"state": "*i32" if hard else "*fp32"}
    if add:
        types["out"] = "*fp32"
    constants: dict[str, Any] = {"HOW": direction.how, "MEAN": direction.mean, "BEST": direction.best, "SWAP": False}
    constants |= {
        "PRECISION": "ieee",
        "ALPHA_ON_DEVICE": False,
        "BIAS_ON_DEVICE": False,
        "BAND": 1 if has_candidates else BAND,
    }
    constants |= {"STORE": direction.how != kernels.SIGMOID.value, "SUM": not hard, "ADD": add}
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
    factor = 2.0**15 if dtype == torch.float16 else 1.0
    for is_x, own, other in ((True, x_mean, y_mean), (False, y_mean, x_mean)):
        none = {} if is_x or not has_candidates else {"candidates": None}
        config = gradient_config(own, other, D, dtype)
        yield build(
            kernels.gradient_kernel, config, products and not (hard and is_x),
            OWN_IS_X=is_x, OWN_IS_A=is_x, FACTOR=factor, **none,
        )  # fmt: skip
