"""Which implementation serves which op on which device, and why the others are absent."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType, TracebackType
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
    """"c++ avx512", "triton", "cuda" (CUDA C++), ... or "reference"."""
    reason: str
    """Why nothing better serves; empty when the best one does."""


@dataclass(frozen=True)
class Measured:
    """Where an op's CUDA C++ kernels were measured to be faster than Triton's, and so serve unasked."""

    op: str
    architecture: int
    """10 * major + minor of the compute capability."""
    dtype: torch.dtype
    features: tuple[int, int]
    """Least and most features of x."""


MEASURED: tuple[Measured, ...] = ()
"""Only from figures in benchmarks/results. Empty: on the GPUs that are there, of sm_90, those of Triton were as fast or
faster, and the CUDA C++ kernels as they are now have not run on a GPU."""

AUTOMATIC = "automatic"
"""What `use_backend` is told to undo a choice."""


class OpBackends:
    """The implementations of one op. Created where the op is defined; `backends` lists all of them."""

    all: ClassVar[list[OpBackends]] = []

    def __init__(
        self,
        op: str,
        triton: Callable[[], ModuleType],
        triton_dtypes: tuple[torch.dtype, ...],
        cuda: Callable[[], ModuleType] | None = None,
    ) -> None:
        self.op = op
        self.chosen = AUTOMATIC
        self._triton = triton
        self._triton_dtypes = triton_dtypes
        self._cuda = cuda
        self.all.append(self)

    def implementation(self, reference: ModuleType, x: Tensor, *others: Tensor) -> Any:
        """The module that serves tensors like these where no compiled kernel is registered.

        A module of CUDA C++ kernels has ``refusal(x, *others)``, which says why it does not serve them.
        """
        if x.device.type != "cuda" or self.chosen == "reference":
            return reference
        if self._cuda is not None and (self.chosen == "cuda" or self._measured(x)):
            cuda = self._cuda()
            refusal = cuda.refusal(x, *others)
            if not refusal:
                return cuda
            if self.chosen == "cuda":
                raise ValueError(f"{self.op}: asked for by use_backend, the CUDA C++ kernel cannot serve: {refusal}")
        if self.chosen == "triton" and x.dtype not in self._triton_dtypes:
            raise ValueError(f"{self.op}: asked for by use_backend, the Triton kernel does not take {x.dtype}")
        if x.dtype in self._triton_dtypes and (self.chosen == "triton" or not triton_absent()):
            return self._triton()  # imported on first use
        return reference

    def _measured(self, x: Tensor) -> bool:
        if self.chosen != AUTOMATIC or not MEASURED:
            return False
        major, minor = torch.cuda.get_device_capability(x.device)
        return (
            any(
                (m.op, m.architecture, m.dtype) == (self.op, 10 * major + minor, x.dtype)
                and m.features[0] <= x.shape[-1] <= m.features[1]
                for m in MEASURED
            )
            and not cuda_absent()
        )

    def absent(self, implementation: str) -> str:
        """Why an implementation cannot serve CUDA devices; empty when it can."""
        if implementation == "triton":
            return triton_absent()
        if implementation == "cuda":
            return cuda_absent() if self._cuda is not None else "this op has no CUDA C++ kernel"
        return ""

    def rows(self) -> list[Backend]:
        cpu = Backend(self.op, "cpu", f"c++ {_CPU.capability}" if _CPU.module else "reference", _CPU.reason)
        if self.chosen != AUTOMATIC:
            return [cpu, Backend(self.op, "cuda", self.chosen, "asked for by use_backend")]
        absent = triton_absent()
        return [cpu, Backend(self.op, "cuda", "reference" if absent else "triton", absent)]


class use_backend:  # noqa: N801 -- a function, to its users
    """Choose by name which implementation of an op serves CUDA devices, for the whole process.

    As a call it lasts; as a context manager it ends with the block. A backward pass takes the implementation that is
    chosen when it runs. What was asked for never falls back: where it cannot serve a call, the call raises.

    Args:
        op: "smooth_chamfer", "set_similarity" or "slot_attention".
        device: "cuda". (On the CPU the compiled module of the best capability serves.)
        implementation: "cuda" (CUDA C++; *not yet proven on a GPU*), "triton", "reference", or "automatic".

    Raises:
        ValueError: an op, a device or an implementation that there is not.
        RuntimeError: the implementation is not available here; says why.
    """

    def __init__(self, op: str, *, device: str = "cuda", implementation: str) -> None:
        found = [b for b in OpBackends.all if b.op == op]
        if not found:
            raise ValueError(f"op: expected one of {', '.join(sorted(b.op for b in OpBackends.all))}, got {op!r}")
        if device != "cuda":
            raise ValueError(f"device: expected 'cuda', the only one with a choice, got {device!r}")
        names = ("cuda", "triton", "reference", AUTOMATIC)
        if implementation not in names:
            raise ValueError(f"implementation: expected one of {', '.join(names)}, got {implementation!r}")
        reason = found[0].absent(implementation)
        if reason:
            raise RuntimeError(f"{op}: the implementation {implementation!r} cannot serve CUDA devices: {reason}")
        self._backends = found[0]
        self._before = self._backends.chosen
        self._backends.chosen = implementation

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._backends.chosen = self._before


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


_CUDA: dict[str, str] = {}
"""Once the CUDA module was looked for: under "absent", why there is none."""


def cuda_absent() -> str:
    """Why the CUDA C++ kernels can't run; empty when they can. Loads and registers them, the first time."""
    if not torch.cuda.is_available():
        return "no CUDA device"
    if "absent" not in _CUDA:
        _CUDA["absent"] = _load_cuda_module()
    return _CUDA["absent"]


