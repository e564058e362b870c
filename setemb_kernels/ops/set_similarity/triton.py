"""Similarities of sets of any sizes on a GPU, in Triton: the host side. `triton_kernels` and `triton_gradient_kernels`
have the kernels, `reference` the maths.

    forward     similarity_kernel   x, y -> similarity of each pair in one direction; both-way kinds: once each way
                combine_kernel      parts -> similarity: of both-way kinds, and where a pair is split
    backward    state_kernel        x, y -> for each row of a pair what its reduction gave; sums for d/dalpha, d/dbias
                gradient_kernel     x, y, grad, state -> dX, and once more with the sides swapped, dY
                combine_kernel      parts -> dX, dY: where there are several, or launches add to a sum in float32

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
ones and zeros. State is held for as many sets at a time as `LIMITS` allow: never of all scores, and with any
number of pairs. With R rows, C columns, P = 2 R C D flops for a product, soft reductions take 5 P a direction (state 1,
dX 2, dY 2) for D <= 128, and more where a block's features do not fit into registers: scores are then made again for
every 256 features. Storing weights would cost 3 P, but weights of ragged candidates have no plain layout.

**Nothing waits for the device.** How many blocks of rows there are depends on the offsets; the host launches as many as
there can be, ``X / OWN + N``, and the rest end at once. Whose a block is, its number says (`_owner`). Rows of no set
have blocks too: nothing is filled with zeros first. Which sets of x have a set of y as candidate: a stable sort.

**A small call is bound by the host**: `triton_plan` keeps the launches of calls of one layout.

**Other lengths** are compiled for once where sets of a side have up to 16, up to 32, or more vectors in the mean, and
the gradient kernel once more where it adds to what another launch left (state in several windows), or writes float32
(several launches or splits, in 16 bits). All else of lengths and numbers of sets is a number at run time. `precompile`
compiles all of that beforehand.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from setemb_kernels import _device
from setemb_kernels.ops.set_similarity import triton_config as sizes
from setemb_kernels.ops.set_similarity import triton_kernels as kernels
from setemb_kernels.ops.set_similarity import triton_plan as plans
from setemb_kernels.ops.set_similarity.triton_config import configs, configs_of_codes

__all__ = ["backward", "configs", "configs_of_codes", "forward", "forward_of_codes"]


class _Side(NamedTuple):
    """Packed sets."""

    rows: Tensor
    offsets: Tensor
    scale: Tensor | None = None
    """Of codes, for each row."""

    @property
    def layout(self) -> plans.Side:
        strides = self.rows.stride()
        return plans.Side(self.rows.shape[0], self.offsets.shape[0] - 1, strides, self.scale is not None)


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
    plan = call.plan(kind, mean, out=dtype)
    out = call.x.rows.new_empty(plan.N, plan.J, dtype=dtype)
    if plan.is_empty:
        out.zero_()
        return out if call.candidates is None else out.masked_fill_(call.candidates < 0, -math.inf)
    with torch.cuda.device_of(out):
        several = plan.all_parts > 1
        shape = (plan.all_parts, *out.shape) if several else (1,)  # else nothing is written to it
        parts = out.new_empty(shape, dtype=torch.float32)
        for swap, launch in plans.similarity_launches(plan):
            a, b = (call.y, call.x) if swap else (call.x, call.y)
            launch(
                a.rows, b.rows, a.offsets, b.offsets, call.candidates, a.scale, b.scale, out, parts, *call.sharpness
            )  # fmt: skip
        if several:
            plans.combine(parts, out, call.candidates, plan.directions[0].best, plan.limit)
    return out


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

    Memory beyond inputs and outputs: `triton_config.LIMITS`, and float32 sums of 16-bit gradients where those are made
    by more than one launch; and for few sets some partial sums.
    """
    call = _Call(x, x_offsets, y, y_offsets, candidates, alpha, bias)
    need_sums = (need_alpha or need_bias) and kind in ("smooth_chamfer", "soft_maxsim", "match_probability")
    plan = call.plan(kind, mean, grad=grad, needs=(need_x, need_y, need_sums))
    sums = None
    if not any(plan.layout.needs) or plan.is_empty:
        grad_x, grad_y = x.new_zeros(x.shape if need_x else 0), y.new_zeros(y.shape if need_y else 0)
    else:
        with torch.cuda.device_of(x):
            owners = [_Owner(call, plan, is_x) for is_x, need in ((True, need_x), (False, need_y)) if need]
            for step in range(len(plan.steps)):
                state, part = call.state(plan, step, grad)
                if part is not None:
                    sums = part if sums is None else sums + part
                for owner in owners:
                    owner.add(step, grad, state)
            found = iter([owner.finish() for owner in owners])
        grad_x, grad_y = (next(found) if need else x.new_empty(0) for need in (need_x, need_y))
    by_alpha = by_bias = None
    if sums is not None:
        by_alpha = sums[0]
        if kind == "match_probability":
            by_bias = sums[1]
        else:  # so far a sum of entropies in bits
            sharpness: Any = float(alpha) if _on_host(alpha) else alpha.double()
            by_alpha = by_alpha * (-math.log(2) / sharpness / sharpness)
    return grad_x, grad_y, _of_number(alpha, by_alpha, need_alpha), _of_number(bias, by_bias, need_bias)


