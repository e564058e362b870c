"""Asking for an implementation by name: it serves or raises, and never falls back."""

from __future__ import annotations

import importlib.util
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import setemb_kernels
from setemb_kernels import backends, use_backend
from setemb_kernels.losses import tiles
from setemb_kernels.ops.smooth_chamfer import cuda, op, reference

MODULE = importlib.import_module("setemb_kernels.backends")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if there were one, and the CUDA module and Triton were there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(MODULE, "_CUDA", {"absent": ""})
    monkeypatch.setattr(MODULE, "triton_absent", lambda: "")
    monkeypatch.setattr(op.BACKENDS, "chosen", "automatic")
    monkeypatch.setattr(op.BACKENDS, "_triton", lambda: "triton")


def tensor(dtype: torch.dtype = torch.bfloat16, K: int = 4, D: int = 64) -> Any:
    return SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=(10, K, D))


def serves(*tensors: Any) -> Any:
    return op.BACKENDS.implementation(reference, *tensors)


def served_by() -> str:
    (row,) = (row for row in backends() if (row.op, row.device) == ("smooth_chamfer", "cuda"))
    return row.implementation


@pytest.mark.usefixtures("gpu")
def test_cuda_serves_only_where_asked_for() -> None:
    x = tensor()
    assert serves(x, x) == "triton"
    with use_backend("smooth_chamfer", device="cuda", implementation="cuda"):
        assert serves(x, x) is cuda and served_by() == "cuda"
        with use_backend("smooth_chamfer", implementation="reference"):
            assert serves(x, x) is reference and served_by() == "reference"
        assert serves(x, x) is cuda
    assert serves(x, x) == "triton" and served_by() == "triton"
    use_backend("smooth_chamfer", implementation="cuda")
    assert serves(x, x) is cuda
    use_backend("smooth_chamfer", implementation="automatic")
    assert serves(x, x) == "triton"
    with pytest.raises(KeyError), use_backend("smooth_chamfer", implementation="cuda"):
        raise KeyError
    assert serves(x, x) == "triton"


@pytest.mark.usefixtures("gpu")
def test_what_was_asked_for_does_not_fall_back() -> None:
    with use_backend("smooth_chamfer", implementation="cuda"):
        with pytest.raises(ValueError, match=r"CUDA C\+\+ kernel cannot serve: .*at most 64 vectors, got 65 and 4"):
            serves(tensor(K=65), tensor())
        with pytest.raises(ValueError, match="expected float32, bfloat16 or float16, got float64"):
            serves(tensor(torch.float64), tensor(torch.float64))
    with (
        use_backend("smooth_chamfer", implementation="triton"),
        pytest.raises(ValueError, match=r"Triton kernel does not take torch\.float64"),
    ):
        serves(tensor(torch.float64), tensor(torch.float64))
    assert serves(tensor(torch.float64), tensor(torch.float64)) is reference


@pytest.mark.usefixtures("gpu")
def test_measured_sizes_are_served_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = MODULE.Measured("smooth_chamfer", 90, torch.bfloat16, (64, 128))
    monkeypatch.setattr(MODULE, "MEASURED", (rule,))
    assert serves(tensor(), tensor()) is cuda
    for other in (tensor(torch.float16), tensor(D=63), tensor(D=129), tensor(K=65)):
        assert serves(other, tensor()) == "triton"
    with use_backend("smooth_chamfer", implementation="triton"):
        assert serves(tensor(), tensor()) == "triton"


def test_no_kernel_that_never_ran_on_a_gpu_is_the_default() -> None:
    assert MODULE.MEASURED == ()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            ("chamfer", "cuda", "cuda"),
            ValueError,
            "op: expected one of set_similarity, slot_attention, smooth_chamfer, got 'chamfer'",
        ),
        (("smooth_chamfer", "cpu", "cuda"), ValueError, "device: expected 'cuda'.*got 'cpu'"),
        (
            ("smooth_chamfer", "cuda", "cutlass"),
            ValueError,
            "implementation: expected one of cuda, .*'cutlass'",
        ),
    ],
)
def test_errors(arguments: tuple[str, str, str], error: type[Exception], message: str) -> None:
    name, device, implementation = arguments
    with pytest.raises(error, match=message):
        use_backend(name, device=device, implementation=implementation)


