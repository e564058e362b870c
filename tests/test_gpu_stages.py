"""Stages of `make gpu`, the processes they run, and what these leave: files that may be cut off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu import machine, tally
from benchmarks.gpu.stages import Run, Stage, read_lines, run_process

ROOT = Path(__file__).parent.parent


def test_a_process_is_ended_with_all_it_started(tmp_path: Path) -> None:
    alive = tmp_path / "alive"
    start_another = f"subprocess.run([sys.executable, '-c', {grandchild(alive)!r}])"
    script = f"import subprocess, sys; print('begun', flush=True); {start_another}"
    start = time.monotonic()
    ended = run_process([sys.executable, "-c", script], tmp_path / "log", 2.0, ROOT)
    assert ended.status is None and 2.0 <= ended.seconds < 10
    assert time.monotonic() - start < 10
    assert "begun" in (tmp_path / "log").read_text()
    size = alive.stat().st_size
    time.sleep(0.3)
    assert alive.stat().st_size == size > 0


def grandchild(alive: Path) -> str:
    return f"import time\nwhile True: open({str(alive)!r}, 'a').write('.'); time.sleep(0.02)"


def test_a_stage_that_fails_leaves_the_others(tmp_path: Path) -> None:
    now = [0.0]
    run = Run(tmp_path / "file.json", 100, now=lambda: now[0])

    def good(stage: Stage, limit: float) -> None:
        stage.status, now[0] = "ok", now[0] + 60

    def bad(stage: Stage, limit: float) -> None:
        raise RuntimeError("does not compile")

    run.stage("first", 80, good)
    run.stage("second", 80, bad)
    assert run.content["stages"][1] == {
        **{"name": "second", "status": "failed", "seconds": 0.0, "limit": 40.0},
        "detail": "RuntimeError: does not compile",
    }
    run.stage("third", 80, good)
    assert run.stage("fourth", 80, good).status == "out of time"
    stages = json.loads((tmp_path / "file.json").read_text())["stages"]
    assert [stage["status"] for stage in stages] == ["ok", "failed", "ok", "out of time"]


def test_stages_at_the_same_time(tmp_path: Path) -> None:
    """In the file in the order in which they began, each as it came out."""
    run = Run(tmp_path / "file.json", 100)
    both, first_ended = threading.Barrier(2, timeout=20), threading.Event()

    def fails(stage: Stage, limit: float) -> None:
        both.wait()
        raise RuntimeError("no compiler")

    def good(stage: Stage, limit: float) -> None:
        stage.status = "ok"  # not over yet: no line
        both.wait()
        first_ended.wait(20)

    def first() -> None:
        run.stage("first", 50, fails)
        assert [line["name"] for line in json.loads((tmp_path / "file.json").read_text())["stages"]] == ["first"]
        first_ended.set()
        run.stage("after first", 50, lambda stage, limit: setattr(stage, "status", "ok"))

    run.together(first, lambda: run.stage("second", 50, good))
    content = json.loads((tmp_path / "file.json").read_text())
    statuses = {line["name"]: line["status"] for line in content["stages"]}
    assert statuses == {"first": "failed", "second": "ok", "after first": "ok"}
    assert [line["name"] for line in content["stages"]][2] == "after first"
    assert 0 <= content["seconds"] < 60


def test_a_line_that_was_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text('{"a": 1}\n{"b": ')
    assert read_lines(path) == [{"a": 1}]
    assert read_lines(tmp_path / "none") == []


def test_clocks() -> None:
    assert machine.clocks("1980, 3201, 1980, 3201, 45, [N/A]\n") == {
        **{"sm_mhz": 1980, "memory_mhz": 3201, "sm_max_mhz": 1980, "memory_max_mhz": 3201, "temperature_c": 45}
    }
    assert machine.clocks("no devices were found\n") == {}


def test_tally_of_a_run_that_is_cut_off(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text(
        "import os, pytest\n"
        "def test_good(): pass\n"
        "def test_bad(): assert 1 == 2, 'not equal'\n"
        "@pytest.mark.skip\ndef test_not(): pass\n"
        "def test_ends(): os._exit(9)\n"
    )
    lines = tmp_path / "lines"
    options = ["-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.tally", "--tally", str(lines)]
    command = [sys.executable, "-m", "pytest", *options, "--rootdir", str(tmp_path), "-c", "/dev/null", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 9, run.stdout + run.stderr
    found = tally.summary(lines)
    assert [found[outcome] for outcome in ("passed", "failed", "skipped")] == [1, 1, 1]
    (failure,) = found["first_failures"]
    assert "test_bad: AssertionError: not equal" in failure


def test_a_worker_that_lost_its_device_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """After its report was sent; what else fails leaves it alone."""
    ends: list[int] = []
    monkeypatch.setattr(os, "_exit", ends.append)
    plugins = pytest.PytestPluginManager()
    tally.pytest_configure(SimpleNamespace(pluginmanager=plugins, workerinput={}, getoption=lambda name: None))  # type: ignore[arg-type]
    assert not plugins.has_plugin("setemb-tally")

    class Interactor:  # xdist's, which is registered later
        def pytest_runtest_logreport(self, report: Any) -> None:
            ends.append(-1)

    plugins.register(Interactor())
    for failed, text in ((False, ""), (True, "AssertionError"), (True, "AcceleratorError: CUDA error: illegal access")):
        plugins.hook.pytest_runtest_logreport(report=SimpleNamespace(failed=failed, longrepr=text))
    assert ends == [-1, -1, -1, 1]
