"""Triton kernels compiled for chips that need not be here: no spills, shared memory within limits, tensor cores."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from setemb_kernels._triton import Build  # noqa: E402
from setemb_kernels.losses import triton_contrast, triton_pairs, triton_tiles  # noqa: E402
from setemb_kernels.ops.set_similarity import triton as set_similarity  # noqa: E402
from setemb_kernels.ops.slot_attention import triton as slot_attention  # noqa: E402
from setemb_kernels.ops.smooth_chamfer import triton as smooth_chamfer  # noqa: E402
from setemb_kernels.ops.smooth_chamfer import triton_light  # noqa: E402

CACHE = Path(__file__).parents[2] / "build" / "triton"
"""What did not change since the last run is not compiled again: Triton names it by its source, options and version."""

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
    (torch.float32, 64, 64, True),
]
LIGHT = [  # K, L: sizes in use, and both ends
    (torch.bfloat16, 4, 4),
    (torch.bfloat16, 8, 2),
    (torch.bfloat16, 1, 1),
    (torch.bfloat16, 64, 64),
    (torch.float16, 1, 16),
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
SIMILARITIES = [  # kind, mean K and L, D, candidates: sizes in use, each branch of the tile sizes, both ends
    (torch.bfloat16, "maxsim", 32, 120, 128, False),
    (torch.bfloat16, "maxsim", 4, 4, 1024, True),
    (torch.bfloat16, "soft_maxsim", 32, 120, 128, True),
    (torch.bfloat16, "soft_maxsim", 1000, 1000, 1024, False),
    (torch.bfloat16, "match_probability", 8, 8, 512, False),
    (torch.float16, "max", 100, 100, 64, False),
    (torch.float16, "soft_maxsim", 64, 20, 256, True),
    (torch.float32, "soft_maxsim", 32, 120, 128, False),
    (torch.float32, "maxsim", 2000, 2000, 3, True),
]
LISTED = [  # K, L, D, masked and with a gradient for alpha
    (torch.bfloat16, 4, 4, 1024, False),
    (torch.bfloat16, 3, 7, 1000, True),
    (torch.bfloat16, 1, 1, 64, False),
    (torch.bfloat16, 1, 16, 512, True),
    (torch.float16, 16, 16, 256, True),
    (torch.float32, 4, 4, 1024, False),
    (torch.float32, 16, 1, 512, True),
    (torch.float32, 2, 16, 512, True),
]
CONTRAST = [  # K, L, D, masked, groups
    (torch.bfloat16, 4, 4, 1024, False, True),
    (torch.bfloat16, 1, 1, 64, False, False),
    (torch.bfloat16, 3, 7, 1024, True, True),
    (torch.bfloat16, 16, 16, 256, False, True),
    (torch.float16, 16, 16, 256, True, False),
]
CODES = [  # oldest architecture that has products of the type, kind, mean K and L, D, scaled
    (80, torch.int8, "maxsim", 32, 120, 128, True),
    (80, torch.int8, "soft_maxsim", 8, 8, 1024, False),
    (89, torch.float8_e4m3fn, "maxsim", 32, 120, 128, True),
    (89, torch.float8_e4m3fn, "chamfer", 1000, 1000, 512, False),
    (89, torch.float8_e4m3fn, "match_probability", 4, 4, 256, True),
]


@pytest.fixture(scope="module")
def reports(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[list[Report]]]]:
    """What the compiler says for each of the tests that run: in processes of their own, as many as there are cores."""
    items = [item for item in request.session.items if isinstance(item, pytest.Function)]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        yield {
            item.name: pool.submit(_compile, item.originalname, dict(item.callspec.params))
            for item in items
            if item.module is request.module
        }


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize(("dtype", "K", "L", "masked"), SETS)
def test_smooth_chamfer(
    dtype: torch.dtype,
    K: int,
    L: int,
    masked: bool,
    arch: int,
    reports: dict[str, Future[list[Report]]],
    request: pytest.FixtureRequest,
) -> None:
    _check(reports[request.node.name].result(), arch, TENSOR_CORES[arch])


@pytest.mark.parametrize("arch", [90])
@pytest.mark.parametrize(("dtype", "K", "L"), LIGHT)
def test_few_scores(
    dtype: torch.dtype,
    K: int,
    L: int,
    arch: int,
    reports: dict[str, Future[list[Report]]],
    request: pytest.FixtureRequest,
) -> None:
    found = reports[request.node.name].result()
    assert len(found) == (4 if dtype == torch.bfloat16 else 2)
    _check(found, arch, TENSOR_CORES[arch])


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize(("dtype", "heads", "K", "D", "masked"), SLOTS)
def test_slot_attention(
    dtype: torch.dtype,
    heads: int,
    K: int,
    D: int,
    masked: bool,
    arch: int,
    reports: dict[str, Future[list[Report]]],
    request: pytest.FixtureRequest,
) -> None:
    _check(reports[request.node.name].result(), arch, ANY_TENSOR_CORES)


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize(("dtype", "kind", "K", "L", "D", "candidates"), SIMILARITIES)
def test_set_similarity(
    dtype: torch.dtype,
    kind: str,
    K: int,
    L: int,
    D: int,
    candidates: bool,
    arch: int,
    reports: dict[str, Future[list[Report]]],
    request: pytest.FixtureRequest,
) -> None:
    _check(reports[request.node.name].result(), arch, ANY_TENSOR_CORES)


@pytest.mark.parametrize(
    ("arch", "dtype", "kind", "K", "L", "D", "scaled"),
    [(arch, *rest) for oldest, *rest in CODES for arch in SHARED_MEMORY if arch >= oldest],
)
def test_codes(
    arch: int,
    dtype: torch.dtype,
    kind: str,
    K: int,
    L: int,
    D: int,
    scaled: bool,
    reports: dict[str, Future[list[Report]]],
    request: pytest.FixtureRequest,
) -> None:
    _check(reports[request.node.name].result(), arch, ANY_TENSOR_CORES)


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_tiles_of_losses(arch: int, reports: dict[str, Future[list[Report]]], request: pytest.FixtureRequest) -> None:
    _check(reports[request.node.name].result(), arch, "")


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize(("dtype", "K", "L", "D", "masked", "groups"), CONTRAST)
def test_contrast(
    dtype: torch.dtype,
    K: int,
    L: int,
    D: int,
    masked: bool,
    groups: bool,
    arch: int,
    reports: dict[str, Future[list[Report]]],
    request: pytest.FixtureRequest,
) -> None:
    _check(reports[request.node.name].result(), arch, TENSOR_CORES[arch])


@pytest.mark.parametrize("arch", SHARED_MEMORY)
@pytest.mark.parametrize(("dtype", "K", "L", "D", "masked"), LISTED)
def test_listed_pairs(
    dtype: torch.dtype,
    K: int,
    L: int,
    D: int,
    masked: bool,
    arch: int,
    reports: dict[str, Future[list[Report]]],
    request: pytest.FixtureRequest,
) -> None:
    _check(reports[request.node.name].result(), arch, ANY_TENSOR_CORES)


class Report(NamedTuple):
    """What became of one kernel."""

    name: str
    usage: dict[str, int]
    shared: int
    ptx: str
    """Where it should use tensor cores, else empty."""


def _check(reports: list[Report], arch: int, tensor_cores: str) -> None:
    assert reports
    for report in reports:
        where = f"{report.name} for sm_{arch}: {report.usage}"
        assert report.usage["STACK"] == 0 and report.usage["LOCAL"] == 0, where
        assert report.shared <= SHARED_MEMORY[arch], where
        if report.ptx:
            assert re.search(tensor_cores, report.ptx), where


def _compile(test: str, parameters: dict[str, Any]) -> list[Report]:
    p, arch = parameters, parameters["arch"]
    if test == "test_smooth_chamfer":
        sizes = (1024, 256) if arch == 90 and p["dtype"] != torch.float32 else (1024,)
        builds = [b for D in sizes for b in smooth_chamfer.configs(p["K"], p["L"], D, p["dtype"], arch, p["masked"])]
    elif test == "test_few_scores":
        builds = list(triton_light.configs(p["K"], p["L"], 1024, p["dtype"], arch))
    elif test == "test_tiles_of_losses":
        builds = triton_tiles.configs()
    elif test == "test_contrast":
        builds = triton_contrast.configs(p["K"], p["L"], p["D"], p["dtype"], arch, p["masked"], p["groups"])
    elif test == "test_listed_pairs":
        builds = triton_pairs.configs(p["K"], p["L"], p["D"], p["dtype"], p["masked"])
    elif test == "test_codes":
        builds = set_similarity.configs_of_codes(p["kind"], p["K"], p["L"], p["D"], p["dtype"], p["scaled"])
    elif test == "test_set_similarity":
        builds = set_similarity.configs(p["kind"], p["K"], p["L"], p["D"], p["dtype"], p["candidates"], p["candidates"])
    else:
        builds = slot_attention.configs(p["heads"], p["K"], p["D"], p["dtype"], p["masked"])
    os.environ["TRITON_CACHE_DIR"] = str(CACHE)
    with tempfile.TemporaryDirectory() as folder:
        return [_report(build, arch, Path(folder) / "kernel.cubin") for build in builds]


def _report(build: Build, arch: int, cubin: Path) -> Report:
    source = ASTSource(fn=build.kernel, signature=build.signature, constexprs=build.constants, attrs=build.attrs)
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=build.options)
    cubin.write_bytes(kernel.asm["cubin"])
    name = f"{build.kernel.__name__} {build.constants}"
    return Report(name, _resources(cubin), kernel.metadata.shared, kernel.asm["ptx"] if build.uses_tensor_cores else "")


def _resources(cubin: Path) -> dict[str, int]:
    """Registers, stack, local memory, ... of the only kernel in a file."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    report = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"\b(REG|STACK|LOCAL|SHARED):(\d+)", report)}
