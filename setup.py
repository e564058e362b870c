"""The compiled modules: one CPU module per SIMD capability, and the CUDA one where it can be built.

Settings, from the environment: SETEMB_CUDA=auto|0|1 (1 fails where CUDA cannot be built), SETEMB_CPU=all, none or
names of the CPU modules to build, as "default,avx512" (a build for this machine alone takes less time), and torch's own
TORCH_CUDA_ARCH_LIST (else the GPUs that are here, else 8.0;9.0;10.0), MAX_JOBS and DEBUG.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import pybind11
import torch
from setuptools import Extension, setup
from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension

HERE = Path(__file__).resolve().parent
TORCH_MINIMUM = (2, 10)
CUDA_ARCHITECTURES = "8.0;9.0;10.0"
"""Where neither TORCH_CUDA_ARCH_LIST nor a GPU that is there says for which."""
OLDEST_ARCHITECTURE = (8, 0)

CAPABILITIES: dict[str, list[str]] = {"default": []}
if platform.machine() in ("x86_64", "AMD64"):
    CAPABILITIES |= {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        # torch calls a processor AVX512 if it has f, bw, vl and dq; products of bf16 and int8 are asked for at run time
        "avx512": [
            "-mavx512f",
            "-mavx512bw",
            "-mavx512vl",
            "-mavx512dq",
            "-mavx512bf16",
            "-mavx512vnni",
            "-mfma",
            "-mf16c",
        ],
    }


def version() -> str:
    found = re.search(r'__version__ = "(.+)"', (HERE / "setemb_kernels/_version.py").read_text())
    assert found, "setemb_kernels/_version.py: no __version__"
    return found.group(1)


def settings(sources: list[str], **macros: str) -> dict[str, object]:
    """What every module is built with: torch's stable ABI as of the oldest release that is supported."""
    major, minor = TORCH_MINIMUM
    macros |= {
        "SETEMB_VERSION": f'"{version()}"',
        "SETEMB_TORCH": f'"{torch.__version__}"',
        "SETEMB_TORCH_MINIMUM": f'"{major}.{minor}"',
        "TORCH_TARGET_VERSION": f"0x{major:02x}{minor:02x}000000000000",
    }
    return {
        "sources": sources,
        "depends": [str(path.relative_to(HERE)) for path in sorted((HERE / "csrc").rglob("*.h"))],
        "include_dirs": [pybind11.get_include()],
        "define_macros": list(macros.items()),
    }


def optimisation() -> list[str]:
    return ["-O0", "-g"] if os.environ.get("DEBUG", "0") not in ("", "0") else ["-O3"]


def cpu_capabilities() -> dict[str, list[str]]:
    wanted = os.environ.get("SETEMB_CPU", "all").split(",")
    if wanted in (["all"], ["none"]):
        return CAPABILITIES if wanted == ["all"] else {}
    unknown = [name for name in wanted if name not in CAPABILITIES]
    if unknown:
        raise SystemExit(
            f"SETEMB_CPU: expected all, none or names out of {', '.join(CAPABILITIES)}, got {unknown[0]!r}"
        )
    return {name: CAPABILITIES[name] for name in wanted}


def cpu_module(capability: str, flags: list[str]) -> Extension:
    name = f"_C_{capability}"
    sources = [str(path.relative_to(HERE)) for path in sorted((HERE / "csrc/cpu").glob("*.cpp"))]
    return CppExtension(
        f"setemb_kernels.{name}",
        extra_compile_args=[*optimisation(), "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", *flags],
        **settings(sources, SETEMB_MODULE=name, SETEMB_CAPABILITY=f'"{capability}"'),
    )


def cuda_absent() -> str:
    """Why the CUDA module cannot be built here; empty where it can. No GPU is needed, only torch and the toolkit."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    if CUDA_HOME is None or not (Path(CUDA_HOME) / "bin/nvcc").exists():
        return "no CUDA toolkit (nvcc) was found; CUDA_HOME says where it is"
    return ""


def cuda_architectures() -> str:
    """What the CUDA module is built for, if TORCH_CUDA_ARCH_LIST does not say: the GPUs that are here."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = {torch.cuda.get_device_capability(n) for n in range(count)}
    here = {capability for capability in here if capability >= OLDEST_ARCHITECTURE}
    return ";".join(f"{major}.{minor}" for major, minor in sorted(here)) or CUDA_ARCHITECTURES


def cuda_modules() -> list[Extension]:
    wanted = os.environ.get("SETEMB_CUDA", "auto")
    if wanted not in ("auto", "0", "1"):
        raise SystemExit(f"SETEMB_CUDA: expected auto, 0 or 1, got {wanted!r}")
    absent = cuda_absent()
    if wanted == "1" and absent:
        raise SystemExit(f"SETEMB_CUDA=1, but the CUDA module cannot be built: {absent}")
    if wanted == "0" or absent:
        print(f"setemb: without the CUDA module ({absent or 'SETEMB_CUDA=0'})")
        return []
    architectures = os.environ.get("TORCH_CUDA_ARCH_LIST") or cuda_architectures()
    os.environ["TORCH_CUDA_ARCH_LIST"] = architectures
    sources = sorted(path for path in (HERE / "csrc/cuda").iterdir() if path.suffix in (".cpp", ".cu"))
    return [
        CUDAExtension(
            "setemb_kernels._C_cuda",
            extra_compile_args={
                "cxx": [*optimisation(), "-fvisibility=hidden"],
                "nvcc": [*optimisation(), "-Xfatbin=-compress-all"],
            },
            library_dirs=[str(Path(CUDA_HOME or "") / "lib")],  # torch looks in lib64
            **settings(
                [str(path.relative_to(HERE)) for path in sources], SETEMB_CUDA_ARCHITECTURES=f'"{architectures}"'
            ),
        )
    ]


class BuildInOwnFolders(BuildExtension):
    """The same sources make several modules: each gets its own folder of object files."""

    def build_extension(self, ext: Extension) -> None:
        common = self.build_temp
        self.build_temp = str(Path(common) / ext.name)
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = common


setup(
    ext_modules=[*(cpu_module(*item) for item in cpu_capabilities().items()), *cuda_modules()],
    cmdclass={"build_ext": BuildInOwnFolders},
)
