"""The rows of `make gpu` that search: top k, and ranks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from benchmarks.gpu.row import BF16, F32, Inputs, Row, name_of, unit_sets
from benchmarks.gpu.timing import Call
from benchmarks.peers import eager_similarity
from setemb_kernels import set_rank, set_topk


def topk(device: str, n: int, m: int, K: int, D: int, k: int, gallery: torch.dtype) -> Row:
    block = 16_384

    def make() -> Inputs:
        queries = unit_sets(n, K, D, F32, device)
        sets = torch.cat([unit_sets(min(block, m - first), K, D, BF16, device) for first in range(0, m, block)])
        scale = None
        if gallery == torch.int8:
            scale = (sets.float().abs().amax(2) / 127).contiguous()
            pieces = zip(sets.split(block), scale.split(block), strict=True)
            sets = torch.cat([(a.float() / s[..., None]).round().to(torch.int8) for a, s in pieces])
        return queries, sets.to(gallery), scale

    def parts(inputs: Inputs) -> Iterator[Tensor]:
        _, sets, scale = inputs
        for first in range(0, m, block):
            part = sets[first : first + block].float()
            yield part if scale is None else part * scale[first : first + block, :, None]

    def product(inputs: Inputs) -> Call:
        """In float32, as the search; the gallery converted beforehand."""
        flat, blocks = inputs[0].flatten(0, 1), [part.flatten(0, 1) for part in parts(inputs)]
        return lambda: [flat @ part.T for part in blocks]

    def eager(inputs: Inputs) -> Call:
        def run() -> tuple[Tensor, Tensor]:
            s = torch.cat([eager_similarity(inputs[0], part) for part in parts(inputs)], 1)
            return tuple(s.topk(k))  # type: ignore[return-value]

        return run

    def ours(inputs: Inputs) -> Call:
        queries, sets, scale = inputs
        return lambda: set_topk(queries, sets, k, gallery_scale=scale)

    scales = 4.0 * m * K if gallery == torch.int8 else 0.0
    return Row(
        "set_topk",
        f"{n:,} x {m:,} {name_of(gallery)} K{K} D{D} k{k}",
        make,
        ours=ours,
        product=product,
        eager=eager,
        products=1,
        operations=2.0 * n * K * m * K * D,
        bytes=gallery.itemsize * float(m) * K * D + scales,
        result=lambda out: out[0],
    )


def rank(device: str, n: int, captions: int, K: int, D: int) -> Row:
    """Ranks both ways, of n images with so many captions each."""
    m = n * captions

    def groups() -> tuple[Tensor, Tensor]:
        return torch.arange(n, device=device), torch.arange(m, device=device) // captions

    def make() -> Inputs:
        return unit_sets(n, K, D, F32, device), unit_sets(m, K, D, F32, device)

    def product(inputs: Inputs) -> Call:
        x, y = (t.flatten(0, 1) for t in inputs)
        return lambda: x @ y.T

    def ours(inputs: Inputs) -> Call:
        x_group, y_group = groups()
        return lambda: set_rank(*inputs, x_group=x_group, y_group=y_group)

    def eager(inputs: Inputs) -> Call:
        x_group, y_group = groups()

        def run() -> tuple[Tensor, ...]:
            s, relevant = eager_similarity(*inputs), x_group[:, None] == y_group
            best = s.masked_fill(~relevant, -torch.inf)
            return tuple(((s >= best.amax(dim, keepdim=True)) & ~relevant).sum(dim) for dim in (1, 0))

        return run

    return Row(
        "set_rank",
        f"both ways {n:,} x {m:,} K{K} D{D} float32",
        make,
        ours=ours,
        product=product,
        eager=eager,
        products=1,
        operations=2.0 * n * K * m * K * D,
        bytes=4.0 * (n + m) * K * D + 8.0 * (n + m),
        result=lambda out: out[0],
    )
