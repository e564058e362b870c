"""Builds, tests and measures on a machine with a GPU, in at most so many minutes; prints one short table last.

python -m benchmarks.gpu [--out FOLDER] [--minutes 8] [--device cpu --quick]

Uses the python that is there, with its torch and CUDA; installs nothing, changes no setting of the card. First at the
same time, as all of it is work for the processors: both builds, the tests, and what the measured rows compile. Then,
with the machine to itself, the measuring; then the sanitizers. A shorter run has less time to measure.

Writes <device>-<date>.json and logs; the file is written anew after each stage, so that what one stage found outlives
the failure of the next. `--device cpu --quick` is a dry run: the same steps, with tiny sizes, on the CPU's kernels.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu import tally
from benchmarks.gpu.stages import Ended, Run, Stage, last_line, read_lines, run_process
from benchmarks.gpu.table import AGAIN, table

ROOT = Path(__file__).resolve().parents[2]
MINUTES = 8.0
SECONDS = {"machine": 30, "build c++": 90, "build cuda": 90}
"""At most, of each of these stages. Both builds at the same time, and nothing beside them: together with tests and
`compile` neither ended in 150 s on 16 processors, where alone they take 39 and 69."""
PREPARING = 180.0
"""Of tests and `compile`, which are done at the same time."""
SANITIZERS = {"memcheck": ("cuda", "triton"), "racecheck": ("cuda",)}
"""And whose kernels they watch, those of CUDA C++ first."""
NOT_SANITIZED = {"memcheck": (), "racecheck": ("--plain-products",)}
"""Under racecheck of CUDA 13.0, on an H100, the first product of cuBLAS after a kernel of ours, be it Triton's or CUDA
C++'s, ended in an "Internal Sanitizer Error: The Sanitizer failed to handle a hardware exception"."""
SANITIZING = 50.0
"""Of both at the same time, after measuring, which leaves them that unless it has less than `MEASURING` itself."""
MEASURING = 100.0
KEPT_BACK = 15.0
RESTARTS = 8
"""Of the measuring process, when a kernel ends it."""
WORKERS = {"triton": 11, "cuda": 3}
"""Processes that share these tests, where pytest-xdist is there. Those of CUDA C++ compile nothing."""
SECONDS_A_TEST = 80
"""Where pytest-timeout is there; the processors have more to do."""
COMPILERS = 3
"""Processes that share the rows whose compilation is done beforehand, each of which holds one row's tensors, 10 GB at
most; one more does so for the sanitizers' calls."""

ONE_THREAD = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
"""Of each process of tests and `compile`: they share the processors, and tests are judged there. With a thread for each
processor in each of 18 processes 67 tests took 180 s."""

Process = Callable[..., Ended]


