"""Which implementation serves which op on which device, and why the others are absent."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from setemb_kernels._version import __version__

_CAPABILITIES = {"AVX512": ("avx512", "avx2", "default"), "AVX2": ("avx2", "default")}
"""What torch calls the processor -> our modules that run there, best first. Anything else: the default one."""


@dataclass(frozen=True)
class Backend:
    """One row of `backends`."""

    op: str
    device: str
    implementation: str
    """"c++ avx512", "triton", ... or "reference"."""
    reason: str
    """Why nothing better serves; empty when the best one does."""


class OpBackends:
    """The implementations of one op. Created where the op is defined; `backends` lists all of them."""

    all: ClassVar[list[OpBackends]] = []

    def __init__(self, op: str, triton: Callable[[], ModuleType], triton_dtypes: tuple[torch.dtype, ...]) -> None:
        self.op = op
        self._triton = triton
        self._triton_dtypes = triton_dtypes
        self.all.append(self)

    def implementation(self, x: Tensor, reference: ModuleType) -> Any:
        """The module that serves tensors like x where no compiled kernel is registered."""
        if x.device.type == "cuda" and x.dtype in self._triton_dtypes and not triton_absent():
            return self._triton()  # imported on first use
        return reference

    def rows(self) -> list[Backend]:
        cpu = Backend(self.op, "cpu", f"c++ {_CPU.capability}" if _CPU.module else "reference", _CPU.reason)
        absent = triton_absent()
        cuda = Backend(self.op, "cuda", "reference" if absent else "triton", absent)
        return [cpu, cuda]


@dataclass
class _CpuModule:
    module: ModuleType | None = None
    capability: str = ""
    reason: str = ""


_CPU = _CpuModule()


def load_cpu_module() -> None:
    """Load the compiled module of the best capability, once, or note why there is none."""
    if _CPU.module is not None or _CPU.reason:
        return
    reasons = []
    for capability in _CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), ("default",)):
        name = f"setemb_kernels._C_{capability}"
        if importlib.util.find_spec(name) is None:
            reasons.append(f"{capability}: not built")
            continue
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            reasons.append(f"{capability}: does not load with torch {torch.__version__} ({error})")
            continue
        misfit = _misfit(module.build_info())
        if misfit:
            reasons.append(f"{capability}: {misfit}")
            continue
        module.register_ops()
        _CPU.module, _CPU.capability, _CPU.reason = module, capability, "; ".join(reasons)
        return
    _CPU.reason = "; ".join(reasons)


def _misfit(info: dict[str, Any]) -> str:
    """One sentence that says why a module with this build_info can't serve here; empty when it can."""
    if info["version"] != __version__:
        return f"built for setemb {info['version']}, this is {__version__}: build it again"
    if _numbers(torch.__version__) < _numbers(info["torch_minimum"]):
        return f"needs torch >= {info['torch_minimum']}, this is {torch.__version__}"
    return ""


def _numbers(version: str) -> tuple[int, int]:
    major, minor = version.split(".")[:2]
    return int(major), int(minor)


def triton_absent() -> str:
    """Why Triton kernels can't run; empty when they can."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed"
    return ""


def build_info() -> dict[str, Any] | None:
    """How the CPU module in use was built (compiler, capability, OpenMP, torch, ...); None where the reference
    serves."""
    return None if _CPU.module is None else dict(_CPU.module.build_info())


def backends() -> list[Backend]:
    """Every op on every device: the implementation that serves it and why nothing better does."""
    return [row for op in OpBackends.all for row in op.rows()]
