"""Plain PyTorch as it is on tensor cores in tf32, on any device: what judges kernels that multiply so."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def rounded_to_tf32(v: Tensor) -> Tensor:
    """To the nearest number with 10 bits of mantissa, ties away from 0; v is finite."""
    return (v.contiguous().view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)


class Tf32Products(TorchDispatchMode):
    """While entered, the operands of every product of float32 are rounded, in forward and backward passes."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if function in (torch.ops.aten.mm.default, torch.ops.aten.bmm.default) and args[0].dtype == torch.float32:
            args = [rounded_to_tf32(a) for a in args]
            self.products += 1
        return function(*args, **(kwargs or {}))
