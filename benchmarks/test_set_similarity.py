"""Rows of set_similarity: MaxSim of one query with many documents, padded and ragged, beside what else computes it."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.nn import functional

from benchmarks.harness import ROWS, Function, Row, measure
from benchmarks.memory import in_a_process_of_its_own
from benchmarks.test_retrieval import codes_of
from setemb_kernels import maxsim

DOCUMENTS = 10_000


def eager_maxsim(x: Tensor, y: Tensor) -> Tensor:
    return torch.einsum("nkd,mld->nmkl", x, y).amax(3).sum(2)


def package_peers(query: Tensor, documents: Tensor) -> dict[str, Function]:
    """The packages that are installed; one that is absent has no column."""
    peers: dict[str, Function] = {}
    for name in ("maxsim_cpu", "fast_maxsim"):
        try:
            package: Any = importlib.import_module(name)
        except ImportError:
            continue
        q, d = query.numpy(), documents.numpy()
        peers[name] = lambda package=package, q=q, d=d: package.maxsim_scores(q, d)
    try:
        scores: Any = importlib.import_module("pylate.scores")
    except ImportError:
        return peers
    peers["pylate"] = lambda: scores.colbert_scores(query[None], documents)
    return peers


@pytest.mark.parametrize(("K", "L", "D"), [(32, 128, 128), (4, 1024, 128), (4, 4, 1024)])
def test_one_query(benchmark: BenchmarkFixture, K: int, L: int, D: int) -> None:
    x = functional.normalize(torch.randn(1, K, D), dim=-1)
    y = torch.randn(DOCUMENTS, L, D)
    y /= torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    compiled = torch.compile(eager_maxsim, dynamic=False)
    measure(
        benchmark,
        Row("set_similarity", f"maxsim 1 x {DOCUMENTS:,} K{K} L{L} D{D} float32 cpu", None, "product"),
        ours=lambda: maxsim(x, y),
        floor=lambda: y.flatten(0, 1) @ x[0].T,
        peers={"eager": lambda: eager_maxsim(x, y), "compiled": lambda: compiled(x, y), **package_peers(x[0], y)},
        operations=2.0 * DOCUMENTS * K * L * D,
    )


def test_one_query_of_codes(benchmark: BenchmarkFixture) -> None:
    """int8 on both sides with scales, beside the same in float32, and in bfloat16."""
    K, L, D = 32, 128, 128
    x, y = functional.normalize(torch.randn(1, K, D), dim=-1), torch.randn(DOCUMENTS, L, D)
    y /= torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    short_x, short_y = x.bfloat16(), y.bfloat16()
    (x8, x_scale), (y8, y_scale) = codes_of(x), codes_of(y)
    measure(
        benchmark,
        Row("set_similarity", f"maxsim 1 x {DOCUMENTS:,} K{K} L{L} D{D} int8 cpu", None, "ours, float32"),
        ours=lambda: maxsim(x8, y8, x_scale=x_scale, y_scale=y_scale),
        floor=lambda: maxsim(x, y),
        peers={"ours, bfloat16": lambda: maxsim(short_x, short_y)},
        operations=2.0 * DOCUMENTS * K * L * D,
    )


def test_ragged_documents(benchmark: BenchmarkFixture) -> None:
    """8 to 300 tokens, 60 in the middle, beside the padded form."""
    D = 128
    generator = torch.Generator().manual_seed(0)
    counts = (60 * torch.exp(0.6 * torch.randn(DOCUMENTS, generator=generator))).clamp(8, 300).long()
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    x = functional.normalize(torch.randn(1, 32, D), dim=-1)
    rows = functional.normalize(torch.randn(int(offsets[-1]), D), dim=-1)
    valid = torch.arange(int(counts.max())) < counts[:, None]
    padded = rows.new_zeros(*valid.shape, D)
    padded[valid] = rows

    def eager() -> Tensor:
        scores = torch.einsum("nkd,mld->nmkl", x, padded)
        return scores.masked_fill(~valid[:, None], -torch.inf).amax(3).sum(2)

    measure(
        benchmark,
        Row("set_similarity", f"maxsim 1 x {DOCUMENTS:,} ragged K32 D{D} float32 cpu", None, "product of the padded"),
        ours=lambda: maxsim(x, rows, y_offsets=offsets),
        floor=lambda: padded.flatten(0, 1) @ x[0].T,
        peers={"eager": eager},
        operations=2.0 * len(rows) * 32 * D,
    )


BATCH, TOKENS = 256, (32, 180, 128)
"""Of a training step: queries and documents, each a document's own; tokens of either, features."""


def contrastive_step(similarity: str, batch: int = BATCH) -> Function:
    """One-sided InfoNCE over MaxSim, forward and backward: with all scores stored, as in PyLate, or with ours."""
    K, L, D = TOKENS
    x, y = (functional.normalize(torch.randn(batch, k, D), dim=-1).requires_grad_() for k in (K, L))
    scores = eager_maxsim if similarity == "stored" else maxsim
    own = torch.arange(batch)
    return lambda: torch.autograd.grad(functional.cross_entropy(scores(x, y), own), (x, y))


def test_contrastive_step(benchmark: BenchmarkFixture) -> None:
    K, L, D = TOKENS
    measure(
        benchmark,
        Row("set_similarity", f"maxsim InfoNCE step B{BATCH} K{K} L{L} D{D} float32 cpu", 0.5, "scores stored"),
        ours=contrastive_step("ours"),
        floor=contrastive_step("stored"),
        peers={},
        operations=6.0 * BATCH * BATCH * K * L * D,
        rounds=3,
    )


PEAK = """
import sys, torch
from benchmarks.memory import peak_beyond_inputs_and_results
from benchmarks.test_set_similarity import contrastive_step
contrastive_step(sys.argv[1], 4)()
print(peak_beyond_inputs_and_results(contrastive_step(sys.argv[1])))
"""


def test_peak_memory_of_a_contrastive_step() -> None:
    K, L, D = TOKENS
    name = f"maxsim InfoNCE step B{BATCH} K{K} L{L} D{D} float32 cpu"
    stored = in_a_process_of_its_own(PEAK, "stored")
    ours = in_a_process_of_its_own(PEAK, "ours")
    ROWS.append(Row("set_similarity", f"peak memory, {name}, scores stored", None, "", memory_mib=stored))
    ROWS.append(Row("set_similarity", f"peak memory, {name}", None, "", memory_mib=ours, limit_mib=stored / 4))
