"""A pytest plugin: one line of JSON a test, written as it ends, so that a run that is cut off leaves what it had.

pytest -p benchmarks.gpu.tally --tally FILE

With pytest-xdist a worker ends after a test that met an error of the device, which stays with its process: xdist starts
another for the tests that are left.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.stages import read_lines


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tally", type=Path, help="file to which a line is added for each test")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--tally")
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(Leave(), "setemb-leave")
    elif path is not None:  # with pytest-xdist: only where all results come in
        config.pluginmanager.register(Tally(path), "setemb-tally")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """An equal share of each file at any time: where time is short, some of all has run."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    order = {item: (n + 0.5) / len(own) for own in files.values() for n, item in enumerate(own)}
    items.sort(key=order.__getitem__)


class Leave:
    """Ends a worker that has lost its device."""

    @pytest.hookimpl(trylast=True)  # after xdist has sent the report
    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed and "CUDA error" in str(report.longrepr):
            os._exit(1)


class Tally:
    """Writes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        line = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 2)}
        if report.failed:
            crash = getattr(report.longrepr, "reprcrash", None)
            text = str(report.longrepr) if crash is None else crash.message
            line["why"] = text.strip().splitlines()[0][:300] if text.strip() else ""
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def summary(path: Path) -> dict[str, Any]:
    """How many passed, failed, were skipped, and the first failures."""
    lines = read_lines(path)
    counts = {outcome: sum(line["outcome"] == outcome for line in lines) for outcome in ("passed", "skipped")}
    failures: dict[str, str] = {}  # of a test that ended its worker xdist reports once more that it did
    for line in lines:
        if line["outcome"] == "failed":
            failures.setdefault(line["test"], line["why"])
    first = [f"{test}: {why}" for test, why in failures.items()][:10]
    return counts | {"failed": len(failures), "first_failures": first}
