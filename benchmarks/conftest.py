"""Prints the table of rows and writes it as one small JSON file, ``benchmarks/results/<device>-<date>.json``."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.harness import ROWS, Row
from setemb_kernels import __version__, build_info


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = (
        re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    )
    return f"{model.group(1) if model else platform.processor()} {torch.get_num_threads()} threads"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes minutes")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--results", type=Path, help="folder for the JSON file  [default: benchmarks/results]")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if not ROWS:
        return
    write = terminalreporter.write_line
    write("")
    write(f"{device_name()}, torch {torch.__version__}; ms are medians, ratios are to the floor in the same round")
    write(f"{'row':<76} {'floor':>9} {'ours':>9} {'ratio':>6} {'limit':>6}        {'eager':>8} {'compiled':>8}")
    for row in ROWS:
        write(_line(row))


def _line(row: Row) -> str:
    mark = "ok" if row.met else "MISSED"
    if row.batches:
        return f"{row.op + ' ' + row.name:<76} {', '.join(f'{k} {v:,}' for k, v in row.batches.items())} {mark}"
    if row.sections:
        parts = (f"{part} {sum(times.values()):.0f} ms" for part, times in row.sections.items())
        return f"{row.op + ' ' + row.name:<76} {', '.join(parts)}"
    if row.memory_mib is not None:
        limit = "-" if row.limit_mib is None else f"{row.limit_mib:.0f}"
        return f"{row.op + ' ' + row.name:<76} {'':>9} {row.memory_mib:>5.1f} MiB {'':>6} {limit:>6} {mark:<7}"
    ms = row.milliseconds
    times_ours = {p: f"{ms[p] / ms['ours']:.1f} x" for p in ("eager", "compiled") if p in ms}
    peers = " ".join(f"{times_ours.get(p, '-'):>8}" for p in ("eager", "compiled"))
    limit = "-" if row.limit is None else f"{row.limit:.2f}"
    times = f"{ms['floor']:>9.2f} {ms['ours']:>9.2f} {row.ratio:>6.2f} {limit:>6}"
    return f"{row.op + ' ' + row.name:<76} {times} {mark:<7} {peers}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not ROWS:
        return
    folder: Path = session.config.getoption("--results") or Path(__file__).parent / "results"
    folder.mkdir(parents=True, exist_ok=True)
    date = datetime.date.today().isoformat()
    name = re.sub(r"[^a-z0-9]+", "-", device_name().lower()).strip("-")
    path = folder / f"{name}-{date}.json"
    content = {
        "device": device_name(),
        "date": date,
        "versions": {
            "setemb": __version__,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        },
        "threads": torch.get_num_threads(),
        "cpu_module": (build_info() or {}).get("capability"),
        "rows": _with_others_of(path, [row.as_dict() for row in ROWS]),
    }
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(part, path)


def _with_others_of(path: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows, and those of an earlier run of the same day that were not measured again."""
    if not path.exists():
        return rows
    measured = {(row["op"], row["name"]) for row in rows}
    return [row for row in json.loads(path.read_text())["rows"] if (row["op"], row["name"]) not in measured] + rows
