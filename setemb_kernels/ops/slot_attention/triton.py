"""Slot attention on a GPU, in Triton: the host side. `triton_kernels` has the kernels, `reference` the maths.

Where the sums over tokens fit in registers, or all tokens in a tile, `triton_fused` serves, which reads each token once
(in 16 bits; up to 32 slots that share keys, and 512 features of 16 slots, or 64 tokens). Else:

    forward     weights_kernel           q, k -> W ``[B, H, K, T]`` and its sums over blocks of tokens
                gather_kernel            W, v -> out, total
    backward    delta_kernel             grad, out -> grad . out
                logit_gradients_kernel   q, k, grad, v -> W / total, dz ``[B, H, K, T]``, sums of dz (for the bias)
                gather_kernel            dz, k -> dq
                spread_kernel            dz, q -> dk, and W / total, grad -> dv

Where a gather would have too few programs, each takes a part of the tokens and combine_kernel adds up.

**Why W passes through memory**, if only for a few items at a time (`WORKSPACE_BYTES`, which an L2 cache holds). All
this is bound by memory: k and v are read once, and an element takes part in as many products as there are rows (slots
of all heads that share keys), 4 to 64 as a rule; tensor cores want hundreds. R rows of W, written and read in 16 bits,
add 4 R bytes to the 2 (Dk + Dv) of a token: 1.6 % where 16 slots share D = 1024, 6 % for 8 slots of a head with
D = 128; and mostly from the cache.

  (a) One fused kernel saves that, launches, and reading k again for dq: `triton_fused`. But it needs the sums
      ``[R, Dv]`` of all features in registers, 64 KiB for 16 rows of D = 1024, and takes blocks of v with all their
      features at a time, which no copy can run ahead of; for more rows, features have to be split and the logits made
      again for each part. In the backward pass, dk of heads that do not fit in one tile has to be added up by one
      launch after the other.
  (b) Two kernels are products with a plain loop each, over features and over tokens, which the compiler pipelines. They
      need 60 to 130 registers at 16 rows, so that several programs share a multiprocessor; any number of rows and
      features will do; there are Dv / 128 times as many programs; and sums over heads are part of a product.

Hence (b) for what is left; it reads k a second time for dq. (These are counts, not timings.) No atomics: one program
makes each sum in one order, or several make parts that one adds in order.

**Range.** W and dz are stored in the dtype of the inputs, in float16 times a power of two: W so that the largest is
just in range (the little that a slot has which hardly any token chose still counts, as it is divided by its sum), dz
by the largest upstream gradient of its item. That gradient is an operand as it is: over total it could leave the range.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from setemb_kernels import _device, _triton
from setemb_kernels.ops.slot_attention import triton_fused as fused
from setemb_kernels.ops.slot_attention import triton_fused_kernels as fused_kernels
from setemb_kernels.ops.slot_attention import triton_kernels as kernels
from setemb_kernels.ops.slot_attention import triton_shared as shared
from setemb_kernels.ops.slot_attention.layout import empty_like_slots

# --- tile sizes

WORKSPACE_BYTES = 32 << 20
"""What the weights of as many items as are processed at a time take; one item may need more."""

ALIGNMENT = 16
"""Rows of the workspace hold a multiple of so many tokens, so that they are read 16 bytes at a time."""

MAX_SLOTS = 256
"""K may be at most this, so that a tile holds whole heads."""


def weights_config(heads: int, K: int, D: int, dtype: torch.dtype) -> shared.Config:
    """Tile sizes of the kernels that make weights of `heads` heads of K slots each, of D features.

    A tile holds whole heads, 16 rows at least, 64 where there are so many. Sizes are what compiles without a spill for
    sm_80, sm_90 and sm_100 alike.
    """
    slots = _triton.next_power_of_two(K)
    rows = max(16, slots, min(64, _triton.next_power_of_two(heads) * slots))
    is_large = rows >= 64
    if dtype == torch.float32:  # uses no tensor cores, holds both operands in registers
        tokens, block_d, warps = max(16, min(64, 2048 // rows)), 16, 8 if is_large else 4
    else:
        tokens, block_d, warps = 32 if rows > 64 else 64, 64, 8 if rows > 128 else 4
    return shared.Config(rows, tokens, shared.block_d_of(D, block_d), warps, 4, is_large or dtype == torch.float32)


def gather_config(rows: int, D: int, dtype: torch.dtype) -> shared.Config:
    """Tile sizes of the kernel that sums over tokens, for so many rows of an item."""
    rows = max(16, _triton.next_power_of_two(rows))
    if dtype == torch.float32:
        return shared.Config(min(32, rows), 32, shared.block_d_of(D, 64), 4, 4)
    return shared.Config(min(64, rows), 64, shared.block_d_of(D, 128), 4, 4, rows >= 64)


def spread_config(rows: int, D: int, dtype: torch.dtype) -> shared.Config:
    """Tile sizes of the kernel that sums over so many rows of an item."""
    if dtype == torch.float32:
        return shared.Config(16, 32, shared.block_d_of(D, 64), 4, 2)
    return shared.Config(16 if rows <= 16 else 32, 64, shared.block_d_of(D, 128), 4, 2, rows > 16)


# --- host


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    eps: float,
    token_eps: float,
) -> tuple[Tensor, Tensor]:
    """The update ``[B, H, K, Dv]`` in the dtype of q and ``total [B, H, K]`` in float32. See `op.slot_attention`."""
    v = k if v is None else v
    out, total = empty_like_slots(q, v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)
    if 0 in total.shape:
        return out, total
    factor = 1.0
    if q.dtype == torch.float16:  # the largest weight is just in range
        factor = 2.0 ** (15 - math.ceil(math.log2(1 + token_eps)))
    with torch.cuda.device_of(q):
        if fused.forward(q, k, v, bias, mask, scale, eps, token_eps, factor, out, total):
            return out, total
        for items, (weights,) in _parts(q, k, workspaces=1):
            call = _Call(q[items], k[items], bias, mask, items, scale)
            sums = call.weights(weights, token_eps, factor)
            call.gather(weights, v[items], out[items], 1 / factor, sums=sums, total=total[items], eps=eps)
    return out, total


def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    total: Tensor,
    scale: float,
    token_eps: float,
    need_q: bool,
    need_k: bool,
    need_v: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients for q, k, v and bias from the upstream ``grad [B, H, K, Dv]``; one that is not needed comes back empty
    ``[0]``. Memory beyond inputs and outputs: `WORKSPACE_BYTES`, and some of the size of total; and where keys are the
    values, too (v is None), one more gradient of that size, as the two are made one by one."""
    with torch.cuda.device_of(q):
        results = fused.backward(
            grad, q, k, v, bias, mask, out, total, scale, token_eps, need_q, need_k, need_v, need_bias
        )
    if results is not None:
        return results
    if v is None:
        grad_q, grad_k, grad_v, grad_bias = backward(
            grad, q, k, k, bias, mask, out, total, scale, token_eps, need_q, need_k, need_k, need_bias
        )
        return grad_q, grad_k.add_(grad_v), k.new_empty(0), grad_bias
    allocate = k.new_zeros if 0 in total.shape else k.new_empty
    grad_q = empty_like_slots(q, q.shape[3]) if need_q else q.new_empty(0)
    grad_k, grad_v = allocate(k.shape if need_k else 0), allocate(v.shape if need_v else 0)
    grad_bias = q.new_empty(q.shape[:3] if need_bias else 0)
    need_logits = need_q or need_k or need_bias
    if 0 in total.shape or not (need_logits or need_v):
        return grad_q, grad_k, grad_v, grad_bias
    factor = 2.0**15 if q.dtype == torch.float16 else 1.0  # of weights that are at most 1
    with torch.cuda.device_of(q):
        delta = _delta(grad, out) if need_logits else None
        factors = shared.factors_of(grad) if need_logits and q.dtype == torch.float16 else None
        rows = _Rows(grad, delta, total.contiguous(), factors)
        for items, (weights, by_logit) in _parts(q, k, workspaces=2):
            call = _Call(q[items], k[items], bias, mask, items, scale)
            of = rows.of(items)
            sums = call.logit_gradients(
                v[items],
                of,
                weights if need_v else None,
                by_logit if need_logits else None,
                need_bias,
                token_eps,
                factor,
            )
            if need_q:
                call.gather(by_logit, call.k, grad_q[items], scale, of.factors)
            if need_k:
                call.spread(by_logit, call.q, grad_k[items], scale, of.factors)
            if need_v:
                call.spread(weights, of.grad, grad_v[items], 1 / factor)
            if sums is not None:
                grad_bias[items] = sums.sum(-1)
    return grad_q, grad_k, grad_v, grad_bias


