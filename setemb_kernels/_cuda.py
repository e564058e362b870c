"""What the CUDA C++ backends of all ops share, on the host: their kernels, and what products are made in."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from setemb_kernels import _device

_ARITHMETIC = {torch.bfloat16: 0, torch.float16: 1, "tf32": 2, torch.float32: 3}  # csrc/cuda/arithmetic.h


def kernels() -> Any:
    """The kernels of all ops, by name."""
    return torch.ops.setemb_cuda


def arithmetic(dtype: torch.dtype) -> int:
    """What products are made in; of float32, what torch may use for a plain one."""
    return _ARITHMETIC["tf32" if in_tf32(dtype) else dtype]


def in_tf32(dtype: torch.dtype) -> bool:
    """Whether tensor cores multiply numbers of this dtype in tf32."""
    return dtype == torch.float32 and _device.precision() == "tf32"


def rounded_to_tf32(v: Tensor) -> Tensor:
    """To the nearest of 10 bits of mantissa, ties away from 0, as the kernels round operands. A NaN need not stay."""
    return (v.contiguous().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)
