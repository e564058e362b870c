"""Set similarities on a GPU, in Triton: launches of calls of one layout, kept; a small call is bound by the host."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from setemb_kernels import _triton
from setemb_kernels.ops.set_similarity import triton_config as sizes
from setemb_kernels.ops.set_similarity import triton_kernels as kernels
from setemb_kernels.ops.set_similarity.triton_gradient_kernels import gradient_kernel


class Side(NamedTuple):
    """Packed sets, but for where they lie."""

    rows: int
    sets: int
    strides: tuple[int, ...]
    scaled: bool
    """Codes with scales."""

    @property
    def mean(self) -> int:
        """Vectors of a set in the mean."""
        return _triton.cdiv(self.rows, max(1, self.sets))


class Layout(NamedTuple):
    """Of a call all that its launches depend on, but for where tensors lie."""

    x: Side
    y: Side
    candidates: int | None
    """For each set of x."""
    features: int
    dtype: torch.dtype
    device: torch.device
    processors: int
    precision: str
    alpha: torch.dtype | None
    """Of one on the device; None: a number."""
    bias: torch.dtype | None
    kind: str
    mean: bool
    limits: sizes.Limits
    out: torch.dtype | None = None
    """Of the result of a forward call."""
    grad: torch.dtype | None = None
    """Of the upstream gradient of a backward call."""
    grad_strides: tuple[int, ...] = ()
    needs: tuple[bool, ...] = ()
    """Of a backward call: gradients for x and for y, sums for those of alpha and bias."""


class Window(NamedTuple):
    """Pairs that are processed at a time: sets n of x, and j of y or of the candidates."""

    first_n: int
    first_j: int
    end_n: int
    end_j: int

    @property
    def pairs(self) -> int:
        return (self.end_n - self.first_n) * (self.end_j - self.first_j)


class Owner(NamedTuple):
    """How the gradient of one side is made."""

    config: sizes.Config
    blocks: int
    """Of rows."""
    splits: int
    """Over how many programs the pairs of a block are split."""
    programs: int
    is_direct: bool
    """Launches write to the result, else to sums of float32."""
    starts_at_zero: bool
    """The first launch does not write to all rows: every one adds."""


class Plan:
    """What the launches of a layout share."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.N, self.J = layout.x.sets, layout.y.sets if layout.candidates is None else layout.candidates
        self.is_empty = 0 in (self.N, self.J, layout.y.sets)
        self.directions = sizes.directions(layout.kind, layout.mean)
        self.programs = layout.limits.programs_each * layout.processors
        self.limit = None if layout.out is None else torch.finfo(layout.out).max
        """Of the result of a forward call."""
        self.constants = {
            "ALPHA_ON_DEVICE": layout.alpha is not None,
            "BIAS_ON_DEVICE": layout.bias is not None,
            "PRECISION": layout.precision,
        }
        counts = [] if self.is_empty else [self.splits(self.N * self.J, d) for d in self.directions]
        self.all_parts = sum(counts)
        """Of a similarity: for each direction, of each split of a pair's rows."""
        self.steps: list[tuple[sizes.Direction, Window]] = []
        if layout.needs and not self.is_empty:
            self.steps = [(direction, window) for direction in self.directions for window in self._windows(direction)]
        self.owners = [self._owner(is_x) for is_x in (True, False)] if self.steps else []
        """Of x and of y."""

    def sides(self, direction: sizes.Direction) -> tuple[Side, Side]:
        """`a` and `b`."""
        x, y = self.layout.x, self.layout.y
        return (y, x) if direction.swap else (x, y)

    def pair_config(self, direction: sizes.Direction) -> sizes.Config:
        a, b = self.sides(direction)
        return sizes.pair_config(a.mean, b.mean, self.layout.features, self.layout.dtype)

    def pair_constants(self, direction: sizes.Direction, kernel: Any) -> dict[str, Any]:
        """Of a kernel with a program for each pair."""
        constants = {"SWAP": direction.swap, "HOW": direction.how, "BEST": direction.best, "MEAN": direction.mean}
        constants["BAND"] = self.layout.limits.band if self.layout.candidates is None else 1
        return constants | self.constants | self.pair_config(direction).launch(kernel)

    def splits(self, pairs: int, direction: sizes.Direction) -> int:
        """Over how many programs the rows of a pair are split."""
        rows = self.sides(direction)[0].rows
        return max(1, min(_triton.cdiv(self.programs, pairs), _triton.cdiv(rows, self.pair_config(direction).rows)))

    def _windows(self, direction: sizes.Direction) -> Iterator[Window]:
        """All pairs, so many sets at a time that their state fits into the workspace."""
        a, _ = self.sides(direction)
        along_n = direction.swap or direction.how == kernels.SIGMOID.value
        each = 4 if direction.how == kernels.HARD.value else 8
        rows = self.J if direction.how == kernels.SIGMOID.value else a.rows
        sets = self.N if along_n else self.J
        most = max(1, self.layout.limits.workspace_bytes // (each * max(rows, a.sets, self.J)))
        for first in range(0, sets, most):
            end = min(sets, first + most)
            yield Window(first, 0, end, self.J) if along_n else Window(0, first, self.N, end)

    def _owner(self, is_x: bool) -> Owner:
        layout = self.layout
        own, other = (layout.x, layout.y) if is_x else (layout.y, layout.x)
        config = sizes.gradient_config(own.mean, other.mean, layout.features, layout.dtype)
        blocks = own.rows // config.rows + own.sets  # there cannot be more
        meets = self.J if is_x else self.N if layout.candidates is None else self.N * self.J
        features = _triton.cdiv(layout.features, config.features)
        splits = max(1, min(_triton.cdiv(self.programs, max(1, blocks * features)), meets))
        blocks += 1  # of rows of no set
        return Owner(
            config, blocks, splits, blocks * features * splits,
            is_direct=splits == 1 and (len(self.steps) == 1 or layout.dtype == torch.float32),
            starts_at_zero=self.steps[0][1].pairs < self.N * self.J,
        )  # fmt: skip

    def state_shape(self, step: int) -> tuple[int, int, int]:
        """Planes, sets, rows of a."""
        direction, window = self.steps[step]
        width = window.end_n - window.first_n if direction.swap else window.end_j - window.first_j
        return 1 if direction.how == kernels.HARD.value else 2, width, self.sides(direction)[0].rows

    def state_splits(self, step: int) -> int:
        direction, window = self.steps[step]
        return 1 if direction.best else self.splits(window.pairs, direction)


@functools.lru_cache(_triton.LAYOUTS)
def plan_of(layout: Layout) -> Plan:
    return Plan(layout)


# --- launches: kept beside the plan, as a call may have any number of windows


@functools.lru_cache(_triton.LAYOUTS)
def similarity_launches(plan: Plan) -> list[tuple[bool, _triton.Launch]]:
    """Of a forward call, each with whether its rows are of y."""
    layout, launches, first_part = plan.layout, [], 0
    for direction in plan.directions:
        a, b = plan.sides(direction)
        splits = plan.splits(plan.N * plan.J, direction)
        step = max(1, layout.limits.programs // (plan.J * splits))
        for first in range(0, plan.N, step):
            sets = min(step, plan.N - first)
            launch = _triton.Launch(
                kernels.similarity_kernel, sets * plan.J * splits,
                (
                    direction.factor, plan.J, first, sets, plan.J, plan.N * plan.J, splits, first_part, plan.all_parts,
                    layout.features, *a.strides, *b.strides,
                ),
                LIMIT=plan.limit, **plan.pair_constants(direction, kernels.similarity_kernel),
            )  # fmt: skip
            launches.append((direction.swap, launch))
        first_part += splits
    return launches


@functools.lru_cache(_triton.LAYOUTS)
def state_launch(plan: Plan, step: int) -> _triton.Launch:
    layout, (direction, window) = plan.layout, plan.steps[step]
    a, b = plan.sides(direction)
    need_x, need_y, need_sums = layout.needs
    splits = plan.state_splits(step)
    _, width, rows = plan.state_shape(step)
    return _triton.Launch(
        kernels.state_kernel, window.pairs * splits,
        (
            direction.factor, rows, plan.J, window.first_n, window.first_j,
            window.end_n - window.first_n, window.end_j - window.first_j, splits, width * rows, layout.features,
            *a.strides, *b.strides, *layout.grad_strides,
        ),
        STORE=(need_x or need_y) and direction.how != kernels.SIGMOID.value, SUM=need_sums,
        **plan.pair_constants(direction, kernels.state_kernel),
    )  # fmt: skip


@functools.lru_cache(_triton.LAYOUTS)
def gradient_launch(plan: Plan, step: int, is_x: bool) -> _triton.Launch:
    layout, (direction, window) = plan.layout, plan.steps[step]
    own, other = (layout.x, layout.y) if is_x else (layout.y, layout.x)
    owner = plan.owners[not is_x]
    _, width, rows = plan.state_shape(step)
    return _triton.Launch(
        gradient_kernel, owner.programs,
        (
            direction.factor, own.rows, own.sets, rows, plan.J, *window, owner.splits, width * rows, owner.blocks,
            layout.features, *own.strides, *other.strides, *layout.grad_strides,
        ),
        OWN_IS_X=is_x, OWN_IS_A=is_x != direction.swap, HOW=direction.how, MEAN=direction.mean,
        ADD=step > 0 or owner.starts_at_zero, FACTOR=2.0**15 if layout.dtype == torch.float16 else 1.0,
        **plan.constants, **owner.config.launch(gradient_kernel),
    )  # fmt: skip


def combine(
    parts: Tensor, out: Tensor, candidates: Tensor | None = None, best: bool = False, limit: float | None = None
) -> None:
    """Fill out ``[...]`` with the sum, or the largest, of parts ``[all, ...]``; see `combine_kernel`."""
    kinds = out.dtype, out.device, candidates is None
    _combine_launch(out.numel(), parts.shape[0], best, limit, kinds)(parts, candidates, out)


@functools.lru_cache(_triton.LAYOUTS)
def _combine_launch(count: int, parts: int, best: bool, limit: float | None, kinds: Any) -> _triton.Launch:
    """For tensors of such kinds alone."""
    return _triton.Launch(
        kernels.combine_kernel, _triton.cdiv(count, sizes.COMBINE), (count, parts),
        BEST=best, LIMIT=limit, BLOCK=sizes.COMBINE,
    )  # fmt: skip
