"""Losses over sets: every case against stored similarities in float64, in one tile and in many."""

from __future__ import annotations

import pytest
import torch

from setemb_kernels import measure, set_triplet_loss
from tests.kernels.losses.cases import CASES, KINDS, LOSSES, Case, check, cut_finely

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("tile", [1024, 6], ids=["one tile", "many tiles"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss(case: Case, name: str, dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if tile == 6:
        cut_finely(monkeypatch)
    check(LOSSES[name], case, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", ["hardest", "all"])
@pytest.mark.parametrize("case", [*CASES, *KINDS], ids=lambda case: case.name)
def test_pairs_by_batched_products(case: Case, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU makes those that a loss lists."""
    cut_finely(monkeypatch)
    monkeypatch.setattr(measure, "_batched", lambda x, y: True)
    check(LOSSES[name], case, dtype)


def test_batched_products_under_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a backward pass, which runs in whatever context it is called in."""
    monkeypatch.setattr(measure, "_batched", lambda x, y: True)
    x, y = (torch.nn.functional.normalize(torch.randn(20, 3, 16), dim=-1).requires_grad_() for _ in range(2))
    gradients = []
    for enabled in (False, True):
        loss = set_triplet_loss(x, y)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            gradients.append(torch.autograd.grad(loss, (x, y)))
    for plain, under in zip(*gradients, strict=True):
        assert torch.equal(plain, under)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", KINDS, ids=lambda case: case.name)
def test_other_similarities(case: Case, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    cut_finely(monkeypatch)
    check(LOSSES[name], case, dtype)