def test_what_is_absent_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda", "triton"):
        with pytest.raises(RuntimeError, match=f"implementation '{name}' cannot serve CUDA devices: no CUDA device"):
            use_backend("smooth_chamfer", implementation=name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(MODULE, "_CUDA", {})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match="the CUDA module is not built"):
        use_backend("smooth_chamfer", implementation="cuda")
    assert op.BACKENDS.chosen == "automatic"


@pytest.mark.parametrize(
    ("built", "serves", "refuses"),
    [
        ("8.0;9.0;10.0", [(8, 0), (8, 9), (9, 0), (10, 3)], [(7, 5), (11, 0), (12, 0)]),
        ("8.6", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("8.0 9.0+PTX", [(8, 6), (9, 0), (12, 0)], [(7, 5)]),
        ("9.0a", [(9, 0)], [(9, 1), (10, 0)]),
        ("Hopper", [(9, 0), (8, 0)], []),
    ],
)
def test_a_device_that_the_module_is_not_built_for(
    built: str,
    serves: list[tuple[int, int]],
    refuses: list[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    info = {"version": setemb_kernels.__version__, "torch_minimum": "2.10", "cuda_architectures": built}
    registered: list[bool] = []
    module = SimpleNamespace(build_info=lambda: info, register_ops=lambda: registered.append(True))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setattr(MODULE.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for devices in [[device, device] for device in serves]:
        monkeypatch.setattr(MODULE, "_CUDA", {})
        monkeypatch.setattr(torch.cuda, "get_device_capability", devices.__getitem__)
        with use_backend("smooth_chamfer", implementation="cuda"):
            assert registered.pop()
    for device in refuses:
        monkeypatch.setattr(MODULE, "_CUDA", {})
        monkeypatch.setattr(torch.cuda, "get_device_capability", [serves[0], device].__getitem__)
        own = f"{device[0]}.{device[1]}"
        sentence = f"is built for architectures {built}, device 1 is of {own}: .* TORCH_CUDA_ARCH_LIST={own}"
        with pytest.raises(RuntimeError, match=sentence.replace("+", r"\+")):
            use_backend("smooth_chamfer", implementation="cuda")
        assert not registered and op.BACKENDS.chosen == "automatic"


def test_the_cuda_module_loads_and_registers_its_kernels() -> None:
    """Where it is built: a machine without a GPU can load it too."""
    if importlib.util.find_spec("setemb_kernels._C_cuda") is None:
        pytest.skip("the CUDA module is not built here")
    assert MODULE._load_cuda_module() == ""
    info = importlib.import_module("setemb_kernels._C_cuda").build_info()
    assert info["version"] == setemb_kernels.__version__ and info["cuda_architectures"]
    for kernel in ("pack", "forward", "hardest", "weights", "unpack"):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"setemb_cuda::smooth_chamfer_{kernel}", "CUDA")
    with pytest.raises(NotImplementedError, match="CPU"):
        cuda.forward(torch.ones(1, 1, 4), torch.ones(1, 1, 4), torch.tensor(16.0), None, None)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(("kind", "op_name"), [("smooth_chamfer", "smooth_chamfer"), ("max", "set_similarity")])
def test_losses_follow(kind: str, op_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels of their own, in Triton, serve where Triton serves the similarity."""
    v = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    sets = tiles.Sets(v, v, v, v, None, None, None, None, kind)  # type: ignore[arg-type]
    assert tiles.fused(sets)
    for name in ("reference", "triton"):
        with use_backend(op_name, implementation=name):
            assert tiles.fused(sets) == (name == "triton")
    monkeypatch.setattr(MODULE, "triton_absent", lambda: "not installed")
    assert not tiles.fused(sets)
