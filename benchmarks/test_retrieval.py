"""Rows of search and evaluation: beside plain products in blocks, or one pass over the gallery's bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks.harness import ROWS, Row, measure
from benchmarks.test_smooth_chamfer import unit_sets
from setemb.evaluation import evaluate_retrieval
from setemb_kernels import set_topk, smooth_chamfer

BLOCK = 4096


def codes_of(sets: Tensor) -> tuple[Tensor, Tensor]:
    """int8 and the scale of each vector."""
    scale = sets.abs().amax(2) / 127
    return (sets / scale[..., None]).round().to(torch.int8), scale


@pytest.mark.parametrize("gallery", ["float32", "int8", "bfloat16"])
def test_topk(benchmark: BenchmarkFixture, gallery: str) -> None:
    """100 queries, 100,000 sets. The product has float32 operands, the rest of the search is left out."""
    queries, sets = unit_sets(100, 4, 256, torch.float32, "cpu"), unit_sets(100_000, 4, 256, torch.float32, "cpu")
    q_flat, g_flat = queries.flatten(0, 1), sets.flatten(0, 1)
    stored: dict[str, Any] = {"gallery": sets.bfloat16() if gallery == "bfloat16" else sets}
    if gallery == "int8":
        stored["gallery"], stored["gallery_scale"] = codes_of(sets)

    def product() -> None:
        for start in range(0, len(g_flat), 4 * BLOCK):
            q_flat @ g_flat[start : start + 4 * BLOCK].T

    def plain() -> Tensor:
        parts = [smooth_chamfer(queries, part) for part in sets.split(BLOCK)]
        return torch.cat(parts, 1).topk(10).indices

    ours: Callable[[], Any] = lambda: set_topk(queries, k=10, **stored)  # noqa: E731
    row = Row("set_topk", f"100 queries x 100,000 {gallery} K4 D256 k10 cpu", 1.15, "product in blocks")
    measure(
        benchmark,
        row,
        ours=ours,
        floor=product,
        peers={"stored": plain} if gallery == "float32" else {},
        operations=2.0 * 400 * 400_000 * 256,
        rounds=7,
    )
    if gallery != "float32":
        exact, found = plain(), ours().indices
        hits = (exact[:, :, None] == found[:, None]).any(2).float().mean().item()
        assert hits >= 0.95, hits


@pytest.mark.parametrize("gallery", ["bfloat16", "int8"])
def test_one_query(benchmark: BenchmarkFixture, gallery: str, tmp_path: Path) -> None:
    """One query, 1,000,000 sets in a mapped file: bound by reading the gallery, 1 GiB or half of it."""
    query = unit_sets(1, 4, 128, torch.bfloat16, "cpu").float()
    dtype, width = {"bfloat16": (torch.bfloat16, 2), "int8": (torch.int8, 1)}[gallery]
    scales = []
    with (tmp_path / "gallery").open("wb") as file:
        for _ in range(20):
            part = unit_sets(50_000, 4, 128, torch.bfloat16, "cpu")
            if gallery == "int8":
                part, scale = codes_of(part.float())
                scales.append(scale)
            file.write(part.view(torch.uint8).numpy().data)
    size = 4_000_000 * 128 * width
    mapped = torch.from_file(str(tmp_path / "gallery"), shared=True, size=size, dtype=torch.uint8)
    words, sets = mapped.view(torch.int64), mapped.view(dtype).view(1_000_000, 4, 128)
    stored = {"gallery_scale": torch.cat(scales)} if scales else {}
    row = Row("set_topk", f"1 query x 1,000,000 {gallery}, mapped, K4 D128 k10 cpu", 2.0, "one read of the gallery")
    measure(
        benchmark,
        row,
        ours=lambda: set_topk(query, sets, 10, **stored),
        floor=lambda: words.sum(),
        peers={},
        operations=2.0 * 4 * 4_000_000 * 128,
        rounds=7,
    )


def test_evaluation(benchmark: BenchmarkFixture) -> None:
    images, captions = unit_sets(1000, 4, 256, torch.float32, "cpu"), unit_sets(5000, 4, 256, torch.float32, "cpu")
    i_flat, c_flat = images.flatten(0, 1), captions.flatten(0, 1)
    row = Row("evaluate_retrieval", "1,000 x 5,000 K4 D256 float32 cpu, both ways", None, "product")
    measure(
        benchmark,
        row,
        ours=lambda: evaluate_retrieval(images, captions),
        floor=lambda: i_flat @ c_flat.T,
        peers={},
        operations=2.0 * 4000 * 20_000 * 256,
        rounds=5,
    )


COCO_SIZE = """
import json, sys, torch
from benchmarks.memory import peak_beyond_inputs_and_results
from setemb.evaluation import evaluate_retrieval

torch.set_num_threads(int(sys.argv[1]))

def sets(n):
    result = torch.empty(n, 4, 1024)
    for part in result.split(1000):
        torch.nn.functional.normalize(part.normal_(), dim=-1, out=part)
    return result

evaluate_retrieval(sets(100), sets(500))
images, captions = sets(5000), sets(25_000)
def evaluate():
    evaluate_retrieval(images, captions)
    evaluate_retrieval(images, captions, folds=5)
    return ()
print(json.dumps(peak_beyond_inputs_and_results(evaluate)))
"""


def test_evaluation_of_coco_size(benchmark: BenchmarkFixture) -> None:
    images, captions = (unit_sets(n, 4, 1024, torch.float32, "cpu") for n in (5000, 25_000))
    flat = captions.flatten(0, 1)

    def product() -> None:
        for part in images.flatten(0, 1).split(BLOCK):
            for other in flat.split(BLOCK):
                part @ other.T

    row = Row("evaluate_retrieval", "5,000 x 25,000 K4 D1024 float32 cpu, both ways", None, "product in blocks")
    measure(
        benchmark,
        row,
        ours=lambda: evaluate_retrieval(images, captions),
        floor=product,
        peers={},
        operations=2.0 * 20_000 * 100_000 * 1024,
        rounds=3,
    )


def test_memory_of_evaluation_of_coco_size() -> None:
    """Of 5K and of five folds of 1K, in a process of its own."""
    command = [sys.executable, "-c", COCO_SIZE, str(torch.get_num_threads())]
    told = subprocess.run(command, check=True, capture_output=True, text=True, cwd=Path(__file__).parents[1]).stdout
    row = Row("evaluate_retrieval", "peak memory, 5,000 x 25,000 K4 D1024 float32 cpu, 5K and 1K", None, "")
    row.memory_mib, row.limit_mib = json.loads(told), 256.0
    ROWS.append(row)
