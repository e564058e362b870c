"""Stages of a run: each a process with a time limit, whose result is kept whatever becomes of the next."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GRACE = 5.0
"""Seconds between asking a process to end and ending it."""


@dataclass
class Stage:
    """What came of one stage."""

    name: str
    status: str = ""
    """"ok", "failed", "out of time" or "absent"."""
    seconds: float = 0.0
    limit: float = 0.0
    detail: str = ""
    """One line: counts, or why."""
    data: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int | None
    """Its exit status; None where its time was up."""
    seconds: float


def run_process(
    command: Sequence[str], log: Path, limit: float, cwd: Path, environment: Mapping[str, str] | None = None
) -> Ended:
    """Run a command, its output into `log`, and end it and all it started when `limit` seconds are over."""
    start = time.monotonic()
    with log.open("ab") as output:
        output.write(("$ " + " ".join(command) + "\n").encode())
        output.flush()
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            cwd=cwd,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
        status: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(max(limit, 0.0))
        finally:
            for kind in (signal.SIGTERM, signal.SIGKILL):  # and what it left behind
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, kind)
                if process.poll() is not None:
                    break
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(GRACE)
            process.wait()
    return Ended(status, time.monotonic() - start)


def last_line(log: Path) -> str:
    """The last line of a log that says something."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return lines[-1][:300] if lines else ""


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one of JSON a line; of a last line that was cut off, nothing."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


class Run:
    """The result file, written anew after every stage, and the time that is left."""

    def __init__(self, path: Path, seconds: float, now: Callable[[], float] = time.monotonic) -> None:
        self.path, self._now = path, now
        self.start = now()
        self.end = self.start + seconds
        self.content: dict[str, Any] = {"kind": "gpu", "seconds": 0.0, "stages": [], "rows": []}
        self._lock = threading.RLock()
        self._lines: list[dict[str, Any]] = []
        """Of every stage that has begun, in that order; empty until it is over."""

    @property
    def left(self) -> float:
        return self.end - self._now()

    def stage(self, name: str, limit: float, body: Callable[[Stage, float], None]) -> Stage:
        """Do one stage, in the time that is left for it; whatever happens it leaves a line in the file."""
        stage = Stage(name, limit=min(limit, self.left))
        start = self._now()
        line: dict[str, Any] = {}
        with self._lock:
            self._lines.append(line)
        if stage.limit <= 0:
            stage.status, stage.detail = "out of time", "not begun"
        else:
            try:
                body(stage, stage.limit)
            except Exception as error:
                stage.status, stage.detail = "failed", f"{type(error).__name__}: {error}"[:300]
        stage.seconds = round(self._now() - start, 1)
        with self._lock:
            line |= {k: v for k, v in asdict(stage).items() if v not in ("", {})}
            self.content["stages"] = [line for line in self._lines if line]
            self.write()
        print(f"{name}: {stage.status}, {stage.seconds} s", flush=True)
        return stage

    def together(self, *stages: Callable[[], object]) -> None:
        """Do several at the same time, and wait for all; each calls `stage`."""
        with ThreadPoolExecutor(len(stages)) as pool:
            for future in [pool.submit(each) for each in stages]:
                future.result()

    def write(self) -> None:
        with self._lock:
            self.content["seconds"] = self._now() - self.start
            part = self.path.with_suffix(".part")
            part.write_text(json.dumps(_rounded(self.content), indent=1) + "\n")
            os.replace(part, self.path)

    def move(self, path: Path) -> None:
        """Go on under another name."""
        if self.path.exists():
            os.replace(self.path, path)
        self.path = path


def _rounded(value: Any) -> Any:
    """Numbers to four digits."""
    if isinstance(value, float):
        return float(f"{value:.4g}") if abs(value) < 1e6 else float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    if isinstance(value, list):
        return [_rounded(v) for v in value]
    return value
