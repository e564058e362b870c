"""Triton kernels compiled for chips that need not be here: no spills, shared memory within limits, tensor cores."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from setemb_kernels._triton import Build  # noqa: E402
from setemb_kernels.ops.slot_attention import triton as slot_attention  # noqa: E402
from setemb_kernels.ops.smooth_chamfer import triton as smooth_chamfer  # noqa: E402

SHARED_MEMORY = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}
TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
ANY_TENSOR_CORES = "|".join(TENSOR_CORES.values())  # a tile of fewer rows than the newest take
SETS = [  # K, L, masked: each branch of the tile sizes, and both ends of it
    (torch.bfloat16, 4, 4, False),
    (torch.bfloat16, 1, 1, False),
    (torch.bfloat16, 3, 7, True),
    (torch.bfloat16, 64, 64, True),
    (torch.float16, 16, 16, False),
    (torch.float32, 4, 4, False),
    (torch.float32, 3, 7, True),
    (torch.float32, 2, 1, False),
]
SLOTS = [  # heads that share keys, K, D, masked and with a bias: sizes in use, each branch of the tile sizes, both ends
    (torch.bfloat16, 4, 4, 1024, False),
    (torch.bfloat16, 4, 4, 1024, True),
    (torch.bfloat16, 1, 8, 128, False),
    (torch.bfloat16, 1, 7, 64, True),
    (torch.bfloat16, 1, 64, 1024, True),
    (torch.bfloat16, 1, 256, 64, False),
    (torch.float16, 1, 16, 256, True),
    (torch.float32, 4, 4, 1024, False),
    (torch.float32, 1, 7, 128, True),
    (torch.float32, 1, 64, 256, False),
]


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize(("dtype", "K", "L", "masked"), SETS)
def test_smooth_chamfer(dtype: torch.dtype, K: int, L: int, masked: bool, arch: int, tmp_path: Path) -> None:
    _check(smooth_chamfer.configs(K, L, 1024, dtype, arch, masked), arch, tmp_path, TENSOR_CORES[arch])


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize(("dtype", "heads", "K", "D", "masked"), SLOTS)
def test_slot_attention(
    dtype: torch.dtype, heads: int, K: int, D: int, masked: bool, arch: int, tmp_path: Path
) -> None:
    _check(slot_attention.configs(heads, K, D, dtype, masked), arch, tmp_path, ANY_TENSOR_CORES)


def _check(builds: Iterable[Build], arch: int, folder: Path, tensor_cores: str) -> None:
    for build in builds:
        source = ASTSource(fn=build.kernel, signature=build.signature, constexprs=build.constants, attrs=build.attrs)
        kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=build.options)
        cubin = folder / "kernel.cubin"
        cubin.write_bytes(kernel.asm["cubin"])
        usage = _resources(cubin)
        where = f"{build.kernel.__name__} {build.constants} for sm_{arch}: {usage}"
        assert usage["STACK"] == 0 and usage["LOCAL"] == 0, where
        assert kernel.metadata.shared <= SHARED_MEMORY[arch], where
        if build.uses_tensor_cores:
            assert re.search(tensor_cores, kernel.asm["ptx"]), where


def _resources(cubin: Path) -> dict[str, int]:
    """Registers, stack, local memory, ... of the only kernel in a file."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", report)}
