"""The CUDA kernels compiled for chips that need not be here: no spills, registers and shared memory within limits."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

CSRC = Path(__file__).resolve().parents[3] / "csrc/cuda"
ARCHITECTURES = ("80", "90", "100")
SHARED_MEMORY, REGISTERS = 164 << 10, 65536  # of a processor of sm_80; later ones have as much or more
THREADS, BLOCKS = 128, 2  # of a block; blocks that a processor is to hold at once
SLOTS = {  # of x and of y: each number of slots, on both sides, and the extremes for each arithmetic
    "bfloat16": [(4, 4), (1, 1), (2, 1), (16, 16), (64, 64), (16, 2)],
    "float16": [(4, 4), (64, 1)],
    "tf32": [(4, 4), (8, 8)],
    "float": [(4, 4), (1, 1), (8, 8), (64, 64)],
}

ROW_TILES = (1, 2, 4)  # of slot attention: a tile has 16 rows, 32 or 64


def nvcc() -> str | None:
    """The compiler, on the path or where CUDA_HOME says."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


KERNELS = (("forward", "Forward"), ("weights", "Weight"), ("hardest", "Hardest"))  # and their parameters

pytestmark = pytest.mark.skipif(nvcc() is None, reason="no nvcc: the CUDA kernels are not compiled here")


class Kernel(NamedTuple):
    """What the assembler says of one kernel."""

    name: str
    registers: int
    stack: int
    spills: int


class Report(NamedTuple):
    """Of all kernels compiled for one architecture."""

    kernels: list[Kernel]
    assembly: dict[str, str]
    """Of each kernel, its PTX."""


def slot_attention() -> str:
    """All kernels."""
    lines = ['#include "slot_attention_kernels.h"', "namespace setemb::cuda::slots {"]
    for arithmetic in ("bfloat16", "float16", "tf32", "float"):
        for tiles in ROW_TILES:
            lines.append(f"template __global__ void gather_kernel<{arithmetic}, {tiles}>(GatherParams);")
            for backward in ("false", "true"):
                kernel = f"weights_kernel<{arithmetic}, {tiles}, {backward}>"
                lines.append(f"template __global__ void {kernel}(WeightParams);")
        lines.append(f"template __global__ void combine_kernel<{arithmetic}>(GatherParams);")
        lines.append(f"template __global__ void spread_kernel<{arithmetic}>(SpreadParams);")
    return "\n".join([*lines, "}", ""])


def smooth_chamfer() -> str:
    lines = ['#include "smooth_chamfer_launch.h"', '#include "smooth_chamfer_pack.h"', "namespace setemb::cuda {"]
    for arithmetic, sizes in SLOTS.items():
        for x, y in sizes:
            for kernel, params in KERNELS:
                if (kernel, x) == ("hardest", 1):
                    continue  # not compiled: such sets take two slots there
                lines.append(f"template __global__ void {kernel}_kernel<{arithmetic}, {x}, {y}>({params}Params);")
    for dtype in ("bfloat16", "float16", "float"):
        lines.append(f"template __global__ void pack_kernel<{dtype}>(PackParams);")
        lines.append(f"template __global__ void unpack_kernel<{dtype}>(UnpackParams);")
    return "\n".join([*lines, "}", ""])


def compile_for(source: str, architecture: str, folder: Path) -> Report:
    file = folder / f"{architecture}.cu"
    file.write_text(source)
    command = [nvcc(), "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-Xptxas", "-v", f"-I{CSRC}", "--keep"]
    run = subprocess.run(
        [*command, f"--keep-dir={folder}", "-cubin", "-o", file.with_suffix(".cubin"), file],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-4000:]
    pattern = (
        r"Compiling entry function '(\w+)'.*?\n.*?Function properties for \w+\n\s*(\d+) bytes stack frame, "
        r"(\d+) bytes spill stores, (\d+) bytes spill loads\n.*?Used (\d+) registers"
    )
    kernels = [
        Kernel(name, int(registers), int(stack), int(stores) + int(loads))
        for name, stack, stores, loads, registers in re.findall(pattern, run.stderr)
    ]
    assert len(kernels) == len(re.findall("Compiling entry function", run.stderr))
    (ptx,) = folder.glob(f"{architecture}*.ptx")
    entries = re.split(r"\.entry ", ptx.read_text())[1:]
    return Report(kernels, {re.match(r"\w+", entry)[0]: entry for entry in entries})  # type: ignore[index]


@pytest.fixture(scope="module")
def reports(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Future[Report]]:
    pool = ThreadPoolExecutor(2)
    return {
        (op.__name__, a): pool.submit(compile_for, op(), a, tmp_path_factory.mktemp(f"{op.__name__}_sm_{a}"))
        for op in (smooth_chamfer, slot_attention)
        for a in ARCHITECTURES
    }


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_smooth_chamfer(architecture: str, reports: dict[tuple[str, str], Future[Report]]) -> None:
    report = reports["smooth_chamfer", architecture].result()
    instructions = {
        "forward_kernelINS0_8bfloat16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
        "forward_kernelINS0_7float16": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
        "forward_kernelINS0_4tf32": "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
        "weights_kernelINS0_8bfloat16": "ex2.approx.ftz.f32",
        "forward_kernelIf": "fma.rn.f32",
    }
    check(report, smooth_chamfer().count("__global__"), instructions)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_slot_attention(architecture: str, reports: dict[tuple[str, str], Future[Report]]) -> None:
    instructions = {"combine_kernelIf": "add.f32"}
    for kernel in ("weights", "gather", "spread"):
        instructions |= {
            f"{kernel}_kernelINS0_8bfloat16": "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32",
            f"{kernel}_kernelINS0_7float16": "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32",
            f"{kernel}_kernelINS0_4tf32": "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32",
            f"{kernel}_kernelIf": "fma.rn.f32",
        }
    check(reports["slot_attention", architecture].result(), slot_attention().count("__global__"), instructions)


def check(report: Report, count: int, instructions: dict[str, str]) -> None:
    """So many kernels, none of which spills; those of a name have an instruction and, but for sums, copy ahead."""
    assert len(report.kernels) == count
    for kernel in report.kernels:
        assert kernel.spills == 0 and kernel.stack == 0, kernel
        assert kernel.registers * THREADS * BLOCKS <= REGISTERS, kernel
    for kernel_name, instruction in instructions.items():
        found = [text for name, text in report.assembly.items() if kernel_name in name]
        assert found and all(instruction in text for text in found), kernel_name
        assert all("cp.async.cg" in text for text in found) or kernel_name.startswith("combine"), kernel_name


def constants(op: str) -> dict[str, int]:
    """The numbers in an op's header."""
    header = (CSRC / f"{op}.h").read_text()
    value = {name: int(number) for name, number in re.findall(r"constexpr int (k\w+) = (\d+);", header)}
    assert value["kThreads"] == THREADS
    return value


def test_two_blocks_fit_a_processor() -> None:
    value = constants("smooth_chamfer")
    shared = value["kStages"] * 2 * value["kTile"] * value["kStepBytes"]
    assert BLOCKS * (shared + 1024) <= SHARED_MEMORY  # the system takes 1 KiB a block
    value = constants("slot_attention")
    ring = value["kStages"] * (64 + value["kTokens"]) * value["kStepBytes"]
    shared = ring + 64 * (value["kTokens"] + 8) * 4 + 3 * value["kMaxSlots"] * 4  # the backward's, the largest
    assert BLOCKS * (shared + 1024) <= SHARED_MEMORY
