"""What the Triton backends of all ops share, on the host: sizes, the device, kernels compiled ahead of time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

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


def device(x: Tensor) -> tuple[int, int]:
    """Multiprocessors and architecture (10 * major + minor of the compute capability)."""
    if x.device.type == "cpu":  # Triton's interpreter
        return 2, 90
    properties = torch.cuda.get_device_properties(x.device)
    return properties.multi_processor_count, 10 * properties.major + properties.minor


def precision() -> str:
    """Of products of float32: what torch may use for a plain one."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def strides(t: Tensor | None, axes: int) -> tuple[int, ...]:
    """Those of an optional tensor."""
    return (0,) * axes if t is None else t.stride()


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
