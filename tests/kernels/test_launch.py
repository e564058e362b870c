"""How Triton kernels are launched: what was compiled for arguments of a kind serves all arguments of that kind."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from setemb_kernels import _triton  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]


class Compiled:
    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *arguments: self.kernel.calls.append((grid, arguments, {}))


class Kernel:
    """What a ``triton.jit`` function is to `launch`."""

    arg_names = ("x", "n", "BLOCK", "HAS_MASK")

    def __init__(self) -> None:
        self.calls: list[Any] = []
        self.compiled = 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def run(*arguments: Any, **constants: Any) -> Compiled:
            self.compiled += 1
            self.calls.append((grid, arguments, constants))
            return Compiled(self)

        return run


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    monkeypatch.setattr(_triton.triton, "JITFunction", Kernel)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(_triton, "_COMPILED", {})
    return Kernel()


def test_looked_up(kernel: Kernel) -> None:
    """The second time by position: arguments, then constants in the order of the kernel, options left out."""
    x = torch.zeros(64)
    for n in (3, 5):
        _triton.launch(kernel, 7, (x, n), HAS_MASK=False, BLOCK=16, num_warps=4)
    first, second = kernel.calls
    assert kernel.compiled == 1
    assert first == ((7, 1, 1), (x, 3), {"HAS_MASK": False, "BLOCK": 16, "num_warps": 4})
    assert second == ((7, 1, 1), (x, 5, 16, False), {})


def test_parameters_are_tensors(kernel: Kernel) -> None:
    for x in (torch.zeros(64), torch.nn.Parameter(torch.zeros(64))):
        _triton.launch(kernel, 1, (x, 3), BLOCK=16, HAS_MASK=False)
    assert kernel.compiled == 1
    with pytest.raises(TypeError, match=r"arguments: expected tensors.* got str"):
        _triton.launch(kernel, 1, (x, "3"), BLOCK=16, HAS_MASK=False)


@pytest.mark.parametrize(
    ("other", "constants"),
    [
        ((torch.zeros(64, dtype=torch.float16), 3), {}),
        ((torch.zeros(64)[1:], 3), {}),  # another alignment
        ((None, 3), {}),
        ((torch.zeros(64), 1), {}),
        ((torch.zeros(64), 16), {}),
        ((torch.zeros(64), 2**31 + 1), {}),
        ((torch.zeros(64), 3.0), {}),
        ((TensorDescriptor.from_tensor(torch.zeros(16, 16), [16, 16]), 3), {}),
        ((torch.zeros(64), 3), {"BLOCK": 32}),
        ((torch.zeros(64), 3), {"num_warps": 8}),
    ],
    ids=str,
)
def test_compiled_anew(kernel: Kernel, other: tuple[Any, ...], constants: dict[str, Any]) -> None:
    usual = {"BLOCK": 16, "HAS_MASK": False, "num_warps": 4}
    _triton.launch(kernel, 1, (torch.zeros(64), 3), **usual)
    _triton.launch(kernel, 1, other, **usual | constants)
    assert kernel.compiled == 2


def test_another_device(kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    for device in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda device=device: device)
        _triton.launch(kernel, (2, 3), (torch.zeros(64), 3), BLOCK=16, HAS_MASK=False)
    assert kernel.compiled == 2 and kernel.calls[0][0] == (2, 3, 1)


def test_launch_without_its_tensors(kernel: Kernel) -> None:
    """What `launch` compiled serves, and tensors that lie elsewhere are compiled for."""
    x = torch.zeros(64)
    launch = _triton.Launch(kernel, 7, (3,), HAS_MASK=False, BLOCK=16, num_warps=4)
    for tensor in (x, x[4:], x[1:], x[1:]):
        launch(tensor)
    assert kernel.compiled == 2
    assert kernel.calls[0] == ((7, 1, 1), (x, 3), {"HAS_MASK": False, "BLOCK": 16, "num_warps": 4})
    for call, start in zip(kernel.calls[1:], (4, 1, 1), strict=True):
        assert call[0] == (7, 1, 1) and call[1][0].data_ptr() == x[start:].data_ptr()
    assert kernel.calls[1][1][1:] == kernel.calls[3][1][1:] == (3, 16, False)
    other = _triton.Launch(kernel, 5, (9,), HAS_MASK=False, BLOCK=16, num_warps=4)
    other(x)
    other(x)
    assert kernel.compiled == 2 and kernel.calls[-1][1][1:] == (9, 16, False)


def test_descriptor() -> None:
    """All that Triton's own has, whatever its version."""
    array = torch.zeros(48, 32)
    ours, theirs = _triton.descriptor(array, (48, 32), (16, 8)), TensorDescriptor.from_tensor(array, [16, 8])
    assert type(ours) is TensorDescriptor and ours.base is array
    assert {**vars(ours), "block_shape": [16, 8], "base": None} == {**vars(theirs), "base": None}


def kernels() -> Iterator[Any]:
    for path in sorted((ROOT / "setemb_kernels").glob("**/triton_*.py")):
        module = importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for name, value in vars(module).items():
            if name.endswith("_kernel") and value.__module__ == module.__name__:
                yield pytest.param(value, id=f"{path.parent.name} {name}")


@pytest.mark.parametrize("function", list(kernels()))
def test_constants_come_last(function: Any) -> None:
    """As `launch` takes them for what the arguments leave over."""
    is_constant = [parameter.is_constexpr for parameter in function.params]
    assert is_constant == sorted(is_constant)
