"""Dropout that draws fewer bits: the share, the mean and the gradient of torch's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from setemb.modules.dropout import Dropout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_and_mean(p: float, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.ones(999, 1001, dtype=dtype, requires_grad=True)
    y = Dropout(p)(x)
    dropped = y == 0
    sigma = (p * (1 - p) / x.numel()) ** 0.5
    assert abs(float(dropped.double().mean()) - p) < 4 * sigma + 2**-17
    kept = y[~dropped].unique()
    assert len(kept) == 1
    assert y.dtype == dtype and float(kept) == pytest.approx(1 / (1 - p), rel=1e-4 if dtype != torch.bfloat16 else 1e-2)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert torch.equal(gradient == 0, dropped)
    assert torch.equal(gradient[~dropped], y[~dropped])
    # neighbours share a draw of 64 bits, and are independent
    pairs = dropped.flatten()[: x.numel() // 4 * 4].view(-1, 4).double()
    correlation = torch.corrcoef(pairs.T) - torch.eye(4, dtype=torch.float64)
    assert correlation.abs().max() < 5 / len(pairs) ** 0.5


def test_it_follows_the_seed_and_the_mode() -> None:
    layer, x = Dropout(0.3), torch.randn(7, 5)
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(layer(x))
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    assert layer.eval()(x) is x
    for p in (0.0, 1.0):
        assert torch.equal(Dropout(p)(x), nn.Dropout(p)(x))
    assert Dropout(0.5)(torch.empty(0, 3)).shape == (0, 3)
