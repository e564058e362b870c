"""Builds kernels for the host (see emulator.h) and calls them through ctypes, on torch's CPU tensors."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[2] / "csrc/cuda"
ORDERS = (0, 1, 2, 3)
"""Forward, reverse, and two at random: what `Emulator.order` takes."""

FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
POISON = "-ftrivial-auto-var-init=pattern"
"""Variables start as a pattern, so that one that is read before it is written shows."""


def compiler() -> str | None:
    """The system's C++ compiler, if there is one."""
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")


def build(source: Path, *options: str) -> Path:
    """Compile a .cpp file to a shared library, once for each content of it and of all sources of the kernels."""
    command = compiler()
    assert command, "no C++ compiler"
    digest = hashlib.sha256(" ".join([command, torch.__version__, *options]).encode())
    for file in (source, *sorted(CSRC.glob("*.h")), *sorted(CSRC.glob("*.cpp")), *sorted(HERE.glob("*.h"))):
        digest.update(file.read_bytes())
    library = (
        Path(tempfile.gettempdir()) / f"setemb_emulated_{os.getuid()}" / f"{source.stem}_{digest.hexdigest()[:16]}.so"
    )
    if not library.exists():
        library.parent.mkdir(exist_ok=True, mode=0o700)
        beside = library.with_suffix(f".{os.getpid()}")
        common = [command, *FLAGS, f"-I{CSRC}", f"-I{HERE}", str(source), "-o", str(beside), *options]
        run = subprocess.run([*common, POISON], capture_output=True, text=True, check=False)
        if run.returncode and POISON in run.stderr:  # a compiler older than the option
            run = subprocess.run(common, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr[-8000:]
        beside.replace(library)
    return library


class EmulationError(RuntimeError):
    """What the emulator found wrong."""


class Emulator:
    """A library of emulated kernels."""

    def __init__(self, source: Path) -> None:
        self.library = ctypes.CDLL(str(build(source)))
        self._kept: list[Tensor] = []

    def reset(self, order: int = 0) -> None:
        """Forget all buffers and counts, and choose the order of threads."""
        self.library.emulator_reset()
        self.library.emulator_order(order)
        self._kept.clear()

    def register(self, t: Tensor | None, writable: bool = False) -> None:
        """Let kernels read (or also write) what a tensor reaches, from its first element to its last."""
        if t is None or not t.numel():
            return
        reach = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
        size = t.element_size()
        self.library.emulator_register(
            ctypes.c_void_p(t.data_ptr()), ctypes.c_size_t(reach * size), ctypes.c_size_t(size), int(writable)
        )
        self._kept.append(t)

    def writes(self, t: Tensor) -> tuple[int, int]:
        """How often the elements of a registered tensor were written: the least and the most."""
        least, most = ctypes.c_int(), ctypes.c_int()
        self.library.emulator_writes(ctypes.c_void_p(t.data_ptr()), ctypes.byref(least), ctypes.byref(most))
        return least.value, most.value

    def counts(self) -> tuple[int, int, int]:
        """Phases of reads by a warp, what of them waited for a bank of shared memory, and tensor-core instructions."""
        numbers = [ctypes.c_long() for _ in range(3)]
        self.library.emulator_counts(*(ctypes.byref(n) for n in numbers))
        return numbers[0].value, numbers[1].value, numbers[2].value

    def call(self, function: str, *arguments: Any) -> None:
        """Call an ``extern "C"`` function that ends with (message, size); tensors are passed by their address."""
        message = ctypes.create_string_buffer(1024)
        if getattr(self.library, function)(*map(_argument, arguments), message, ctypes.c_size_t(len(message))):
            raise EmulationError(message.value.decode())


class View(ctypes.Structure):
    """A tensor with its sizes and strides: see tensors.h."""

    _fields_ = (("data", ctypes.c_void_p), ("sizes", ctypes.c_int64 * 4), ("strides", ctypes.c_int64 * 4))


def view(t: Tensor | None) -> Any:
    """What a function that takes a View is passed; null for None."""
    if t is None:
        return ctypes.c_void_p(None)
    four = ctypes.c_int64 * 4
    return ctypes.pointer(View(t.data_ptr(), four(*t.shape), four(*t.stride())))


def _argument(value: Any) -> Any:
    if value is None or isinstance(value, Tensor):
        return ctypes.c_void_p(None if value is None else value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_double(value)
    if isinstance(value, (bool, int)):
        return ctypes.c_int64(int(value))
    return value


def poisoned(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Memory that holds NaN, or the largest number of an integer type's bytes."""
    t = torch.empty(tuple(shape), dtype=dtype)
    return t.fill_(float("nan") if t.is_floating_point() else -1)
