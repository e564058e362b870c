"""`make gpu` without a GPU: the whole run on the CPU with tiny sizes, and its parts with a device that is made up."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.gpu import implementations, machine, small_cases
from benchmarks.gpu.__main__ import (
    COMPILERS,
    KEPT_BACK,
    MEASURING,
    MINUTES,
    PREPARING,
    SANITIZERS,
    SANITIZING,
    SECONDS,
    GpuRun,
    _kernel_filter,
)
from benchmarks.gpu.bench import Bench
from benchmarks.gpu.rows import rows
from benchmarks.gpu.stages import Ended, Stage
from benchmarks.gpu.timing import CudaClock, HostClock, Times, take_turns
from setemb_kernels.ops.smooth_chamfer import cuda as smooth_chamfer
from tests.test_gpu_bench import made_up_row

ROOT = Path(__file__).parent.parent
kernel_backends = importlib.import_module("setemb_kernels.backends")  # the name is also that of a function


# --- all of it


def test_dry_run(tmp_path: Path) -> None:
    """Every stage and the code of every row, each checked against eager."""
    command = ["bash", "benchmarks/gpu.sh", "--device", "cpu", "--quick"]
    environment = {"PYTHON": sys.executable, "OUT": str(tmp_path), "MINUTES": "7.5"}
    run = subprocess.run(
        command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=400, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = tmp_path.glob("*.json")
    content = json.loads(path.read_text())
    assert content["kind"] == "gpu" and content["dry_run"]
    names = [stage["name"] for stage in content["stages"]]
    assert names[0] == "machine" and names[3] == "benchmarks"
    assert (set(names[1:3]), set(names[4:])) == ({"tests", "compile"}, {"memcheck", "racecheck"})
    assert all(stage["status"] == "ok" and 0 < stage["seconds"] <= stage["limit"] for stage in content["stages"])
    limits = {stage["name"]: stage["limit"] for stage in content["stages"]}
    assert limits["benchmarks"] + SANITIZING + KEPT_BACK < 7.5 * 60
    assert max(stage["seconds"] for stage in content["stages"]) < content["seconds"] < 7.5 * 60
    assert content["versions"]["torch"] == torch.__version__ and content["versions"]["setemb"]
    assert content["clocks"]["source"].startswith("nvidia-smi")
    assert all(rate > 0 for rate in content["ceilings"].values()) and content["clock"] == HostClock.source
    table_rows = {row.key: row for row in rows("cpu", quick=True)}
    assert {row["row"] for row in content["rows"]} - set(table_rows) == {
        "set_triplet_loss largest batch K4 D1024 bfloat16"
    }
    for line in content["rows"]:
        if " hardest " in line["row"]:  # no such kernel on the CPU, and the row says so
            assert set(line["failed"].values()) == {"NotImplementedError: no such kernel"}
            assert set(line["milliseconds"]) == {"product", "product, again", "eager", "compiled"}
            continue
        assert not line["failed"], line
        if "batches" in line:
            assert line["batches"] == {"eager": 32, "ours": 32}
            continue
        row = table_rows[line["row"]]
        assert set(line["milliseconds"]) == set(line["spread"])
        names = {name for name in line["milliseconds"] if not name.endswith(", again")} - {
            "product",
            "eager",
            "compiled",
        }
        again = {"product", *names} if row.compiled is not None else set()
        assert len(names) == 1 and set(line["milliseconds"]) - names - {"product", "eager", "compiled"} == {
            f"{name}, again" for name in again
        }
        assert ("compiled" in line["milliseconds"]) == (row.compiled is not None)
        assert all(value > 0 for value in line["milliseconds"].values())
        (ours,) = names
        # bfloat16 on both sides, where a value may differ by a rounding: 2^-8; eager's own winners where they tie
        eager = 0.0 if row.judge is None else pytest.approx(0, abs=0.5)
        assert line["difference"] == {"eager": eager, ours: pytest.approx(0, abs=2**-6)}, line["row"]
    shown = run.stdout.strip().splitlines()
    assert len(shown) < 55 and all(key in run.stdout for key in table_rows)
    assert shown[-1] == f"all numbers: {path}"


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stdout.splitlines()[-1].startswith("make gpu: this torch sees no CUDA device")
    assert not list(tmp_path.iterdir())


# --- stages


Answer = Callable[[list[str], Path, dict[str, str]], Any]


def gpu_run(tmp_path: Path, answer: Answer, device: str = "cuda") -> GpuRun:
    """A run whose processes are made up: `answer` gets the command, the log and the environment."""

    def process(command: list[str], log: Path, limit: float, cwd: Path, environment: dict[str, str]) -> Ended:
        return Ended(answer(command, log, environment), 0.1)

    run = GpuRun(tmp_path, device, quick=False, process=process)
    run.run.content |= {"device": "NVIDIA X", "capability": "9.0", "clocks": {"source": ""}}
    return run


def test_builds_for_the_chip_that_is_there(tmp_path: Path) -> None:
    """Two builds that may run at the same time: each makes modules of its own, in a folder of its own."""
    seen: list[dict[str, str]] = []
    folders: set[str] = set()

    def answer(command: list[str], log: Path, environment: dict[str, str]) -> int:
        seen.append(environment)
        folders.add(command[command.index("--build-temp") + 1])
        return 0

    for cuda, cpu in (("0", "avx2"), ("1", "none")):
        stage = Stage("build")
        gpu_run(tmp_path, answer).build(stage, 1.0, cpu=cpu, cuda=cuda)
        assert stage.status == "ok"
        assert (seen[-1]["SETEMB_CUDA"], seen[-1]["SETEMB_CPU"]) == (cuda, cpu)
        assert seen[-1]["TORCH_CUDA_ARCH_LIST"] == "9.0"
        assert "-lineinfo" in seen[-1]["NVCC_APPEND_FLAGS"].split()
    assert len(folders) == 2


@pytest.mark.parametrize(
    ("output", "status", "expected"),
    [
        ("triton: 12 calls\n========= ERROR SUMMARY: 0 errors\n", 0, ("ok", "12 calls, ERROR SUMMARY: 0 errors")),
        (
            "triton: 12 calls\n========= ERROR SUMMARY: 3 errors\n",
            9,
            ("failed", "exit 9: ========= ERROR SUMMARY: 3 errors"),
        ),
        ("========= Device not supported\n", 1, ("absent", "compute-sanitizer does not support this device")),
        ("========= ERROR SUMMARY: 0 errors\n", 0, ("failed", "0 calls, ERROR SUMMARY: 0 errors")),
        ("triton: 12 calls\n", 0, ("failed", "12 calls")),
        ("triton: 12 calls\n", None, ("out of time", "12 calls had ended, without an error")),
        (
            "========= COMPUTE-SANITIZER\n========= Invalid __global__ read of size 4 bytes\n=========     at x\n",
            None,
            ("out of time", "0 calls had ended, ========= Invalid __global__ read of size 4 bytes"),
        ),
    ],
)
def test_sanitizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, output: str, status: int | None, expected: tuple[str, str]
) -> None:
    monkeypatch.setattr("shutil.which", lambda *args, **options: "/bin/compute-sanitizer")

    def answer(command: list[str], log: Path, environment: dict[str, str]) -> int | None:
        assert command[:3] == ["/bin/compute-sanitizer", "--tool", "memcheck"]
        assert environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1"
        log.write_text(output)
        return status

    stage = Stage("memcheck")
    gpu_run(tmp_path, answer).sanitizer(stage, 1.0, "memcheck")
    assert (stage.status, stage.detail) == expected


def test_sanitizer_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda *args, **options: None)
    stage = Stage("memcheck")
    gpu_run(tmp_path, lambda *_: 0).sanitizer(stage, 1.0, "memcheck")
    assert (stage.status, stage.detail) == ("absent", "compute-sanitizer is not installed")


def test_sanitizer_watches_our_kernels_where_it_can(tmp_path: Path) -> None:
    """A made-up one that says which options it has."""
    for options, expected in (
        ("--kernel-name arg", {"kns=setemb", "kns=forward_kernel", "kns=gather_kernel"}),
        ("", set()),
    ):
        tool = tmp_path / "compute-sanitizer"
        tool.write_text(f"#!/bin/sh\necho ' {options}'\n")
        tool.chmod(0o755)
        found = _kernel_filter(str(tool))
        assert expected <= set(found) and found.count("--kernel-name") == len(found) // 2
        assert bool(found) == bool(expected)
    assert _kernel_filter(str(tmp_path / "absent")) == ()


def test_each_group_of_tests_is_a_stage(tmp_path: Path) -> None:
    """The other runs all the same; one that runs no test has failed."""

    def answer(command: list[str], log: Path, environment: dict[str, str]) -> int:
        cuda = "tests/kernels/cuda/gpu_cases.py" in command
        assert cuda != ("tests/kernels/smooth_chamfer/triton_cases.py" in command)
        log.write_text("Segmentation fault\n")
        line = {"test": "a", "outcome": "failed", "why": "lost", "seconds": 1.0}
        with Path(command[command.index("--tally") + 1]).open("a") as lines:
            for each in [line, line] if cuda else [line | {"test": "b", "outcome": "passed"}]:
                lines.write(json.dumps(each) + "\n")
        return -11 if cuda else 0

    run, stage = gpu_run(tmp_path, answer), Stage("tests")
    run.tests(stage, 10.0, "cuda")
    assert (stage.status, stage.detail) == ("failed", "0 passed, 1 failed, 0 skipped")
    assert stage.data["first_failures"] == ["a: lost"]
    run.tests(stage, 10.0, "triton")
    assert (stage.status, stage.detail) == ("ok", "1 passed, 0 failed, 0 skipped")
    gpu_run(tmp_path, lambda *_: 0).tests(stage, 10.0, "cuda")
    assert (stage.status, stage.detail) == ("failed", "0 passed, 0 failed, 0 skipped")


def test_what_is_not_compiled_beforehand_fails_nothing(tmp_path: Path) -> None:
    seen: list[dict[str, str]] = []
    parts: list[str] = []

    def answer(command: list[str], log: Path, environment: dict[str, str]) -> int:
        seen.append(environment)
        if "--compile-only" not in command:
            assert "benchmarks.gpu.small_cases" in command
            return 0
        part, of = command[command.index("--compile-only") + 1 :][:2]
        parts.append(part)
        assert of == str(COMPILERS)
        log.write_text("Killed\n")
        if part == "2":
            return -9
        line = {
            "compiled": f"row {part}",
            "seconds": 1.0,
            "failed": {"compiled": "out of memory"} if part == "1" else {},
        }
        with Path(command[command.index("--results") + 1]).open("a") as lines:
            lines.write(json.dumps(line) + "\n")
        return 0

    run, stage = gpu_run(tmp_path, answer), Stage("compile")
    run.caches = {"TORCHINDUCTOR_CACHE_DIR": "there"}
    run.compile(stage, 10.0)
    assert sorted(parts) == [str(n) for n in range(COMPILERS)]
    assert {environment["TORCHINDUCTOR_CACHE_DIR"] for environment in seen} == {"there"}
    assert (stage.status, stage.detail) == ("ok", f"{COMPILERS - 1} rows, 2 failures")
    assert stage.data["failures"] == ["row 1, compiled: out of memory", "part 2: exit -9: Killed"]
    gpu_run(tmp_path, lambda command, log, environment: log.write_text("Killed\n") and 1).compile(stage, 10.0)
    assert (stage.status, stage.detail) == ("absent", f"0 rows, {COMPILERS + 1} failures")
    assert not list(tmp_path.glob("*.jsonl"))


def test_a_kernel_that_ends_the_process_costs_one_figure(tmp_path: Path) -> None:
    """The measuring process is started again without it, and goes on with what is not yet done."""
    commands = []

    def answer(command: list[str], log: Path, environment: dict[str, str]) -> int:
        commands.append(command)
        lines = Path(command[command.index("--results") + 1])
        log.write_text("illegal memory access\n")
        with lines.open("a") as file:
            if len(commands) == 1:
                file.write(json.dumps({"ceilings": {"a": 1.0}, "clock": "events"}) + "\n")
                file.write(json.dumps({"plan": [["op", "never"]]}) + "\n")
                file.write(
                    json.dumps({"row": "one", "phase": "plain", "milliseconds": {"product": 1.0}, "spread": {}}) + "\n"
                )
                file.write(json.dumps({"begin": "two", "phase": "plain", "implementation": "cuda"}) + "\n")
                return 3
            both = {
                "milliseconds": {"product": 2.0},
                "spread": {"product": 0.1},
                "failed": {"cuda": "ended the process"},
            }
            file.write(json.dumps({"row": "two", "phase": "plain"} | both) + "\n")
            again = {"milliseconds": {"product": 2.5, "compiled": 9.0}, "spread": {"product": 0.1, "compiled": 0.2}}
            file.write(json.dumps({"row": "two", "phase": "compiled"} | again) + "\n")
            file.write(json.dumps({"row": "one", "phase": "compiled", "failed": {"all": "no time left"}}) + "\n")
        return 0

    run = gpu_run(tmp_path, answer)
    stage = Stage("benchmarks")
    run.benchmarks(stage, 60.0)
    assert stage.status == "failed" and stage.detail == "2 of 3 rows"
    assert stage.data == {"ended_the_process": ["two cuda: exit 3: illegal memory access"]}
    assert len(commands) == 2
    assert commands[1][-3:] == ["--skip", "two", "cuda"]
    one, two, never = run.run.content["rows"]
    assert never == {"row": "op never", "op": "op", "name": "never", "failed": {"all": "no time left"}}
    assert one["failed"] == {"compiled": "no time left"}
    assert two["milliseconds"] == {"product": 2.0, "compiled": 9.0, "product, again": 2.5}
    assert two["spread"] == {"product": 0.1, "compiled": 0.2, "product, again": 0.1}
    assert two["failed"] == {"cuda": "ended the process"}
    assert run.run.content["ceilings"] == {"a": 1.0}


# --- implementations


def test_implementations_are_chosen_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(kernel_backends, "triton_absent", lambda: "")
    monkeypatch.setattr(kernel_backends, "_CUDA", {"absent": ""})

    def serving(ops: tuple[str, ...] = implementations.OPS) -> set[str]:
        rows = [row for row in kernel_backends.backends() if row.device == "cuda" and row.op in ops]
        return {row.implementation for row in rows}

    choices = implementations.ours("cuda")
    assert list(choices) == ["triton", "cuda"] and implementations.absent("cuda") == {}
    for name in ("cuda", "triton", "cuda"):
        with choices[name]():
            assert serving(implementations.KERNELS[name]) == {name}
    assert serving() == {"triton"} and {op.chosen for op in kernel_backends.OpBackends.all} == {"automatic"}
    monkeypatch.setattr(kernel_backends, "_CUDA", {"absent": "the CUDA module is not built"})
    assert list(implementations.ours("cuda")) == ["triton"]
    assert implementations.absent("cuda") == {"cuda": "the CUDA module is not built"}
    assert {op.chosen for op in kernel_backends.OpBackends.all} == {"automatic"}


def test_the_sanitizers_watch_cuda_first(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Its kernels ran in the emulator alone, and the time may not suffice for all."""
    monkeypatch.setattr(small_cases, "ours", lambda device: dict.fromkeys(("triton", "cuda"), nullcontext))
    without_cuda = len(small_cases.DTYPES) * len(small_cases.KINDS)
    calls = (small_cases.main("cpu") - without_cuda) // 2
    assert capsys.readouterr().out == f"cuda: {calls} calls\ntriton: {calls + without_cuda} calls\n"
    compiled = {slots for sizes in small_cases.SETS for slots in map(smooth_chamfer._slots, sizes[2:4])}
    assert compiled == set(smooth_chamfer.SLOTS)


