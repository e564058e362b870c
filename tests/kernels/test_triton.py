"""The Triton backend: `triton_cases` of each op, on the GPU where there is one, else under Triton's interpreter.

In a process of its own, as TRITON_INTERPRET must be set before triton is imported and would hold for every other test.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

triton = pytest.importorskip("triton")


def _version(module: Any) -> tuple[int, int]:
    major, minor = module.__version__.split(".")[:2]
    return int(major), int(minor)


WITHOUT_GPU = not torch.cuda.is_available()
OPS = ("losses", "set_similarity", "slot_attention", "smooth_chamfer")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[subprocess.Popen[bytes], Path]]]:
    """A process for each op, all at once (on a GPU they would be in each other's way: there one after the other)."""
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    if WITHOUT_GPU:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    started: dict[str, tuple[subprocess.Popen[bytes], Path]] = {}
    for op in OPS:
        cases = Path(__file__).parent / op / "triton_cases.py"
        output = tmp_path_factory.mktemp(op) / "output"
        command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", str(cases)]
        with output.open("wb") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, cwd=cases.parents[3]
            )
        started[op] = (process, output)
        if not WITHOUT_GPU:
            process.wait()
    yield started
    for process, _ in started.values():
        process.kill()
        process.wait()


@pytest.mark.skipif(
    WITHOUT_GPU and _version(triton) < (3, 7) and _version(numpy) >= (2, 4),
    reason="no GPU, and the interpreter of Triton before 3.7 does not work with numpy 2.4 or newer",
)
@pytest.mark.parametrize("op", OPS)
def test_cases(op: str, runs: dict[str, tuple[subprocess.Popen[bytes], Path]]) -> None:
    process, file = runs[op]
    status, output = process.wait(), file.read_text()
    assert status == 0, output[-20_000:]
    summary = output.strip().splitlines()[-1]
    passed = re.search(r"(\d+) passed", summary)
    assert passed and int(passed[1]) > 100 and "skipped" not in summary, summary