class _Rows(NamedTuple):
    """What the backward pass knows of each slot."""

    grad: Tensor  # [B, H, K, Dv]
    delta: Tensor | None  # [B, H, K] float32: grad . out
    total: Tensor  # [B, H, K] float32
    factors: Tensor | None  # [B] float32: what dz is divided by

    def of(self, items: slice) -> _Rows:
        """Those of some items."""
        grad, delta, total, factors = (None if t is None else t[items] for t in self)
        assert grad is not None and total is not None
        return _Rows(grad, delta, total, factors)


def _parts(q: Tensor, k: Tensor, workspaces: int) -> Iterator[tuple[slice, list[Tensor]]]:
    """Slices of the items, and so many workspaces ``[items, H, K, padded]`` for each, which share `WORKSPACE_BYTES`."""
    B, H, K, _ = q.shape
    if K > MAX_SLOTS:
        raise ValueError(f"q: expected at most {MAX_SLOTS} slots on a GPU, got {K}")
    padded = _triton.cdiv(k.shape[2], ALIGNMENT) * ALIGNMENT
    most = WORKSPACE_BYTES // (workspaces * max(1, H * K * padded) * q.element_size())
    step = min(B, max(1, most))
    memory = [q.new_empty(step, H, K, padded) for _ in range(workspaces)]
    for first in range(0, B, step):
        items = slice(first, min(first + step, B))
        yield items, [weights[: items.stop - first] for weights in memory]