def _of_number(v: Tensor, gradient: Tensor | None, need: bool) -> Tensor:
    if not need:
        return v.new_empty(0)
    return v.new_zeros(()) if gradient is None else gradient.to(v.device, v.dtype)


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
        self.sharpness = _argument(alpha), _argument(bias)

    def plan(
        self,
        kind: str,
        mean: bool,
        *,
        out: torch.dtype | None = None,
        grad: Tensor | None = None,
        needs: tuple[bool, ...] = (),
    ) -> plans.Plan:
        """Of a forward call, whose result has dtype `out`, or of a backward call, with the upstream gradient."""
        x = self.x.rows
        alpha, bias = (v.dtype if isinstance(v, Tensor) else None for v in self.sharpness)
        layout = plans.Layout(
            self.x.layout, self.y.layout, None if self.candidates is None else self.candidates.shape[1], x.shape[1],
            x.dtype, x.device, _device.processors(x)[0], _device.precision(), alpha, bias, kind, mean,
            sizes.LIMITS, out, None if grad is None else grad.dtype, () if grad is None else grad.stride(), needs,
        )  # fmt: skip
        return plans.plan_of(layout)

    def state(self, plan: plans.Plan, step: int, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The state ``[1 or 2, sets, rows of a]`` of the pairs of a window, and their part ``[1 or 2]`` of the sums for
        alpha and bias; None of what nobody needs."""
        direction, window = plan.steps[step]
        need_x, need_y, need_sums = plan.layout.needs
        store = (need_x or need_y) and direction.how != kernels.SIGMOID.value
        if not (store or need_sums):
            return None, None
        a, b = (self.y, self.x) if direction.swap else (self.x, self.y)
        state = sums = None
        if store:
            dtype = torch.int32 if direction.how == kernels.HARD.value else torch.float32
            state = a.rows.new_empty(plan.state_shape(step), dtype=dtype)
            if direction.best:
                state.fill_(kernels.NONE.value)
        if need_sums:
            shape = 2 if direction.how == kernels.SIGMOID.value else 1, window.pairs * plan.state_splits(step)
            sums = a.rows.new_empty(shape, dtype=torch.float32)
        plans.state_launch(plan, step)(
            a.rows, b.rows, a.offsets, b.offsets, self.candidates, grad, state, sums, *self.sharpness
        )
        return state, None if sums is None else sums.sum(1, dtype=torch.float64)


class _Owner:
    """The gradient of one side, to which each direction and window adds its part."""

    def __init__(self, call: _Call, plan: plans.Plan, is_x: bool) -> None:
        self.call, self.plan, self.is_x = call, plan, is_x
        self.own, self.other = (call.x, call.y) if is_x else (call.y, call.x)
        owner = plan.owners[not is_x]
        rows = self.own.rows
        self.is_empty = not rows.numel()
        self.order = self.bounds = None
        if not is_x and call.candidates is not None:
            chosen, self.order = call.candidates.flatten().sort(stable=True)
            self.bounds = torch.searchsorted(chosen, torch.arange(plan.layout.y.sets + 1, device=rows.device))
        shape = rows.shape if owner.is_direct else (owner.splits, *rows.shape)
        new = rows.new_zeros if owner.starts_at_zero else rows.new_empty
        self.is_direct = owner.is_direct
        self.sums = new(shape, dtype=rows.dtype if owner.is_direct else torch.float32)

    def add(self, step: int, grad: Tensor, state: Tensor | None) -> None:
        call, own, other = self.call, self.own, self.other
        if not self.is_empty:
            plans.gradient_launch(self.plan, step, self.is_x)(
                own.rows, other.rows, own.offsets, other.offsets, call.candidates, self.order, self.bounds, grad, state,
                self.sums, *call.sharpness,
            )  # fmt: skip

    def finish(self) -> Tensor:
        """In the dtype of the rows."""
        if self.is_direct:
            return self.sums
        out = self.own.rows.new_empty(self.own.rows.shape)
        if not self.is_empty:
            plans.combine(self.sums, out)
        return out
