"""What is measured on a GPU: each op at its sizes, beside the plain products of the same operands and plain PyTorch."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.row import BF16, F16, F32, Inputs, Prepare, Row, as_leaves, compiled, name_of, unit_sets
from benchmarks.gpu.search_rows import rank, topk
from benchmarks.gpu.timing import Call
from benchmarks.peers import (
    eager_infonce,
    eager_maxsim,
    eager_sigmoid,
    eager_similarity,
    eager_slot_attention,
    eager_triplet,
)
from setemb_kernels import (
    maxsim,
    set_infonce_loss,
    set_sigmoid_loss,
    set_triplet_loss,
    slot_attention,
    smooth_chamfer,
)
from setemb_kernels.backends import triton_serves
from setemb_kernels.losses import contrast
from setemb_kernels.ops.smooth_chamfer.op import hardest_kernel


def rows(device: str, quick: bool) -> Iterator[Row]:
    """All, the most telling ones first. `quick`: the same code at sizes that take no time."""
    for n, d in ((24, 16), (20, 8)) if quick else ((8192, 1024), (8192, 128), (1024, 1024), (1024, 128)):
        yield _smooth_chamfer(device, n, 4, d, BF16)
        yield _smooth_chamfer(device, n, 4, d, BF16, backward=True)
    for B, H, K, T, D in (
        ((2, 1, 4, 20, 16), (3, 2, 4, 9, 8))
        if quick
        else ((64, 1, 8, 4096, 128), (512, 1, 4, 1024, 256), (128, 4, 4, 36, 1024))
    ):
        yield _slot_attention(device, B, H, K, T, D, BF16, backward=False)
        yield _slot_attention(device, B, H, K, T, D, BF16, backward=True)
    documents = (20, (3, 9), 16) if quick else (10_000, (60, 180), 128)
    yield _maxsim(device, 1, *documents, BF16)
    training = (4, (3, 9), 16) if quick else (128, (60, 180), 128)
    yield _maxsim(device, training[0], *training, BF16, backward=True)
    n, d = (24, 16) if quick else (16384, 1024)
    for loss in LOSSES:
        yield _loss(device, loss, n, 4, d, BF16)
    for loss in ("infonce", "sigmoid"):
        yield _loss(device, loss, n, 4, d, BF16, fused=True)
    for gallery in (BF16, F32, torch.int8):
        yield topk(device, *((5, 60, 4, 16, 3) if quick else (100, 100_000, 4, 256, 10)), gallery)
    yield topk(device, *((1, 80, 4, 16, 3) if quick else (1, 1_000_000, 4, 128, 10)), BF16)
    n, d = (20, 16) if quick else (2048, 256)
    for dtype, tf32 in ((F16, False), (F32, False), (F32, True)):
        for backward in (False, True):
            yield _smooth_chamfer(device, n, 4, d, dtype, backward=backward, tf32=tf32)
    yield _hardest(device, *((24, 4, 16) if quick else (8192, 4, 1024)), BF16)
    yield rank(device, *((20, 5, 4, 16) if quick else (1000, 5, 4, 1024)))


# --- smooth_chamfer


def _in_tf32(prepare: Prepare) -> Prepare:
    """What it prepares may multiply numbers of float32 in tf32, as one would allow torch to."""

    def prepared(inputs: Inputs) -> Call:
        call = prepare(inputs)

        def run() -> Any:
            matmul = torch.backends.cuda.matmul
            before = matmul.fp32_precision
            torch.set_float32_matmul_precision("high")  # sets fp32_precision to tf32, and what torch.compile reads
            try:
                return call()
            finally:
                torch.set_float32_matmul_precision("highest")
                matmul.fp32_precision = before

        return run

    return prepared


def _smooth_chamfer(
    device: str, n: int, K: int, D: int, dtype: torch.dtype, *, backward: bool = False, tf32: bool = False
) -> Row:
    def make() -> Inputs:
        upstream = torch.randn(n, n, device=device).to(dtype) if backward else None
        weights = torch.randn(n * K, n * K, device=device).to(dtype) if backward else None
        return unit_sets(n, K, D, dtype, device), unit_sets(n, K, D, dtype, device), upstream, weights

    def product(inputs: Inputs) -> Call:
        x, y, _, weights = inputs
        x, y = x.flatten(0, 1), y.flatten(0, 1)
        if not backward:
            return lambda: x @ y.T
        return lambda: (x @ y.T, weights @ y, weights.T @ x)

    def step(similarity: Callable[..., Tensor]) -> Prepare:
        def prepare(inputs: Inputs) -> Call:
            x, y, upstream, _ = inputs
            if not backward:
                return lambda: similarity(x, y)
            x, y = as_leaves(x, y)

            def run() -> tuple[Tensor, ...]:
                s = similarity(x, y)
                return s.detach(), *torch.autograd.grad(s, (x, y), upstream)

            return run

        return prepare

    size, products = dtype.itemsize, 3 if backward else 1
    way: Callable[[Prepare], Prepare] = _in_tf32 if tf32 else lambda prepare: prepare
    return Row(
        "smooth_chamfer",
        f"{'forward + backward' if backward else 'forward'} {n}x{n} K{K} D{D} {'tf32' if tf32 else name_of(dtype)}",
        make,
        ours=way(step(smooth_chamfer)),
        product=way(product),
        eager=way(step(eager_similarity)),
        compiled=way(step(compiled(eager_similarity, device))),
        products=products,
        operations=2.0 * products * (n * K) ** 2 * D,
        bytes=size * (2.0 * n * K * D * (2 if backward else 1) + n * n * (2 if backward else 1)),
        result=(lambda out: out[1]) if backward else (lambda out: out),
    )


def _hardest(device: str, n: int, K: int, D: int, dtype: torch.dtype) -> Row:
    """The most similar negative of each set, both ways, and which: by a kernel of its own, where there is one."""

    def make() -> Inputs:
        return unit_sets(n, K, D, dtype, device), unit_sets(n, K, D, dtype, device)

    def product(inputs: Inputs) -> Call:
        x, y = (t.flatten(0, 1) for t in inputs)
        return lambda: x @ y.T

    def ours(inputs: Inputs) -> Call:
        kernel = hardest_kernel(*inputs)
        if kernel is None:
            raise NotImplementedError("no such kernel")
        alpha = torch.tensor(16.0)
        return lambda: [part for side in kernel(*inputs, alpha, None, None) for part in side]

    def plain(x: Tensor, y: Tensor) -> list[Tensor]:
        s = eager_similarity(x, y)
        own = torch.eye(len(s), dtype=torch.bool, device=s.device)
        s = s.masked_fill(own, -torch.inf)
        return [*s.max(1), *s.max(0)]

    def step(function: Callable[..., Any]) -> Prepare:
        return lambda inputs: lambda: function(*inputs)

    return Row(
        "smooth_chamfer",
        f"hardest {n}x{n} K{K} D{D} {name_of(dtype)}",
        make,
        ours=ours,
        product=product,
        eager=step(plain),
        compiled=step(compiled(plain, device)),
        products=1,
        operations=2.0 * (n * K) ** 2 * D,
        bytes=dtype.itemsize * 2.0 * n * K * D + 2.0 * n * (4 + 8),
        result=lambda out: out[0],
    )


# --- set_similarity


def _maxsim(
    device: str, n: int, m: int, vectors: tuple[int, int], D: int, dtype: torch.dtype, *, backward: bool = False
) -> Row:
    """n queries of 32 vectors with m documents, ragged: from so many to so many vectors, evenly spread."""
    K, (low, high) = 32, vectors
    counts = low + torch.arange(m) * 37 % (high - low + 1)
    total = int(counts.sum())

    def make() -> Inputs:
        queries = unit_sets(n, K, D, dtype, device)
        documents = unit_sets(1, total, D, dtype, device)[0]
        upstream = torch.randn(n, m, device=device).to(dtype) if backward else None
        weights = torch.randn(n * K, total, device=device).to(dtype) if backward else None
        return queries, documents, upstream, weights

    def product(inputs: Inputs) -> Call:
        x, y, _, weights = inputs
        x = x.flatten(0, 1)
        if not backward:
            return lambda: x @ y.T
        return lambda: (x @ y.T, weights @ y, weights.T @ x)

    def call(inputs: Inputs, y: Tensor, similarity: Callable[[Tensor, Tensor], Tensor]) -> Call:
        x, _, upstream, _ = inputs
        if not backward:
            return lambda: similarity(x, y)
        leaves = as_leaves(x, y)

        def run() -> tuple[Tensor, ...]:
            s = similarity(*leaves)
            return s.detach(), *torch.autograd.grad(s, leaves, upstream)

        return run

    def ours(inputs: Inputs) -> Call:
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(device)
        return call(inputs, inputs[1], lambda x, y: maxsim(x, y, y_offsets=offsets))

    def eager(function: Callable[..., Tensor]) -> Prepare:
        def prepare(inputs: Inputs) -> Call:
            valid = (torch.arange(high) < counts[:, None]).to(device)
            padded = inputs[1].new_zeros(m, high, D).masked_scatter_(valid[..., None], inputs[1])  # beforehand
            return call(inputs, padded, lambda x, y: function(x, y, valid))

        return prepare

    def judge(inputs: Inputs) -> Call:
        exact = tuple(None if t is None else t.float() for t in inputs)
        return eager(eager_maxsim)(exact)

    size, products = dtype.itemsize, 3 if backward else 1
    return Row(
        "set_similarity",
        f"{'forward + backward' if backward else 'forward'} maxsim {n:,}x{m:,} K{K} L{low}-{high} D{D} "
        f"{name_of(dtype)}",
        make,
        ours=ours,
        product=product,
        eager=eager(eager_maxsim),
        compiled=eager(compiled(eager_maxsim, device)),
        products=products,
        operations=2.0 * products * n * K * total * D,
        bytes=size * ((n * K + total) * D + n * m) * (2.0 if backward else 1.0),
        result=(lambda out: out[1]) if backward else (lambda out: out),
        judge=judge if backward else None,
    )


# --- slot_attention


def _slot_attention(device: str, B: int, H: int, K: int, T: int, D: int, dtype: torch.dtype, *, backward: bool) -> Row:
    """H heads share their keys and values."""

    def make() -> Inputs:
        q = torch.randn(B, H, K, D, device=device).to(dtype)
        k, v = (torch.randn(B, 1, T, D, device=device).to(dtype) for _ in range(2))
        grad = torch.randn(B, H, K, D, device=device).to(dtype)
        return q, k, v, grad, torch.rand(B, 1, H * K, T, device=device).to(dtype)

    def product(inputs: Inputs) -> Call:
        q, k, v, grad, weights = inputs
        q, grad = q.reshape(B, 1, H * K, D), grad.reshape(B, 1, H * K, D)
        if not backward:
            return lambda: (q @ k.mT, weights @ v)
        return lambda: (q @ k.mT, grad @ v.mT, weights @ k, weights.mT @ q, weights.mT @ grad)

    def step(function: Callable[..., Tensor]) -> Prepare:
        def prepare(inputs: Inputs) -> Call:
            q, k, v, grad, _ = inputs
            if not backward:
                return lambda: function(q, k, v)
            leaves = as_leaves(q, k, v)
            out = function(*leaves)  # the backward alone is timed
            return lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)

        return prepare

    elements = B * (2.0 * H * K * D + 2.0 * T * D) if not backward else B * (4.0 * H * K * D + 4.0 * T * D)
    heads = f"H{H} shared " if H > 1 else ""
    return Row(
        "slot_attention",
        f"{'backward' if backward else 'forward'} B{B} {heads}K{K} T{T} D{D} {name_of(dtype)}",
        make,
        ours=step(slot_attention),
        product=product,
        eager=step(eager_slot_attention),
        compiled=step(compiled(eager_slot_attention, device)),
        products=5 if backward else 2,
        operations=(10.0 if backward else 4.0) * B * H * K * T * D,
        bytes=dtype.itemsize * elements,
        result=(lambda out: out[0]) if backward else (lambda out: out),
    )


# --- losses

LOSSES: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], int]] = {
    # ours, eager, and how many plain products it may be compared with
    "triplet": (set_triplet_loss, eager_triplet, 1),
    "infonce": (set_infonce_loss, eager_infonce, 4),
    "sigmoid": (set_sigmoid_loss, eager_sigmoid, 4),
}


def _loss(device: str, name: str, n: int, K: int, D: int, dtype: torch.dtype, *, fused: bool = False) -> Row:
    """fused: with a backward kernel that makes the gradients of a loss from its scores; eager is what serves else."""
    ours, eager, products = LOSSES[name]

    def make() -> Inputs:
        return unit_sets(n, K, D, dtype, device), unit_sets(n, K, D, dtype, device)

    def product(inputs: Inputs) -> Call:
        x, y = (t.flatten(0, 1) for t in inputs)

        def run() -> None:
            for _ in range(products):
                for piece in x.split(8192):  # the products' results are not what is measured
                    piece @ y.T

        return run

    def step(loss: Callable[..., Tensor]) -> Prepare:
        def prepare(inputs: Inputs) -> Call:
            x, y = as_leaves(*inputs)

            def run() -> tuple[Tensor, ...]:
                value = loss(x, y)
                return value.detach(), *torch.autograd.grad(value, (x, y))

            return run

        return prepare

    def with_fused(inputs: Inputs) -> Call:
        if device == "cuda" and not triton_serves("smooth_chamfer"):
            raise NotImplementedError("no such kernel")
        call = step(ours)(inputs)

        def run() -> tuple[Tensor, ...]:
            before, contrast.FUSED_ON_GPU = contrast.FUSED_ON_GPU, True
            try:
                return call()
            finally:
                contrast.FUSED_ON_GPU = before

        return run

    return Row(
        f"set_{name}_loss",
        f"forward + backward{', fused (eager: not fused)' if fused else ''} {n}x{n} K{K} D{D} {name_of(dtype)}",
        make,
        ours=with_fused if fused else step(ours),
        product=product,
        eager=step(ours if fused else eager),
        compiled=None if fused else step(compiled(eager, device)),
        products=products,
        operations=2.0 * products * (n * K) ** 2 * D,
        bytes=dtype.itemsize * 4.0 * n * K * D,
        result=(lambda out: torch.cat(out[1:])) if fused else (lambda out: out[0].float()),
        large=True,
    )


def largest_batch(device: str, quick: bool) -> tuple[dict[str, int], dict[str, float]]:
    """Largest batches, by doubling, of a step of the triplet loss with the hardest negatives, K 4, D 1024, bfloat16:
    until it does not fit, at most 131,072 (its time grows with the square); and the seconds of such a step, the first
    at its size."""
    first, last = (16, 32) if quick else (4096, 131_072)
    batches, seconds = {}, {}
    for name, loss in (("eager", eager_triplet), ("ours", set_triplet_loss)):
        n = 0
        while max(first, 2 * n) <= last and (took := _step(loss, max(first, 2 * n), device)) is not None:
            n = max(first, 2 * n)
            seconds[name] = took
        batches[name] = n
    return batches, seconds


def _step(loss: Callable[..., Tensor], n: int, device: str) -> float | None:
    """Seconds; None where it does not fit."""
    if device == "cuda":
        torch.cuda.empty_cache()
    try:
        x, y = as_leaves(*(torch.randn(n, 4, 1024, device=device, dtype=BF16) / 32 for _ in range(2)))
        if device == "cuda":
            torch.cuda.synchronize()
        start = time.perf_counter()
        torch.autograd.grad(loss(x, y), (x, y))
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "CUBLAS_STATUS_ALLOC_FAILED" in str(error):
            return None
        raise
    return time.perf_counter() - start
