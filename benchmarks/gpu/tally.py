"""A pytest plugin: one line of JSON a test, written as it ends, so that a run that is cut off leaves what it had.

pytest -p benchmarks.gpu.tally --tally FILE
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.stages import read_lines


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--tally", type=Path, help="file to which a line is added for each test")


def pytest_configure(config: pytest.Config) -> None:
    path = config.getoption("--tally")
    if path is not None and not hasattr(config, "workerinput"):  # with pytest-xdist: only where all results come in
        config.pluginmanager.register(Tally(path), "setemb-tally")


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
    counts = {outcome: sum(line["outcome"] == outcome for line in lines) for outcome in ("passed", "failed", "skipped")}
    failures = [f"{line['test']}: {line['why']}" for line in lines if line["outcome"] == "failed"]
    return counts | {"first_failures": failures[:10]}
