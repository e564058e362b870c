"""Tries `gpu_cases`, which `make gpu` runs, where there is no GPU."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch

from tests.kernels.cuda.emulate import CSRC, compiler

pytestmark = [
    pytest.mark.skipif(compiler() is None, reason="no C++ compiler"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU `make gpu` runs all of it"),
]


def test_some_cases() -> None:
    which = "same_bits or hardest or masks or bias- or sliced- or keys or one_against or alone or tf32"
    options = ["-q", "-p", "no:cacheprovider", "tests/kernels/cuda/gpu_cases.py", "-k", which]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *options], cwd=CSRC.parents[1], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout[-6000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) > 60, run.stdout
