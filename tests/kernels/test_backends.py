"""Which implementation serves, and that a missing or unfit one is refused in words and replaced by the reference."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from setemb_kernels import __version__, backends, build_info
from setemb_kernels.backends import _misfit

ROOT = Path(__file__).parent.parent.parent
SUPPORTED = {"AVX512": ["avx512", "avx2", "default"], "AVX2": ["avx2", "default"]}.get(
    torch.backends.cpu.get_cpu_capability(), ["default"]
)


def python(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_the_compiled_module_serves_the_cpu() -> None:
    rows = [b for b in backends() if b.device == "cpu"]
    assert {row.op for row in rows} == {"set_similarity", "slot_attention", "smooth_chamfer"}
    for row in rows:
        assert row.implementation == f"c++ {SUPPORTED[0]}", row.reason
        assert row.reason == ""
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"setemb::{row.op}", "CPU")
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"setemb::{row.op}_backward", "CPU")
    info = build_info()
    assert info is not None
    assert info["capability"] == SUPPORTED[0]
    assert info["version"] == __version__
    assert {"compiler", "openmp", "torch_built_with", "torch_minimum"} <= info.keys()


@pytest.mark.parametrize("capability", SUPPORTED[1:])
def test_every_case_on_lesser_capabilities(capability: str) -> None:
    """The table of cases and the contract once more, with the module that a lesser processor would load."""
    served = python("-m", "setemb_kernels", ATEN_CPU_CAPABILITY=capability)
    assert f"c++ {capability}" in served.stdout
    run = python(
        *(
            "-m",
            "pytest",
            "-x",
            *(f"tests/kernels/{op}" for op in ("smooth_chamfer", "slot_attention", "set_similarity")),
        ),
        *("-k", "test_op or published or dot_product or not_finite or (mixed_op and few)"),
        ATEN_CPU_CAPABILITY=capability,
    )
    assert run.returncode == 0, run.stdout[-3000:]
    assert " passed" in run.stdout


def copy_without_modules(target: Path) -> Path:
    """The package's Python files alone, in a folder of their own."""
    for source in (ROOT / "setemb_kernels").rglob("*.py"):
        copy = target / source.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(source.read_bytes())
    return target


def test_without_compiled_modules_the_reference_serves(tmp_path: Path) -> None:
    script = (
        "import sys\n"  # an editable install finds compiled modules wherever the package is
        "sys.meta_path = [f for f in sys.meta_path if not getattr(f, '__name__', '').startswith('_Editable')]\n"
        "import torch, setemb_kernels as s\n"
        "row = next(r for r in s.backends() if r.op == 'smooth_chamfer')\n"
        "print(row.implementation, '|', row.reason, '|', s.build_info())\n"
        "x = torch.randn(3, 2, 4, requires_grad=True)\n"
        "s.smooth_chamfer(x, x).sum().backward()\n"
        "print(x.grad.abs().sum() > 0)\n"
    )
    folder = copy_without_modules(tmp_path)
    run = subprocess.run([sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    first, second = run.stdout.splitlines()
    assert first.startswith("reference | ")
    assert f"{SUPPORTED[0]}: not built" in first
    assert first.endswith("| None")
    assert second == "tensor(True)"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"version": "0.0.1"}, f"built for setemb 0.0.1, this is {__version__}: build it again"),
        ({"torch_minimum": "99.0"}, f"needs torch >= 99.0, this is {torch.__version__}"),
        ({}, ""),
    ],
)
def test_an_unfit_module_is_refused_in_one_sentence(change: dict[str, str], sentence: str) -> None:
    assert _misfit({"version": __version__, "torch_minimum": "2.10"} | change) == sentence


def test_a_broken_module_is_refused_and_the_reference_serves(tmp_path: Path) -> None:
    """A file that is no shared library, in place of every compiled module."""
    package = copy_without_modules(tmp_path) / "setemb_kernels"
    for capability in SUPPORTED:
        (package / f"_C_{capability}.so").write_bytes(b"no library")
    run = subprocess.run(
        [sys.executable, "-m", "setemb_kernels"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    (row,) = (line for line in run.stdout.splitlines() if line.startswith("smooth_chamfer  cpu"))
    assert "reference" in row
    assert f"{SUPPORTED[0]}: does not load with torch {torch.__version__}" in row


def test_python_m_prints_the_table() -> None:
    run = python("-m", "setemb_kernels")
    assert run.returncode == 0
    assert f"setemb_kernels {__version__}" in run.stdout
    for row in backends():
        assert row.implementation in run.stdout


def imported_by(statement: str) -> set[str]:
    run = python("-c", f"import sys; {statement}; print(*sys.modules)")
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_imports_stay_apart() -> None:
    """The kernels need torch alone: no model layer, and Triton only when a CUDA tensor comes."""
    modules = imported_by("import setemb_kernels")
    assert not {m for m in modules if m == "setemb" or m.startswith("setemb.")}
    assert "setemb_kernels.ops.smooth_chamfer.triton" not in modules
    assert "triton" not in modules - imported_by("import torch")


def test_implementations_do_not_import_each_other() -> None:
    """reference, triton and csrc are three independent witnesses."""
    for folder in (ROOT / "setemb_kernels" / "ops").iterdir():
        if not (folder / "op.py").exists():
            continue
        assert "triton" not in (folder / "reference.py").read_text().replace("`triton`", "")
        assert "reference import" not in (folder / "triton.py").read_text()
    for source in [*(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.h")]:
        assert "Python.h" not in source.read_text()
    for source in (ROOT / "setemb_kernels").rglob("*.py"):
        text = source.read_text()
        assert "import setemb\n" not in text
        assert "from setemb." not in text
        assert "from setemb import" not in text


@pytest.mark.parametrize(
    ("devices", "expected"),
    [
        ([], "8.0;9.0;10.0"),
        ([(9, 0), (8, 6), (9, 0)], "8.6;9.0"),
        ([(7, 5)], "8.0;9.0;10.0"),
        ([(7, 5), (12, 0)], "12.0"),
    ],
)
def test_the_cuda_module_is_built_for_the_gpus_that_are_here(
    devices: list[tuple[int, int]], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pybind11")
    monkeypatch.setattr("setuptools.setup", lambda **options: None)
    monkeypatch.setenv("SETEMB_CUDA", "0")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(devices))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(devices))
    monkeypatch.setattr(torch.cuda, "get_device_capability", devices.__getitem__)
    built: Any = SimpleNamespace(**runpy.run_path("setup.py"))
    assert built.cuda_architectures() == expected


@pytest.mark.parametrize("value", ["1", "yes"])
def test_asking_for_cuda_where_it_cannot_be_built_fails(value: str) -> None:
    if value == "1" and torch.version.cuda is not None:
        pytest.skip("this torch is built with CUDA")
    pytest.importorskip("pybind11")
    run = python("setup.py", "--version", SETEMB_CUDA=value)
    assert run.returncode != 0
    assert "SETEMB_CUDA" in run.stderr
    assert ("built without CUDA" if value == "1" else "expected auto, 0 or 1, got 'yes'") in run.stderr
