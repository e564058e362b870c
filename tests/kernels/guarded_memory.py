"""What a backend allocates starts as NaN and has margins: Triton's interpreter notices no access out of bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

MARGIN = 4096


@pytest.fixture(autouse=True)
def guarded_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let what new_empty returns hold NaN, between margins that no kernel may write to."""
    allocate, guarded = torch.Tensor.new_empty, []

    def new_empty(self: Tensor, *size: Any, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
        if options:  # the interpreter's own
            return allocate(self, *size, dtype=dtype, **options)
        shape = torch.Size(size[0] if isinstance(size[0], (tuple, list)) else size)
        memory = allocate(self, shape.numel() + 2 * MARGIN, dtype=dtype)
        memory.fill_(float("nan") if memory.is_floating_point() else 77)
        guarded.append(memory)
        return memory[MARGIN : MARGIN + shape.numel()].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    for memory in guarded:
        for guard in (memory[:MARGIN], memory[-MARGIN:]):
            assert (guard.isnan() if guard.is_floating_point() else guard == 77).all(), "written out of bounds"