def test_every_op_with_kernels_is_chosen() -> None:
    assert set(implementations.OPS) == {op.op for op in kernel_backends.OpBackends.all}


# --- what only a GPU runs, with a GPU that is made up


PROPERTIES = SimpleNamespace(
    name="NVIDIA X 1", major=9, minor=0, multi_processor_count=132, L2_cache_size=50 << 20, total_memory=80 << 30
)


@pytest.fixture
def made_up_gpu(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torch.cuda is asked for, as a list of what was done; tensors lie on the CPU."""
    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing
            self.at = -1

        def record(self) -> None:
            self.at = len(done)
            done.append("event")

        def elapsed_time(self, end: Any) -> float:
            assert "synchronize" in done[end.at :], "read before the device was done"
            return float(end.at - self.at)

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, device=None, **options: empty(*size, **options))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: PROPERTIES)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronize"))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(machine, "clocks", lambda: {"sm_mhz": 1980.0})
    monkeypatch.setattr(kernel_backends, "triton_absent", lambda: "")
    monkeypatch.setattr(kernel_backends, "_CUDA", {"absent": "the CUDA module is not built"})
    return done


def test_cuda_clock(made_up_gpu: list[str]) -> None:
    clock = CudaClock()
    assert clock._scratch.numel() * 4 == 256 << 20  # beyond three times the cache
    times = take_turns(clock, {"a": [lambda: made_up_gpu.append("a")]}, 0.0)
    assert times["a"] == Times(2.0, 0.0, 5)  # an event, the call, an event
    # a call before the rounds, to know how many; in a round both events stand around the call, nothing else
    assert made_up_gpu == [*("event", "a", "event", "synchronize"), *(5 * ["event", "a", "event"]), "synchronize"]


@pytest.mark.usefixtures("made_up_gpu")
def test_bench_on_a_gpu() -> None:
    lines: list[dict[str, Any]] = []
    row = made_up_row(make=lambda: (torch.ones(1 << 20),))
    done = [("set_triplet_loss largest batch K4 D1024 bfloat16", "plain")]
    Bench("cuda", False, lines.append, HostClock(), done=done).run([row])
    begun = [line["implementation"] for line in lines if "begin" in line]
    assert begun == ["product", "triton", "eager"]
    (line,) = (line for line in lines if "row" in line)
    assert line["failed"] == {"cuda": "the CUDA module is not built"}
    assert line["input_sets"] == 16  # of 4 MiB, the most; three times the cache would be 38
    assert line["clocks"] == {"sm_mhz": 1980.0}
    assert set(line["milliseconds"]) == {"product", "triton", "eager"}


@pytest.mark.usefixtures("made_up_gpu")
def test_description_of_a_gpu() -> None:
    found = machine.describe("cuda")
    assert found["device"] == "NVIDIA X 1" and found["capability"] == "9.0" and found["l2_bytes"] == 50 << 20
    assert found["versions"]["torch"] == torch.__version__
    assert found["clocks"]["before"] == {"sm_mhz": 1980.0}


@pytest.mark.parametrize("minutes", [MINUTES, 6.0])
def test_a_whole_run_on_a_gpu(
    minutes: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every stage; the build of CUDA fails, and all others go on."""
    monkeypatch.setattr("shutil.which", lambda *args, **options: "/bin/compute-sanitizer")
    tested: list[set[str]] = []
    caches: set[str] = set()
    compilers: list[str] = []
    described = {"device": "NVIDIA X 1", "capability": "9.0", "versions": {}, "clocks": {"source": "s", "before": {}}}

    def answer(command: list[str], log: Path, environment: dict[str, str]) -> int:
        text = " ".join(command)
        if "benchmarks.gpu.machine" in text:
            log.write_text(f"$ {text}\n{json.dumps(described)}\n")
        elif "setup.py" in text:
            log.write_text("error: nvcc\n")
            return int(environment["SETEMB_CUDA"])
        elif "--compile-only" in command:
            assert environment["OMP_NUM_THREADS"] == "1"
            compilers.append(text)
            caches.add(environment["TORCHINDUCTOR_CACHE_DIR"])
            log.write_text("")
        elif "--tally" in command:
            assert environment["OMP_NUM_THREADS"] == "1"
            tested.append({word for word in command if word.endswith("_cases.py")})
            with Path(command[command.index("--tally") + 1]).open("a") as lines:
                lines.write(json.dumps({"test": f"{len(tested)}", "outcome": "passed", "seconds": 1.0}) + "\n")
        elif "benchmarks.gpu.small_cases" in command and "compute-sanitizer" not in text:
            caches.add(environment["TORCHINDUCTOR_CACHE_DIR"])
        elif "compute-sanitizer" in text:
            tool = command[command.index("--tool") + 1]
            assert command[command.index("--of") + 1 :] == list(SANITIZERS[tool])
            assert ("--plain-products" in command) == (tool == "racecheck")
            log.write_text("triton: 12 calls\n========= ERROR SUMMARY: 0 errors\n")
        else:
            caches.add(environment["TORCHINDUCTOR_CACHE_DIR"])
            line = {"row": "one", "phase": "plain", "milliseconds": {"product": 1.0, "triton": 2.0}, "failed": {}}
            Path(command[command.index("--results") + 1]).write_text(json.dumps(line) + "\n")
        return 0

    def process(command: list[str], log: Path, limit: float, cwd: Path, environment: dict[str, str]) -> Ended:
        assert limit > 0
        return Ended(answer(command, log, environment), 0.1)

    assert GpuRun(tmp_path, "cuda", quick=False, minutes=minutes, process=process).all() == 1
    (path,) = tmp_path.glob("nvidia-x-1-*.json")
    content = json.loads(path.read_text())
    statuses = {stage["name"]: stage["status"] for stage in content["stages"]}
    tests = {"tests cuda", "tests triton"}
    assert set(statuses) == {*SECONDS, *tests, "compile", "benchmarks", *SANITIZERS}
    names = list(statuses)
    assert names[0] == "machine" and names[-3] == "benchmarks" and set(names[-2:]) == set(SANITIZERS)
    assert names.index("tests cuda") > names.index("build cuda")  # which has failed: they run, and show it
    triton = {f"tests/kernels/{op}/triton_cases.py" for op in ("losses", *implementations.OPS)}
    assert {frozenset(group) for group in tested} == {frozenset(["tests/kernels/cuda/gpu_cases.py"]), frozenset(triton)}
    assert len(tested) == 2 and len(compilers) == COMPILERS
    (cache,) = caches  # what is measured finds what was compiled; and nothing is left behind
    assert not Path(cache).parent.exists()
    limits = {stage["name"]: stage["limit"] for stage in content["stages"]}
    assert limits["benchmarks"] == pytest.approx(60 * minutes - KEPT_BACK - SANITIZING, abs=5)
    assert {name for name, status in statuses.items() if status != "ok"} == {"build cuda", "compile"}
    assert statuses["build cuda"] == "failed" and statuses["compile"] == "absent"
    assert "x 2.00" in capsys.readouterr().out
    assert not list(tmp_path.glob("*.part")) and not list(tmp_path.glob("*.jsonl"))
    assert len(list(tmp_path.iterdir())) <= 8


def test_there_is_time_to_measure_at_the_worst() -> None:
    building = max(SECONDS["build c++"], SECONDS["build cuda"])
    assert SECONDS["machine"] + building + PREPARING + MEASURING + SANITIZING + KEPT_BACK < 60 * MINUTES
