"""Losses over sets: every case against stored similarities in float64, in one tile and in many."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from setemb_kernels.losses import pairs, tiles, triplet
from tests.kernels.judge import judge
from tests.kernels.losses.cases import CASES, LOSSES, Case, Loss, stored_similarity, with_gradients

DISCRETE = ("hardest", "semi-hard")
"""What these choose may differ where 16-bit rounding makes candidates equal, so only the value is compared there."""


@pytest.mark.parametrize("tile", [1024, 6], ids=["one tile", "many tiles"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["float32", "float64", "bfloat16"]
)
@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_loss(case: Case, name: str, dtype: torch.dtype, tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if tile == 6:
        monkeypatch.setattr(tiles, "TILE", 6)
        monkeypatch.setattr(triplet, "_CHUNK", 5)
        monkeypatch.setattr(pairs, "CHUNK_ELEMENTS", 64)
    loss = LOSSES[name]
    arguments = case.build(dtype)
    double = {n: v.double() if v.is_floating_point() else v for n, v in arguments.items()}
    got = with_gradients(loss.run, arguments, loss.scalars)
    truth = with_gradients(loss.eager, double, loss.scalars)
    plain = with_gradients(loss.eager, arguments, loss.scalars)
    assert got["loss"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    condition, sizes = conditioning(loss, double)
    for key, value in got.items():
        if dtype == torch.bfloat16 and name in DISCRETE and key != "loss":
            assert value.isfinite().all()
        elif dtype == torch.float64:
            size = sizes.get(key, 1.0)
            torch.testing.assert_close(value, truth[key], rtol=1e-13 * condition, atol=1e-14 * condition * size)
        else:
            where = f"{case.name}, {name}, {dtype}, {key}"
            size = sizes.get(key, truth[key].abs().max().item() if truth[key].numel() else 0.0)
            extra = 4 * torch.finfo(dtype).eps * size * condition
            judge(where, value, truth[key], [plain[key]], plain[key], dtype, extra=extra)


def conditioning(loss: Loss, arguments: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """The largest logit, at least 1, whose rounding is a relative error of its exponential. And for what is a sum over
    all pairs that may cancel, the sum of its terms' sizes."""
    s, positive = stored_similarity(**arguments)
    s.requires_grad_()
    numbers = {n: torch.tensor(v, dtype=torch.float64) for n, v in loss.scalars.items()}
    (g,) = torch.autograd.grad(loss.stored(s, positive, **numbers, **loss.options), s)
    alpha, factor = arguments["alpha"], loss.scalars.get("scale", 1 / loss.scalars.get("temperature", 1.0))
    entropy = math.log(max(arguments["x"].shape[1], arguments["y"].shape[1]))
    sizes = {
        "loss": 1.0,
        "alpha.grad": (g.abs().sum() * entropy / alpha.square()).item(),
        "temperature.grad": (g * s).abs().sum().item() * factor,
        "scale.grad": (g * s).abs().sum().item() / factor,
        "bias.grad": g.abs().sum().item() / factor,
    }
    return (max(1.0, s.abs().max().item() * factor) if s.numel() else 1.0), sizes