class _Call:
    """The launches for some of the items, given q and k of those, bias and mask of all."""

    def __init__(
        self, q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None, items: slice, scale: float
    ) -> None:
        self.q, self.k, self.scale = q, k, scale
        self.bias = None if bias is None else bias[items]
        self.mask = None if mask is None else mask[items]
        self.programs, _ = _device.processors(q)
        (self.B, self.H, self.K, _), self.groups, self.T = q.shape, k.shape[1], k.shape[2]
        self.heads = self.H // self.groups
        self.mask_strides = _triton.strides(self.mask, 2)
        self.precision = _device.precision()

    def weights(self, weights: Tensor, token_eps: float, factor: float) -> Tensor:
        """Fill ``weights [B, H, K, padded]``, times `factor`; return their sums ``[B, H, K, blocks of tokens]``."""
        programs, config, counts, sums = self._weights_launch(self.q.shape[3])
        if self.T:
            _triton.launch(
                kernels.weights_kernel, programs,
                (
                    self.q, self.k, self.bias, self.mask, weights, sums, *counts, self.q.shape[3], weights.shape[3],
                    self.scale, token_eps, factor, *self._strides(),
                ),
                **shared.layout(self.K), **config.launch(), PRECISION=self.precision,
            )  # fmt: skip
        return sums

    def logit_gradients(
        self,
        v: Tensor,
        rows: _Rows,
        weights: Tensor | None,
        by_logit: Tensor | None,
        need_sums: bool,
        token_eps: float,
        factor: float,
    ) -> Tensor | None:
        """Fill those given of ``weights``, over total and times `factor`, and ``by_logit``, over the factor of the
        item, both ``[B, H, K, padded]``; return sums of the latter ``[B, H, K, blocks of tokens]``."""
        programs, config, counts, sums = self._weights_launch(max(self.q.shape[3], v.shape[3]))
        like = by_logit if weights is None else weights
        if self.T and like is not None:
            _triton.launch(
                kernels.logit_gradients_kernel, programs,
                (
                    self.q, self.k, self.bias, self.mask, v, *rows, weights, by_logit, sums if need_sums else None,
                    *counts,
                    self.q.shape[3], v.shape[3], like.shape[3], self.scale, token_eps, factor, *self._strides(),
                    *v.stride(), *rows.grad.stride(),
                ),
                **shared.layout(self.K), **config.launch(), PRECISION=self.precision,
            )  # fmt: skip
        return sums if need_sums else None

    def _weights_launch(self, D: int) -> tuple[int, shared.Config, tuple[int, ...], Tensor]:
        """Programs, tile sizes, the counts among the arguments and memory for sums."""
        config = weights_config(self.heads, self.K, D, self.q.dtype)
        head_blocks = _triton.cdiv(self.heads, config.rows // shared.layout(self.K)["SLOTS"])
        token_blocks = _triton.cdiv(self.T, config.tokens)
        counts = (head_blocks, token_blocks, self.groups, self.heads, self.K, self.T)
        sums = self.q.new_empty(self.B, self.H, self.K, token_blocks, dtype=torch.float32)
        return head_blocks * token_blocks * self.B * self.groups, config, counts, sums

    def _strides(self) -> tuple[int, ...]:
        return *self.q.stride(), *self.k.stride(), *_triton.strides(self.bias, 3), *self.mask_strides

    def gather(
        self,
        weights: Tensor,
        tokens: Tensor,
        out: Tensor,
        factor: float,
        factors: Tensor | None = None,
        sums: Tensor | None = None,
        total: Tensor | None = None,
        eps: float = 0.0,
    ) -> None:
        """Fill ``out [B, H, K, D]`` with sums over tokens ``[B, G, T, D]``, times `factor` and that of the item.

        Given sums of weights, fill `total`, too, and divide by it. Where there are fewer programs than twice the
        multiprocessors, each takes a part of the tokens.
        """
        D, rows, items = tokens.shape[3], self.heads * self.K, self.B * self.groups
        config = gather_config(rows, D, self.q.dtype)
        row_blocks, feature_blocks = _triton.cdiv(rows, config.rows), max(1, _triton.cdiv(D, config.block_d))
        programs = row_blocks * feature_blocks * items
        splits = max(1, min(_triton.cdiv(2 * self.programs, programs), self.T // shared.SPLIT_TOKENS))
        per_split = max(1, _triton.cdiv(self.T, splits * config.tokens)) * config.tokens
        splits = max(1, _triton.cdiv(self.T, per_split))
        token_blocks = 0 if sums is None else sums.shape[3]
        into = out if splits == 1 else out.new_empty(splits, items * rows, D, dtype=torch.float32)
        _triton.launch(
            kernels.gather_kernel, programs * splits,
            (
                weights, tokens, self.mask, factors, sums, into, total, row_blocks, feature_blocks, splits, items,
                self.groups, rows, self.K, self.T, D, weights.shape[3], token_blocks, per_split, factor, eps,
                *tokens.stride(), *self.mask_strides, *out.stride(),
            ),
            SPLIT=splits > 1, PRECISION=self.precision, **config.launch(),
        )  # fmt: skip
        if splits > 1:
            shared.combine(into, sums, out, total, splits, token_blocks, eps)

    def spread(self, weights: Tensor, slots: Tensor, out: Tensor, factor: float, factors: Tensor | None = None) -> None:
        """Fill ``out [B, G, T, D]`` with sums over slots ``[B, H, K, D]``, times `factor` and that of the item."""
        D, rows = slots.shape[3], self.heads * self.K
        config = spread_config(rows, D, self.q.dtype)
        feature_blocks, token_blocks = _triton.cdiv(D, config.block_d), _triton.cdiv(self.T, config.tokens)
        if out.numel():
            _triton.launch(
                kernels.spread_kernel, feature_blocks * token_blocks * self.B * self.groups,
                (
                    weights, slots, self.mask, factors, out, feature_blocks, token_blocks, self.groups, rows, self.K,
                    self.T, D, weights.shape[3], factor, *slots.stride(), *self.mask_strides,
                ),
                PRECISION=self.precision, **config.launch(),
            )  # fmt: skip


def _delta(grad: Tensor, out: Tensor) -> Tensor:
    """``grad . out [B, H, K]``."""
    _, H, K, D = grad.shape
    delta = grad.new_empty(grad.shape[:3], dtype=torch.float32)
    block = shared.rows_block(D)
    _triton.launch(
        kernels.delta_kernel, _triton.cdiv(delta.numel(), block["ROWS"]),
        (
            grad, out, delta, delta.numel(), H, K, D, *grad.stride(), *out.stride(),
        ),
        **block,
    )  # fmt: skip
    return delta


# --- ahead of time


def configs(heads: int, K: int, D: int, dtype: torch.dtype, masked: bool = False) -> Iterator[_triton.Build]:
    """Every kernel that forward and backward launch for such slots, of so many heads that share keys, on any chip.

    For all gradients, with a bias where there is a mask, Dk = Dv = D, and inputs whose features are adjacent."""
    name = _triton.NAMES[dtype]
    inputs = ("q", "k", "v", "bias", "grad", "out", "tokens", "slots", "weights", "logit_gradients", "grad_q")
    types = dict.fromkeys((*inputs, "grad_k", "grad_v"), f"*{name}") | {"mask": "*i1"}
    types |= dict.fromkeys(("delta", "total", "factors", "sums", "partial", "partial_sums"), "*fp32")
    types |= dict.fromkeys(("scale", "token_eps", "factor", "eps"), "fp32")
    adjacent = {f"{key}_stride_d": 1 for key in inputs} | {"mask_stride_t": 1, "bias_stride_k": 1}
    absent = {} if masked else {"mask": None, "bias": None}
    unscaled = {} if dtype == torch.float16 else {"factors": None}
    aligned = {f"{key}_stride_{axis}" for key in inputs for axis in "bhgkt"} | {"padded", "per_split"}
    aligned |= {"D", "Dv"} if D % 16 == 0 else set()
    every = {**adjacent, **absent, "PRECISION": "ieee"}

    def build(kernel: Any, constants: dict[str, Any], launch: dict[str, Any], **others: str) -> _triton.Build:
        on_tensor_cores = "PRECISION" in kernel.arg_names and dtype != torch.float32
        return _triton.build(kernel, types | others, every | constants, launch, aligned, on_tensor_cores)

    config, layout = weights_config(heads, K, D, dtype), shared.layout(K)
    yield build(kernels.weights_kernel, layout, config.launch())
    yield build(kernels.logit_gradients_kernel, layout | unscaled, config.launch())
    yield build(kernels.delta_kernel, {}, shared.rows_block(D))
    mean, plain = {"factors": None}, {"sums": None, "total": None} | unscaled
    for kind in (mean, plain):
        config = gather_config(heads * K, D, dtype)
        yield build(kernels.gather_kernel, kind | {"SPLIT": False}, config.launch())
        yield build(kernels.gather_kernel, kind | {"SPLIT": True}, config.launch(), out="*fp32")
        yield build(kernels.combine_kernel, kind, shared.rows_block(D))
    yield build(kernels.spread_kernel, unscaled, spread_config(heads * K, D, dtype).launch())
    for T in (4096, 36):
        for backward, kernel in enumerate((fused_kernels.fused_forward_kernel, fused_kernels.fused_backward_kernel)):
            one_pass = fused.config_of(heads, K, T, D, dtype, bool(backward))
            if one_pass is None or (T == 36 and one_pass.block_d >= D):
                continue
            for split in (False, True)[: 1 + (one_pass.tokens < T)]:
                flags = layout | {"SPLIT": split, "ONE_BLOCK": one_pass.block_d >= D} | (unscaled if backward else {})
                sums = {"grad_q" if backward else "out": "*fp32"} if split else {}
                yield build(kernel, flags, one_pass.launch(), **sums)
