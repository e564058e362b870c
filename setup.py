"""The compiled modules: one CPU module per SIMD capability. Everything else about the package is in pyproject.toml."""

from __future__ import annotations

import platform
import re
from pathlib import Path

import torch
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

HERE = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "(.+)"', (HERE / "setemb_kernels/_version.py").read_text()).group(1)  # type: ignore[union-attr]
TORCH_MINIMUM = (2, 10)

CAPABILITIES = {"default": []}
if platform.machine() in ("x86_64", "AMD64"):
    CAPABILITIES |= {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512bf16", "-mfma", "-mf16c"],
    }


def cpu_module(capability: str, flags: list[str]) -> CppExtension:
    name = f"_C_{capability}"
    major, minor = TORCH_MINIMUM
    return CppExtension(
        f"setemb_kernels.{name}",
        sources=["csrc/cpu/module.cpp", "csrc/cpu/smooth_chamfer.cpp"],
        depends=[str(p) for p in sorted((HERE / "csrc").rglob("*.h"))],
        extra_compile_args=["-O3", "-std=c++20", "-fno-math-errno", "-fno-trapping-math", "-fvisibility=hidden", *flags],
        define_macros=[
            ("SETEMB_MODULE", name),
            ("SETEMB_CAPABILITY", f'"{capability}"'),
            ("SETEMB_VERSION", f'"{VERSION}"'),
            ("SETEMB_TORCH", f'"{torch.__version__}"'),
            ("SETEMB_TORCH_MINIMUM", f'"{major}.{minor}"'),
            ("TORCH_TARGET_VERSION", f"0x{major:02x}{minor:02x}000000000000"),
        ],
    )


class BuildInOwnFolders(BuildExtension):
    """The same sources make several modules: each gets its own folder of object files."""

    def build_extension(self, ext: CppExtension) -> None:
        common = self.build_temp
        self.build_temp = str(Path(common) / ext.name)
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = common


setup(
    ext_modules=[cpu_module(*item) for item in CAPABILITIES.items()],
    cmdclass={"build_ext": BuildInOwnFolders},
)