class GpuRun:
    """The stages, one after the other or at the same time."""

    def __init__(self, out: Path, device: str, quick: bool, minutes: float = MINUTES, process: Process = run_process):
        self.out, self.device, self.quick, self.process = out, device, quick, process
        out.mkdir(parents=True, exist_ok=True)
        self.date = datetime.date.today().isoformat()
        self.run = Run(out / f"unknown-{self.date}.json", minutes * 60)
        self.run.content |= {"date": self.date, "dry_run": device == "cpu"}
        self.caches: dict[str, str] = {}

    def all(self) -> int:
        """Every stage; 0 where all went well."""
        if self.run.stage("machine", SECONDS["machine"], self.machine).status != "ok":
            print(self.run.content["stages"][-1]["detail"])
            self.run.path.unlink()
            return 1
        self.run.move(self.out / f"{_file_name(self.run.content['device'])}-{self.date}.json")
        with tempfile.TemporaryDirectory(prefix="setemb-gpu-", ignore_cleanup_errors=True) as caches:
            # of the rows alone: torch.compile would move Triton's to a place of its own
            self.caches = {"TORCHINDUCTOR_CACHE_DIR": f"{caches}/inductor", "TRITON_CACHE_DIR": f"{caches}/triton"}
            if self.device == "cuda":
                self.run.together(*self.builds())
            self.run.together(*self.preparations())
            left = self.run.left - KEPT_BACK
            self.run.stage("benchmarks", max(left - SANITIZING, min(left, MEASURING)), self.benchmarks)
            self.run.together(
                *(partial(self.run.stage, tool, SANITIZING, partial(self.sanitizer, tool=tool)) for tool in SANITIZERS)
            )
        print(table(self.run.content))
        print(f"all numbers: {self.run.path}")
        return 0 if all(stage["status"] in ("ok", "absent") for stage in self.run.content["stages"]) else 1

    def builds(self) -> list[Callable[[], object]]:
        def build(name: str, cpu: str, cuda: str) -> Callable[[], object]:
            return partial(self.run.stage, name, SECONDS[name], partial(self.build, cpu=cpu, cuda=cuda))

        return [build("build c++", _cpu_module(), "0"), build("build cuda", "none", "1")]

    def preparations(self) -> list[Callable[[], object]]:
        """What is done at the same time before measuring. Without a module all tests of CUDA C++ fail."""
        names = ("triton", "cuda") if self.device == "cuda" else ("cpu",)
        bodies: dict[str, Callable[[Stage, float], None]] = {
            "tests" if name == "cpu" else f"tests {name}": partial(self.tests, which=name) for name in names
        }
        bodies["compile"] = self.compile
        return [partial(self.run.stage, name, PREPARING, body) for name, body in bodies.items()]

    def python(
        self, stage: Stage, limit: float, *arguments: str, log: str, before: tuple[str, ...] = (), **environment: str
    ) -> Ended:
        """Run python and say how it ended."""
        environment = {"PYTHONUNBUFFERED": "1", **environment}
        ended = self.process([*before, sys.executable, *arguments], self.out / log, limit, ROOT, environment)
        stage.detail = ""
        stage.status = "out of time" if ended.status is None else "failed" if ended.status else "ok"
        if stage.status == "failed":
            stage.detail = f"exit {ended.status}: {last_line(self.out / log)}"
        return ended

    def machine(self, stage: Stage, limit: float) -> None:
        log = self.out / "machine.log"
        log.unlink(missing_ok=True)
        self.python(stage, limit, "-m", "benchmarks.gpu.machine", "--device", self.device, log=log.name)
        if stage.status == "ok":
            self.run.content |= json.loads(log.read_text().splitlines()[-1])
            stage.detail = self.run.content["device"]
        elif stage.status == "failed":
            stage.detail = last_line(log)
        log.unlink()

    def build(self, stage: Stage, limit: float, cpu: str, cuda: str) -> None:
        """For this machine alone. CUDA apart: then a failure of the one leaves the other."""
        which = "cuda" if cuda == "1" else "cpp"
        self.python(
            stage,
            limit,
            *("setup.py", "build_ext", "--inplace", "--build-temp", f"build/gpu-{which}"),
            log=f"build-{which}.log",
            SETEMB_CUDA=cuda,
            SETEMB_CPU=cpu,
            TORCH_CUDA_ARCH_LIST=self.run.content["capability"],
            NVCC_APPEND_FLAGS=f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -lineinfo".strip(),  # for the sanitizers
        )

    def tests(self, stage: Stage, limit: float, which: str) -> None:
        """CUDA C++ and Triton in processes of their own: after an illegal access a process has lost the device."""
        lines = self.out / f"tests-{which}.jsonl"
        lines.unlink(missing_ok=True)
        if which == "cpu":
            what = ["tests/kernels/slot_attention/test_table.py", "-k", "test_op and paper and float32"]
        else:
            name = {"cuda": "gpu_cases.py", "triton": "triton_cases.py"}[which]
            paths = sorted(ROOT.glob(f"tests/kernels/*/{name}"), key=lambda path: (path.stat().st_size, path))
            what = [str(path.relative_to(ROOT)) for path in paths]
        options = ["-q", "-p", "no:cacheprovider", "-p", "benchmarks.gpu.tally", "--tally", str(lines)]
        if which in WORKERS and importlib.util.find_spec("xdist"):
            options += ["-n", str(WORKERS[which])]
        if importlib.util.find_spec("pytest_timeout"):  # by a thread: a signal does not reach who waits for a device
            options += ["--timeout", str(SECONDS_A_TEST), "--timeout-method", "thread"]
        self.python(stage, limit, "-m", "pytest", *options, *what, log=f"tests-{which}.log", **ONE_THREAD)
        stage.data = tally.summary(lines)
        stage.detail = ", ".join(f"{stage.data[outcome]} {outcome}" for outcome in ("passed", "failed", "skipped"))
        if stage.status == "ok" and not stage.data["passed"]:
            stage.status = "failed"
        lines.unlink(missing_ok=True)

    def compile(self, stage: Stage, limit: float) -> None:
        """Fills the caches for the rows by several processes. One that fails costs time alone: measuring compiles what
        is not there."""
        lines = self.out / "compile.jsonl"
        lines.unlink(missing_ok=True)
        of = 1 if self.quick else COMPILERS
        ends = [Stage(str(part)) for part in range(of)]
        common = ["-m", "benchmarks.gpu.bench", "--results", str(lines), "--device", self.device]
        common += ["--quick"] if self.quick else []
        environment = self.caches | ONE_THREAD | {"TORCHINDUCTOR_COMPILE_THREADS": "1"}
        calls = Stage("sanitizers' calls")
        small = ("-m", "benchmarks.gpu.small_cases", "--device", self.device)
        self.run.together(
            *(
                partial(
                    self.python,
                    *(end, limit, *common, "--compile-only", end.name, str(of)),
                    log="benchmarks.log",
                    **environment,
                )
                for end in ends
            ),
            partial(self.python, calls, limit, *small, log="benchmarks.log", **environment),
        )
        ends.append(calls)
        found = read_lines(lines)
        failures = [f"{line['compiled']}, {name}: {why}" for line in found for name, why in line["failed"].items()]
        stage.status = "ok" if found else "absent"
        stage.detail = f"{len(found)} rows"
        failures += [f"part {end.name}: {end.detail or end.status}" for end in ends if end.status != "ok"]
        if failures:
            stage.data = {"failures": failures}
            stage.detail += f", {len(failures)} failures"
        lines.unlink(missing_ok=True)

    def sanitizer(self, stage: Stage, limit: float, tool: str) -> None:
        """compute-sanitizer over a few small calls; in a dry run the calls alone."""
        found = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
        if self.device == "cuda" and found is None:
            stage.status, stage.detail = "absent", "compute-sanitizer is not installed"
            return
        before = ()
        if self.device == "cuda":
            before = (str(found), "--tool", tool, "--error-exitcode", "9", *_kernel_filter(str(found)))
        log = self.out / f"{tool}.log"
        log.unlink(missing_ok=True)
        arguments = ["-m", "benchmarks.gpu.small_cases", "--device", self.device]
        if self.device == "cuda":
            arguments += [*NOT_SANITIZED[tool], "--of", *SANITIZERS[tool]]
        # each tensor an allocation of its own: else torch's pool hides what reads past the end
        environment = self.caches | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        self.python(stage, limit, *arguments, log=log.name, before=before, **environment)
        text = log.read_text(errors="replace")
        summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
        calls = sum(map(int, re.findall(r": (\d+) calls", text)))
        if "Device not supported" in text:
            stage.status, stage.detail = "absent", "compute-sanitizer does not support this device"
        elif stage.status == "ok":
            stage.detail = f"{calls} calls" + (f", {summary[-1]}" if summary else "")
        elif stage.status == "out of time":
            said = re.findall(r"^={9} (?!COMPUTE-SANITIZER)\S.*", text, re.M)
            stage.detail = f"{calls} calls had ended, " + (said[0] if said else "without an error")
        if stage.status == "ok" and (not calls or (self.device == "cuda" and not summary)):
            stage.status = "failed"

    def benchmarks(self, stage: Stage, limit: float) -> None:
        lines = self.out / "benchmarks.jsonl"
        lines.unlink(missing_ok=True)
        until = time.time() + limit
        skip: list[tuple[str, str]] = []
        ends: list[str] = []
        for _ in range(1 + RESTARTS):
            left = until - time.time()
            if left <= 0:
                stage.status = "out of time"
                break
            arguments = ["-m", "benchmarks.gpu.bench", "--results", str(lines), "--device", self.device]
            arguments += ["--until", str(until - 10), *(["--quick"] if self.quick else [])]
            arguments += [word for pair in skip for word in ("--skip", *pair)]
            self.python(stage, left, *arguments, log="benchmarks.log", **self.caches)
            self.collect(lines)
            if stage.status != "failed":
                break
            begun = _last_begun(lines)
            if begun is None or begun in skip:
                break
            skip.append(begun)
            ends.append(f"{' '.join(begun)}: {stage.detail}")
        rows = self.run.content["rows"]
        done = sum(bool(row.get("milliseconds") or row.get("batches")) for row in rows)
        stage.detail = f"{done} of {len(rows)} rows" + (f"; {stage.detail}" if stage.detail else "")
        if skip:
            stage.data = {"ended_the_process": ends}
        if not done or any(reason == "ended the process" for row in rows for reason in row.get("failed", {}).values()):
            stage.status = "failed"
        lines.unlink(missing_ok=True)

    def collect(self, lines: Path) -> None:
        """What the measuring process has written so far, both passes of a row as one."""
        rows: dict[str, dict[str, Any]] = {}
        planned: dict[str, dict[str, Any]] = {}
        for line in read_lines(lines):
            if "ceilings" in line:
                self.run.content["ceilings"], self.run.content["clock"] = line["ceilings"], line["clock"]
            for op, name in line.get("plan", ()):
                key = f"{op} {name}"
                planned[key] = {"row": key, "op": op, "name": name, "failed": {"all": "no time left"}}
            if "row" not in line:
                continue
            phase = line.pop("phase")
            row = rows.setdefault(line["row"], {"failed": {}})
            if phase == "plain":
                row |= {k: v for k, v in line.items() if k != "failed"}
            else:  # the product and ours were measured again: ratios are within a pass
                times = line.get("milliseconds", {})
                for name, values in (("milliseconds", times), ("spread", line.get("spread", {}))):
                    row.setdefault(name, {}).update(
                        {who if who == "compiled" else f"{who}{AGAIN}": value for who, value in values.items()}
                    )
            row["failed"] |= {
                "compiled" if phase == "compiled" and name == "all" else name: why
                for name, why in line.get("failed", {}).items()
            }
        rows |= {key: row for key, row in planned.items() if key not in rows}
        self.run.content["rows"] = list(rows.values())
        self.run.content["clocks"]["after"] = next(
            (row["clocks"] for row in reversed(list(rows.values())) if row.get("clocks")), {}
        )
        self.run.write()


