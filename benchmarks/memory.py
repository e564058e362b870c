"""Peak memory of a function, beyond what it was given and what it returns."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

MIB = 1 << 20


def peak_beyond_inputs_and_results(function: Callable[[], Sequence[Tensor]], device: str = "cpu") -> float:
    """MiB at the highest point of one call, less what was held before it and less the tensors it returns.

    On the CPU the process's resident memory (Linux): run it in a process of its own, with everything the call needs
    (threads, libraries) touched by a small call before. The holes that malloc keeps count. On a GPU torch's own count.
    """
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        results = function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before - _size(results)) / MIB
    if not sys.platform.startswith("linux"):
        raise RuntimeError("peak memory is read from /proc: Linux only")
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    results = function()
    return (_status("VmHWM") - before - _size(results)) / MIB


def in_a_process_of_its_own(script: str, *arguments: str) -> float:
    """The number that a program prints."""
    command = [sys.executable, "-c", script, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False)
    assert run.returncode == 0, run.stderr
    return float(run.stdout)


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1]) * 1024
