"""What `test_triton` runs in a process of its own: the losses and search, made of tiles from the Triton kernels.

On a GPU these serve anyway. Interpreted, they take the place of the compiled kernels of the CPU, for this process.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

pytest.importorskip("triton")

from setemb_kernels import set_rank, set_topk
from setemb_kernels.ops.smooth_chamfer import mixed, reference
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
            library.impl("smooth_chamfer_mixed", mixed._decoded, "CPU", allow_override=True)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=lambda dtype: str(dtype)[6:])
def test_search(dtype: torch.dtype) -> None:
    """Values to float32's digits; each set is nearest to itself."""
    generator = torch.Generator().manual_seed(0)
    x, y = (normalize(torch.randn(n, k, 24, generator=generator), dim=-1) for n, k in ((9, 4), (70, 3)))
    scale = y.abs().amax(2) / 127 if dtype == torch.int8 else None
    stored = y.to(dtype) if scale is None else (y / scale[..., None]).round().to(dtype)
    decoded = stored.double() if scale is None else stored.double() * scale[..., None].double()
    s = reference.forward(x.double(), decoded, torch.tensor(16.0), None, None)
    before = calls
    scales = None if scale is None else scale.to(DEVICE)
    found = set_topk(x.to(DEVICE), stored.to(DEVICE), 7, gallery_scale=scales, chunk=32)
    assert calls > before
    torch.testing.assert_close(found.values.cpu().double(), s.topk(7).values, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(s.gather(1, found.indices.cpu()), found.values.cpu().double(), rtol=1e-6, atol=1e-6)
    own, ids = x.to(DEVICE), torch.arange(9, device=DEVICE)
    ranks = set_rank(own, own, x_group=ids, y_group=ids, chunk=4)
    assert not ranks.x.any() and not ranks.y.any()
