"""What `test_triton` runs in a process of its own: the losses, made of tiles from the Triton kernels.

On a GPU these serve anyway. Interpreted, they take the place of the compiled kernels of the CPU, for this process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from setemb_kernels.ops.smooth_chamfer import triton as backend
from tests.kernels.guarded_memory import guarded_memory  # noqa: F401
from tests.kernels.losses.cases import CASES, LOSSES, Case, check, cut_finely

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else []))
calls = 0


@pytest.fixture(autouse=True, scope="module")
def triton_serves() -> Iterator[None]:
    """For the whole module: the ops of smooth_chamfer are Triton's, and counted."""
    with pytest.MonkeyPatch.context() as patch, torch.library._scoped_library("setemb", "IMPL") as library:
        for name in ("forward", "backward"):
            patch.setattr(backend, name, counted(getattr(backend, name)))
        if DEVICE == "cpu":
            library.impl("smooth_chamfer", forward, "CPU", allow_override=True)
            library.impl("smooth_chamfer_backward", lambda *args: backend.backward(*args), "CPU", allow_override=True)
        yield


def forward(
    x: Tensor,
    y: Tensor,
    alpha: Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    wide: bool = False,
) -> Tensor:
    return backend.forward(x, y, alpha, x_mask, y_mask, wide)


def counted(function: Any) -> Any:
    def count(*args: Any) -> Any:
        global calls
        calls += 1
        return function(*args)

    return count


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss(case: Case, name: str, dtype: torch.dtype) -> None:
    before = calls
    check(LOSSES[name], case, dtype, DEVICE)
    assert calls > before or 0 in (case.N, case.M)


@pytest.mark.parametrize("name", LOSSES)
def test_many_tiles(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_finely(monkeypatch)
    before = calls
    check(LOSSES[name], next(case for case in CASES if case.name == "masks"), DTYPES[-1], DEVICE)
    assert calls - before >= 24
