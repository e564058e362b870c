"""How Triton kernels are launched: what was compiled for arguments of a kind serves all arguments of that kind."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from setemb_kernels import _check, _triton  # noqa: E402
from setemb_kernels.losses.triton_contrast_kernels import contrast_kernel  # noqa: E402
from setemb_kernels.ops.set_similarity import triton as set_similarity  # noqa: E402
from setemb_kernels.ops.set_similarity import triton_config  # noqa: E402
from setemb_kernels.ops.set_similarity import triton_plan as triton_plans  # noqa: E402
from setemb_kernels.ops.set_similarity.precompile import launch_all  # noqa: E402
from setemb_kernels.ops.slot_attention import triton_fused  # noqa: E402
from setemb_kernels.ops.smooth_chamfer import triton_kernels, triton_light, triton_plan  # noqa: E402

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


def specialised(launch: _triton.Launch) -> list[Any]:
    """Of its numbers, those that a kernel is compiled for, as what."""
    parameters = [p for p in launch.kernel.params if not p.is_constexpr][-len(launch.numbers) :]
    return [
        (p.name, v == 1, v % 16 == 0)
        for p, v in zip(parameters, launch.numbers, strict=True)
        if isinstance(v, int) and not p.do_not_specialize
    ]


def launches_of_sets(N: int, M: int, dtype: torch.dtype) -> list[_triton.Launch]:
    """All of smooth-Chamfer's, packed and not, that no other length is to compile anew."""
    x, y, grad = torch.zeros(N, 4, 64, dtype=dtype), torch.zeros(M, 4, 64, dtype=dtype), torch.zeros(N, M, dtype=dtype)
    found = []
    for kernel, options in (
        (triton_kernels.forward_kernel, {"out": dtype}),
        (triton_kernels.weights_kernel, {"grad": grad, "need_chunk": True}),
        *([(contrast_kernel, {"is_loss": True})] if dtype == torch.bfloat16 else []),
    ):
        plan = triton_plan.plan_of(x, y, None, None, 16.0, **options)
        whole = slice(0, plan.x.height), slice(0, plan.y.height)
        found += [plan._pack, *(launch for _, launch in plan.launches(kernel, *whole))]
    for upstream in (None, grad) if dtype == torch.bfloat16 else ():
        light = triton_light._plan_of(x, y, 16.0, None, None, dtype, upstream)
        assert light is not None
        found.append(light.launch)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sizes", [((13, 18), (1, 70), (60, 130), (77, 202)), ((8, 64), (3, 128), (77, 192))])
def test_other_numbers_of_sets_compile_nothing(sizes: Any, dtype: torch.dtype) -> None:
    """Neither where the sets of y are no multiple of 16 nor where they are: one variant each."""
    first, *others = (list(map(variant, launches_of_sets(*size, dtype))) for size in sizes)
    assert all(first) and all(other == first for other in others)


def test_other_numbers_of_tokens_compile_nothing() -> None:
    found = []
    for B, T in ((3, 40), (1, 7), (16, 48), (5, 63)):
        q, k = torch.zeros(B, 1, 4, 64).half(), torch.zeros(B, 1, T, 64).half()
        mask = torch.zeros(B, T, dtype=torch.bool)
        forward = triton_fused._plan_of(q, k, 64, (k, None, mask, q), (1.0, 1e-7, 0.0, 1.0))
        backward = triton_fused._plan_of(q, k, 64, (k, None, mask, q, q, q), (1.0, 0.0, 1.0), (True,) * 4)
        assert forward is not None and backward is not None
        found.append([specialised(plan.launch) for plan in (forward, backward)])
    assert all(found[0]) and all(other == found[0] for other in found)


def launches_of_ragged_sets(N: int, K: int, M: int, L: int, kind: str) -> list[_triton.Launch]:
    """All of a set similarity, of packed sets of K and L vectors in the mean."""
    x, y, grad = torch.zeros(N * K, 64).half(), torch.zeros(M * L, 64).half(), torch.zeros(N, M).half()
    numbers = torch.tensor(16.0), torch.tensor(0.0)
    call = set_similarity._Call(x, torch.arange(N + 1) * K, y, torch.arange(M + 1) * L, None, *numbers)
    forward = call.plan(kind, False, out=torch.float16)
    backward = call.plan(kind, False, grad=grad, needs=(True, True, True))
    found = [launch for _, launch in triton_plans.similarity_launches(forward)]
    for step in range(len(backward.steps)):
        found.append(triton_plans.state_launch(backward, step))
        found += [triton_plans.gradient_launch(backward, step, is_x) for is_x in (True, False)]
    return found


