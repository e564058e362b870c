"""What the Triton backends of all ops share, on the host: sizes, the device, kernels compiled ahead of time."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

NAMES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int8: "i8",
    torch.float8_e4m3fn: "fp8e4nv",
}
"""What Triton calls a dtype in a signature."""


def next_power_of_two(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def cdiv(a: int, b: int) -> int:
    """Upwards; ``triton.cdiv``, which serves in kernels too, takes some microseconds."""
    return -(-a // b)


def strides(t: Tensor | None, axes: int) -> tuple[int, ...]:
    """Those of an optional tensor."""
    return (0,) * axes if t is None else t.stride()


# --- launches

_COMPILED: dict[Any, tuple[Any, tuple[Any, ...]]] = {}
"""Kernel, device, kinds of the arguments and constants -> what was compiled for them, and the constants in order."""

_KINDS: dict[type, Callable[[Any], Any]] = {
    Tensor: lambda v: (v.dtype, v.data_ptr() % 16),
    int: lambda v: (v == 1, v % 16 == 0, -(2**31) <= v < 2**31),
    float: lambda v: float,
    type(None): lambda v: None,
    TensorDescriptor: lambda v: (v.base.dtype, tuple(v.block_shape)),
}
"""Of an argument all that Triton may compile a kernel for."""


def _kind(v: Any) -> Any:
    kind = _KINDS.get(type(v))
    if kind is None and isinstance(v, Tensor):  # a parameter
        kind = _KINDS[Tensor]
    if kind is None:
        raise TypeError(f"arguments: expected tensors, numbers, None or descriptors, got {type(v).__name__}")
    return kind(v)


def launch(kernel: Any, programs: int | tuple[int, int], arguments: tuple[Any, ...], **constants: Any) -> Any:
    """``kernel[programs](*arguments, **constants)``, looked up by us.

    For each call Triton binds and classifies all arguments anew, which costs the host more than the launch itself.

    Args:
        kernel: a ``triton.jit`` function, whose constexpr arguments come last.
        programs: how many, in one axis or two.
        arguments: tensors, numbers, None and descriptors, in order: all that are not constexpr.
        constants: constexpr arguments and options of the compiler.

    Returns:
        What was compiled, and the constants in order; None where the kernel is interpreted.
    """
    grid = _grid(programs)
    if not isinstance(kernel, triton.JITFunction):  # interpreted
        kernel[grid](*arguments, **constants)
        return None
    key = _key(kernel, arguments, constants)
    found = _COMPILED.get(key)
    if found is None:
        compiled = kernel[grid](*arguments, **constants)
        found = _COMPILED[key] = compiled, tuple(constants[name] for name in kernel.arg_names[len(arguments) :])
        return found
    compiled, rest = found
    compiled[grid](*arguments, *rest)
    return found


LAYOUTS = 512
"""Of so many layouts of its inputs an op keeps its launches."""


class Launch:
    """`launch` of all but the tensors, for calls that come again: it looks at each argument, 25 of them in 20 us.

    Of one device. All that a kernel may be compiled for is given beforehand, but for tensors, of which dtype and place
    are looked at.
    """

    def __init__(self, kernel: Any, programs: int, numbers: tuple[int | float, ...], **constants: Any) -> None:
        """
        Args:
            kernel: a ``triton.jit`` function, whose arguments are those of a call, then numbers, then constants.
            programs: how many.
            numbers: the last arguments that are not constexpr.
            constants: constexpr arguments and options of the compiler.
        """
        self.kernel, self.programs, self.numbers, self.constants = kernel, programs, numbers, constants
        self._runs: dict[tuple[Any, ...], tuple[Callable[..., None], tuple[Any, ...]]] = {}

    def __call__(self, *arguments: Any) -> None:
        """
        Args:
            arguments: tensors, descriptors, None or floats. Descriptors always of the same dtype and block.
        """
        places = tuple([(v.dtype, v.data_ptr() % 16) if isinstance(v, Tensor) else type(v) for v in arguments])
        found = self._runs.get(places)
        if found is not None:
            run, rest = found
            run(*arguments, *rest)
            return
        launched = launch(self.kernel, self.programs, (*arguments, *self.numbers), **self.constants)
        if launched is not None:
            compiled, rest = launched
            self._runs[places] = compiled[_grid(self.programs)], (*self.numbers, *rest)


def descriptor(array: Tensor, shape: tuple[int, ...], block: tuple[int, int]) -> TensorDescriptor:
    """``TensorDescriptor.from_tensor`` of an array of ours or, as it is contiguous, of its numbers in another shape. It
    checks nothing: 1 us in place of 5."""
    found = object.__new__(TensorDescriptor)
    found.__dict__.update(_DESCRIBED, base=array, shape=shape, strides=(shape[1], 1), block_shape=block)
    return found


_DESCRIBED = dict(vars(TensorDescriptor.from_tensor(torch.empty(16, 16), [16, 16])))
"""What else one has."""


def _grid(programs: int | tuple[int, int]) -> tuple[int, int, int]:
    return (programs, 1, 1) if isinstance(programs, int) else (*programs, 1)


def _key(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any]) -> tuple[Any, ...]:
    return (kernel, torch.cuda.current_device(), *map(_kind, arguments), *constants.items())


# --- ahead of time


class Build(NamedTuple):
    """Arguments of ``triton.compiler.ASTSource`` and ``triton.compile`` for one kernel that a call may launch."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    attrs: dict[tuple[int], list[list[Any]]]
    options: dict[str, Any]
    uses_tensor_cores: bool


def build(
    kernel: Any,
    types: Mapping[str, str],
    constants: Mapping[str, Any],
    launch: Mapping[str, Any],
    aligned: Collection[str] = (),
    uses_tensor_cores: bool = False,
) -> Build:
    """A kernel as a launch would compile it.

    Args:
        kernel: a ``triton.jit`` function.
        types: of its arguments, by name; "i32" where it is not given. One of another kernel is ignored.
        constants: values of its constexpr arguments; those of an argument that is None or, like many a stride, 1.
        launch: keyword arguments of the launch: options of the compiler and more constants.
        aligned: integers that are multiples of 16, as all pointers are. One of another kernel is ignored.
        uses_tensor_cores: whether it should.
    """
    options = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True}
    options |= {key: value for key, value in launch.items() if key in options or key == "maxnreg"}
    constants = {**constants, **{key: value for key, value in launch.items() if key not in options}}
    signature = {key: "constexpr" if key in constants else types.get(key, "i32") for key in kernel.arg_names}
    constants = {key: value for key, value in constants.items() if key in signature}
    multiples = [key for key, value in signature.items() if value[0] == "*" or (key in aligned and value == "i32")]
    attrs = {(kernel.arg_names.index(key),): [["tt.divisibility", 16]] for key in multiples}
    return Build(kernel, signature, constants, attrs, options, uses_tensor_cores)
