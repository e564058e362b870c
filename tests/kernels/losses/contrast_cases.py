"""Arguments of the backward pass of InfoNCE and sigmoid, and how near its results have to be."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from setemb_kernels.losses import tiles, torch_tiles
from setemb_kernels.ops.smooth_chamfer import reference


def sets(n: int, k: int, d: int, dtype: torch.dtype, seed: int, norm: float = 1.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    v = normalize(torch.randn(n, k, d, generator=generator, dtype=torch.float64), dim=-1)
    return (v * norm).to(dtype)


def arguments(
    loss: str,
    dtype: torch.dtype,
    K: int = 3,
    L: int = 4,
    norm: float = 1.0,
    groups: bool = True,
    weight: float = 0.3,
    counts: tuple[int, int] = (75, 290),
) -> list[Any]:
    """Of sets that take several blocks on either side, and leave the last lanes of a vector empty."""
    generator = torch.Generator().manual_seed(7)
    (N, M), D, wide = counts, 20, torch.float64 if dtype == torch.float64 else torch.float32
    x, y = sets(N, K, D, dtype, 0, norm), sets(M, L, D, dtype, 1, norm)
    x_group, y_group = (torch.randint(0, 40, (n,), generator=generator) for n in (N, M))
    scale, bias, by = (torch.tensor(v, dtype=wide) for v in (12.0 / norm / norm, -5.0, weight))
    rows, columns = (torch.rand(2, n, generator=generator).to(wide) for n in (N, M))
    for side in (rows, columns):
        side[0].mul_(4).add_(12)  # log-sum-exps
    if loss == "sigmoid":
        rows = columns = None
    if loss == "infonce, rows":
        columns = None
    ids = (x_group, y_group) if groups else (None, None)
    alpha = torch.tensor(9.0 / norm / norm, dtype=torch.float64)
    return [x, y, alpha, None, None, scale, bias, by, rows, columns, *ids]


def from_reference(args: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x and y and the sums, in float64 from the reference of the similarity, whatever serves its op."""
    x, y, alpha, x_mask, y_mask, scale, bias, weight, rows, columns, x_group, y_group = (
        v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for v in args
    )
    s = reference.forward(x, y, alpha, x_mask, y_mask)
    ids = tiles.Ids(x_group, y_group, 0, 0, (len(x), len(y)), x.device)
    if rows is None:
        g, *sums = torch_tiles.sigmoid_gradients(s, ids, scale, bias, weight)
    else:
        g, by_scale = torch_tiles.infonce_gradients(s, ids, scale, weight, rows, columns)
        sums = [by_scale, torch.zeros_like(by_scale)]
    by_x, by_y, _ = reference.backward(g, x, y, alpha, x_mask, y_mask, True, True, False)
    return by_x, by_y, torch.stack(sums)


NEAR = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""In 16 bits the tiles' weights are rounded, of either."""


def assert_near(got: tuple[Tensor, ...], expected: tuple[Tensor, ...], near: float) -> None:
    for name, a, b in zip(("x", "y", "alpha", "sums"), got, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        size = b.nan_to_num(0).abs().max().item() if b.numel() else 0
        torch.testing.assert_close(a, b, rtol=near, atol=near * size, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}")
