"""What the tests of the integrations share: results with gradients, and whether ours was called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from setemb_kernels.integrations import _sets

EXACT = {"rtol": 1e-12, "atol": 1e-12}
"""Of float64: what another order of summation makes of it."""


def sets(n: int, k: int, d: int = 16, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Unit vectors ``[n, k, d]``, with negative dot products among them."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(n, k, d, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(vectors, dim=-1).to(dtype)


def flags(*shape: int, seed: int = 0) -> Tensor:
    """Some true, some not, in each row at least one of both."""
    mask = torch.rand(*shape, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[..., 0], mask[..., -1] = True, False
    return mask


def with_gradients(function: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """The result and the gradients of the inputs."""
    leaves = [i.detach().clone().requires_grad_() for i in inputs]
    out = function(*leaves, **options)
    upstream = torch.linspace(-1, 2, out.numel(), dtype=out.dtype).view_as(out)
    return out.detach(), *torch.autograd.grad(out, leaves, upstream)


class Calls:
    """Counts calls of `set_similarity` by the integrations, within a ``with`` block."""

    def __init__(self) -> None:
        self.count = 0
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> Calls:
        own = _sets.set_similarity

        def counting(*args: Any, **kwargs: Any) -> Tensor:
            self.count += 1
            return own(*args, **kwargs)

        self._patch.setattr(_sets, "set_similarity", counting)
        return self

    def __exit__(self, *error: object) -> None:
        self._patch.undo()