def variant(launch: _triton.Launch) -> tuple[str, ...]:
    constants = {name: value for name, value in launch.constants.items() if name != "ADD"}
    return launch.kernel.__name__, str(constants), str(specialised(launch))


@pytest.mark.parametrize("workspace", [1 << 28, 1 << 12], ids=["one window", "windows"])
@pytest.mark.parametrize("kind", ["soft_maxsim", "chamfer", "match_probability"])
def test_other_lengths_of_sets_compile_nothing(kind: str, workspace: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of up to 16 vectors in the mean, of up to 32, and of more, on either side; but for whether a launch adds."""
    limits = triton_config.LIMITS._replace(workspace_bytes=workspace)
    monkeypatch.setattr(triton_config, "LIMITS", limits)
    variants = set()
    for K, L in ((4, 9), (20, 12), (33, 3), (9, 27), (30, 25), (100, 18), (12, 90), (32, 40), (65, 1000)):
        for factor in (1, 3, 11):
            found = launches_of_ragged_sets(2 * factor, K, 5 * factor, L, kind)
            own = {variant(launch) for launch in found}
            variants |= {(triton_config._block(K, 64), triton_config._block(L, 64), *of_one) for of_one in own}
    assert len({of_one[:2] for of_one in variants}) == 9
    assert len(variants) == 9 * len(own)


@pytest.mark.parametrize("on_device", [False, True], ids=["alpha a number", "alpha on the device"])
@pytest.mark.parametrize("candidates", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["smooth_chamfer", "maxsim", "max", "mean", "match_probability"])
def test_precompiled(
    kind: str, dtype: torch.dtype, candidates: bool, on_device: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that other lengths and numbers of sets launch was not launched before."""
    launched: set[Any] = set()

    def record(self: _triton.Launch, *arguments: Any) -> None:
        kinds = tuple(v.dtype if isinstance(v, torch.Tensor) else type(v) for v in arguments)
        launched.add((self.kernel.__name__, str(self.constants), str(specialised(self)), kinds))

    monkeypatch.setattr(_triton.Launch, "__call__", record)
    if on_device:  # float32 stands for the device: a number is of float64
        monkeypatch.setattr(set_similarity, "_on_host", lambda v: v.dtype == torch.float64)
    alpha, needs = torch.tensor(16.0), (True, True, True)
    bias = torch.tensor(0.0) if kind == "match_probability" else _check.number(0.0)
    takes_alpha = kind in ("smooth_chamfer", "match_probability")
    numbers = alpha if takes_alpha else _check.number(1.0), bias  # as `op` has them
    launch_all(kind, 64, dtype, alpha, False, candidates, needs, False, torch.device("cpu"))
    ahead, launched = launched, set()
    of_kind, dtype = ("max", torch.float32) if kind == "mean" else (kind, dtype)
    lengths = [(1, 1)] if kind == "mean" else [(4, 9), (20, 33), (100, 18), (1, 1000)]
    for (K, L), (N, M), workspace in product(lengths, [(1, 1), (2, 7), (16, 40), (300, 200)], [1 << 28, 1 << 12]):
        limits = triton_config.LIMITS._replace(workspace_bytes=workspace)
        monkeypatch.setattr(triton_config, "LIMITS", limits)
        if workspace < 1 << 28 and N == 300:
            continue
        x, y = torch.zeros(N * K, 64, dtype=dtype), torch.zeros(M * L, 64, dtype=dtype)
        who = torch.zeros(N, 3, dtype=torch.int64) if candidates else None
        sets = x, torch.arange(N + 1) * K, y, torch.arange(M + 1) * L, who
        s = set_similarity.forward(*sets, *numbers, of_kind, False)
        set_similarity.backward(torch.zeros_like(s), *sets, *numbers, of_kind, False, True, True, True, True)
    assert launched and launched <= ahead, launched - ahead


@pytest.mark.parametrize("function", list(kernels()))
def test_constants_come_last(function: Any) -> None:
    """As `launch` takes them for what the arguments leave over."""
    is_constant = [parameter.is_constexpr for parameter in function.params]
    assert is_constant == sorted(is_constant)
