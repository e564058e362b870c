"""What a row of `make gpu` is, and what rows share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.timing import Call

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
Inputs = tuple[Any, ...]
Prepare = Callable[[Inputs], Call]
"""From one set of inputs, what is timed."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    op: str
    name: str
    make: Callable[[], Inputs]
    """Fresh random inputs."""
    ours: Prepare
    product: Prepare
    eager: Prepare
    products: int
    """How many plain products `product` makes."""
    operations: float
    """Floating-point operations of those products."""
    bytes: float
    """Bytes that have to move at least: each input read once, each output written once."""
    compiled: Prepare | None = None
    """The same as eager under torch.compile; None where that makes no difference."""
    result: Callable[[Any], Tensor] = field(default=lambda out: out)
    """Of what a call returns, what all implementations agree on."""
    judge: Prepare | None = None
    """What all results are compared with, eager's too; None: with eager's. For hard maxima, where eager in bfloat16
    takes other winners than the exact ones: its products, rounded, tie."""
    large: bool = False
    """Whether eager, or compiled, takes most of a GPU's memory."""

    @property
    def key(self) -> str:
        return f"{self.op} {self.name}"


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def unit_sets(n: int, k: int, d: int, dtype: torch.dtype, device: str) -> Tensor:
    return torch.nn.functional.normalize(torch.randn(n, k, d, device=device), dim=-1).to(dtype)


def compiled(function: Callable[..., Any], device: str) -> Callable[..., Any]:
    """By torch's own compiler; on the CPU, where nothing is measured, only as far as its graph."""
    backend = "inductor" if device == "cuda" else "aot_eager"
    return torch.compile(function, dynamic=False, fullgraph=True, backend=backend)


def as_leaves(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(t.detach().requires_grad_() for t in tensors)
