"""Rows of the drop-ins: a package's own beside the same with the package patched. Absent packages are said."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.harness import ROWS, Row, measure
from benchmarks.integrations import CASES
from benchmarks.report import INTEGRATION


@pytest.mark.parametrize("name", CASES)
def test_time(benchmark: BenchmarkFixture, name: str) -> None:
    case = CASES[name]
    reason = case.absent()
    if reason:
        pytest.skip(reason)
    own, row = case.make(1), Row(INTEGRATION, name, None, case.beside)
    ours = case.ours(1) if case.ours else own
    measure(benchmark, row, ours=ours, floor=own, peers={}, operations=0.0, rounds=5, around=case.around)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="peak memory is read from /proc")
@pytest.mark.parametrize("which", ["own", "ours"])
@pytest.mark.parametrize("name", CASES)
def test_peak_memory(name: str, which: str) -> None:
    reason = CASES[name].absent()
    if reason:
        pytest.skip(reason)
    command = [sys.executable, "-m", "benchmarks.integrations", name, which]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
    assert run.returncode == 0, run.stderr
    ROWS.append(Row(INTEGRATION, f"peak memory, {which}: {name}", None, "", memory_mib=float(run.stdout.split()[-1])))