def _load_cuda_module() -> str:
    name = "setemb_kernels._C_cuda"
    if importlib.util.find_spec(name) is None:
        return "the CUDA module is not built (SETEMB_CUDA=1 builds it, or says why not)"
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return f"the CUDA module does not load with torch {torch.__version__} ({error})"
    info = module.build_info()
    misfit = _misfit(info) or next(filter(None, map(_without_kernels(info), range(torch.cuda.device_count()))), "")
    if not misfit:
        module.register_ops()
    return misfit


def _without_kernels(info: dict[str, Any]) -> Callable[[int], str]:
    """Says in one sentence that a CUDA module with this build_info has no kernels for a device; "" where it has.

    Machine code runs on chips of the same major version and no lower minor one, PTX on all later ones. An architecture
    that is given by its name is not judged.
    """
    built: str = info["cuda_architectures"]
    entries = [re.fullmatch(r"(\d+)\.(\d)([af]?)(\+PTX)?", entry) for entry in re.split(r"[;,\s]+", built.strip())]

    def runs(entry: re.Match[str] | None, device: tuple[int, int]) -> bool:
        if entry is None:
            return True
        chip = (int(entry[1]), int(entry[2]))
        if entry[3]:
            return chip == device
        return chip <= device and (chip[0] == device[0] or bool(entry[4]))

    def sentence(device: int) -> str:
        capability = torch.cuda.get_device_capability(device)
        if any(runs(entry, capability) for entry in entries):
            return ""
        own = ".".join(map(str, capability))
        return (
            f"the CUDA module is built for architectures {built}, device {device} is of {own}: build it again with "
            f"TORCH_CUDA_ARCH_LIST={own}"
        )

    return sentence


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


def compiled_serves(x: Tensor) -> bool:
    """Whether the compiled CPU module serves a tensor like this."""
    return x.device.type == "cpu" and _CPU.module is not None


def triton_serves(op: str) -> bool:
    """Whether Triton's kernels may serve an op on a GPU: they can, and nothing else was asked for by name."""
    (chosen,) = (backends.chosen for backends in OpBackends.all if backends.op == op)
    return chosen in (AUTOMATIC, "triton") and not triton_absent()


def build_info() -> dict[str, Any] | None:
    """How the CPU module in use was built (compiler, capability, OpenMP, torch, ...); None where the reference
    serves."""
    return None if _CPU.module is None else dict(_CPU.module.build_info())


def backends() -> list[Backend]:
    """Every op on every device: the implementation that serves it and why nothing better does."""
    return [row for op in OpBackends.all for row in op.rows()]
