"""The Triton backend: `triton_cases` of each op, on the GPU where there is one, else under Triton's interpreter.

In a process of its own, as TRITON_INTERPRET must be set before triton is imported and would hold for every other test.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
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


@pytest.mark.skipif(
    WITHOUT_GPU and _version(triton) < (3, 7) and _version(numpy) >= (2, 4),
    reason="no GPU, and the interpreter of Triton before 3.7 does not work with numpy 2.4 or newer",
)
@pytest.mark.parametrize("op", ["slot_attention", "smooth_chamfer"])
def test_cases(op: str) -> None:
    environment = dict(os.environ)
    environment.pop("TRITON_INTERPRET", None)
    if WITHOUT_GPU:
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    cases = Path(__file__).parent / op / "triton_cases.py"
    command = [sys.executable, "-m", "pytest", "-o", "addopts=", "-q", "-p", "no:cacheprovider", str(cases)]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=cases.parents[3])
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-2_000:]
    summary = run.stdout.strip().splitlines()[-1]
    passed = re.search(r"(\d+) passed", summary)
    assert passed and int(passed[1]) > 100 and "skipped" not in summary, summary