def _cpu_module() -> str:
    """Of the modules for CPUs the one that serves here."""
    return {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "default")


def _last_begun(lines: Path) -> tuple[str, str] | None:
    """What was begun and did not end: a row and an implementation."""
    begun = None
    for line in read_lines(lines):
        begun = (line["begin"], line["implementation"]) if "begin" in line else None
    return begun


def _kernel_filter(sanitizer: str) -> tuple[str, ...]:
    """Options by which it watches our kernels alone, not those of torch; none where it has no such option.

    Names of CUDA C++ kernels hold their namespace, those of Triton are their functions'.
    """
    try:
        options = subprocess.run([sanitizer, "--help"], capture_output=True, text=True, timeout=10, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    if "--kernel-name" not in options:
        return ()
    sources = sorted(ROOT.glob("setemb_kernels/**/triton_*.py"))
    names = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source.read_text(), re.M)}
    return tuple(word for name in ("setemb", *sorted(names)) for word in ("--kernel-name", f"kns={name}"))


def _file_name(device: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results", help="folder for the results")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--quick", action="store_true", help="tiny sizes; with --device cpu only")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="at most, for all (default: %(default)s)")
    args = parser.parse_args(arguments)
    if (args.device == "cpu") != args.quick:
        parser.error("--device cpu and --quick: expected both (a dry run) or neither")
    return GpuRun(args.out.resolve(), args.device, args.quick, args.minutes).all()


if __name__ == "__main__":
    sys.exit(main())
