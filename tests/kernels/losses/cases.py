"""One table of cases for the losses over sets, against similarities that are stored, in float64."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from setemb_kernels import set_infonce_loss, set_sigmoid_loss, set_triplet_loss
from setemb_kernels.losses import pairs, tiles, triplet
from tests.kernels.judge import judge


@dataclass(frozen=True)
class Case:
    """Sizes of one call and what is special about it."""

    name: str
    N: int
    M: int
    K: int
    L: int
    D: int
    alpha: float = 16.0
    groups: int = 0
    """How many ids there are; 0: no groups."""
    masks: str = ""
    """"random", "some empty" or none."""
    norm: float = 1.0
    kind: str = ""
    """Of similarity; unless given, smooth_chamfer by default."""
    reduction: str = ""

    def build(self, dtype: torch.dtype, seed: int = 0) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(seed)
        x, y = (
            normalize(torch.randn(n, k, self.D, generator=generator, dtype=torch.float64), dim=-1) * self.norm
            for n, k in ((self.N, self.K), (self.M, self.L))
        )
        arguments = {"x": x.to(dtype), "y": y.to(dtype), "alpha": torch.tensor(self.alpha, dtype=torch.float64)}
        arguments |= {name: v for name, v in (("kind", self.kind), ("reduction", self.reduction)) if v}
        if self.kind == "match_probability":
            arguments["match_bias"] = torch.tensor(-0.5, dtype=torch.float64)
        if self.groups:
            for name, n in (("x_group", self.N), ("y_group", self.M)):
                arguments[name] = torch.randint(-self.groups, 0, (n,), generator=generator)
        if self.masks:
            for name, n, k in (("x_mask", self.N, self.K), ("y_mask", self.M, self.L)):
                mask = torch.rand(n, k, generator=generator) < 0.6
                mask[:, 0] = True
                if self.masks == "some empty":
                    mask[::3] = False
                arguments[name] = mask
        return arguments


CASES = [
    Case("diagonal", 20, 20, 4, 4, 32),
    Case("more columns than rows", 7, 23, 3, 4, 16),
    Case("more rows than columns", 23, 7, 3, 4, 16),
    Case("groups", 20, 31, 4, 4, 32, groups=7),
    Case("few large groups", 20, 31, 2, 3, 8, groups=2),
    Case("one group: no negatives", 6, 8, 2, 3, 8, groups=1),
    Case("many groups: few positives", 20, 31, 2, 3, 8, groups=500),
    Case("masks", 20, 31, 4, 5, 16, groups=7, masks="random"),
    Case("empty sets", 20, 31, 4, 5, 16, groups=7, masks="some empty"),
    Case("one pair", 1, 1, 2, 2, 8),
    Case("one vector a set", 15, 15, 1, 1, 8),
    Case("soft", 20, 31, 4, 4, 32, alpha=0.5, groups=7),
    Case("long vectors", 20, 31, 4, 4, 32, norm=5.0, groups=7),
    Case("nothing in x", 0, 5, 2, 2, 8),
    Case("nothing in y", 5, 0, 2, 2, 8),
]


KINDS = [
    replace(case, name=f"{case.name}, {kind} {reduction}".strip(), kind=kind, reduction=reduction)
    for kind, reduction in (
        ("chamfer", ""),
        ("maxsim", ""),
        ("maxsim", "mean"),
        ("soft_maxsim", ""),
        ("max", ""),
        ("mean", ""),
        ("match_probability", ""),
    )
    for case in CASES
    if case.name in ("more columns than rows", "groups", "empty sets", "one vector a set", "nothing in y")
]
"""The same of other similarities."""


@dataclass(frozen=True)
class Loss:
    """A loss, the numbers it takes, and the same over stored similarities."""

    function: Callable[..., Tensor]
    stored: Callable[..., Tensor]
    scalars: dict[str, float] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)

    def run(self, arguments: dict[str, Any], scalars: dict[str, Tensor]) -> Tensor:
        return self.function(**arguments, **scalars, **self.options)

    def eager(self, arguments: dict[str, Any], scalars: dict[str, Tensor]) -> Tensor:
        s, positive = stored_similarity(**arguments)
        s = s if s.dtype == torch.float64 else s.float()
        return self.stored(s, positive, **{n: v.to(s.dtype) for n, v in scalars.items()}, **self.options)


def stored_similarity(
    x: Tensor,
    y: Tensor,
    alpha: Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    x_group: Tensor | None = None,
    y_group: Tensor | None = None,
    kind: str = "smooth_chamfer",
    reduction: str = "sum",
    match_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``[N, M]`` in the dtype of x, and which pairs are positive."""
    if x_group is None or y_group is None:
        x_group, y_group = torch.arange(len(x)), torch.arange(len(y))
    a, b = (
        v.new_ones(v.shape[:2], dtype=torch.bool) if mask is None else mask for v, mask in ((x, x_mask), (y, y_mask))
    )
    alpha = alpha.to(x.dtype)
    c = torch.einsum("nkd,mld->nmkl", torch.where(a[..., None], x, 0), torch.where(b[..., None], y, 0))
    valid, soft = a[:, None, :, None] & b[:, None], kind in ("smooth_chamfer", "soft_maxsim")
    x_count, y_count = a.sum(1).clamp(min=1)[:, None], b.sum(1).clamp(min=1)
    if kind in ("mean", "match_probability"):
        values = c if match_bias is None else torch.sigmoid(alpha * c + match_bias.to(x.dtype))
        return torch.where(valid, values, 0).sum((2, 3)) / (x_count * y_count), x_group[:, None] == y_group
    z = torch.where(valid, alpha * c if soft else c, float("-inf"))
    largest = {dim: z.logsumexp(dim) if soft else first_maximum(z, dim) for dim in (2, 3)}
    by_row = torch.where(a[:, None] & b.any(1)[:, None], largest[3], 0).sum(2)
    by_column = torch.where(a.any(1)[:, None, None] & b, largest[2], 0).sum(2)
    if kind == "max":
        s = torch.where(a.any(1)[:, None] & b.any(1), first_maximum(z.flatten(2), 2), 0)
    elif kind in ("maxsim", "soft_maxsim"):
        s = by_row / x_count if reduction == "mean" else by_row
    else:
        s = (by_row / x_count + by_column / y_count) / 2
    return s / alpha if soft else s, x_group[:, None] == y_group


def first_maximum(values: Tensor, dim: int) -> Tensor:
    """Of equals the first has the gradient."""
    return values.take_along_dim(values.argmax(dim, keepdim=True), dim).squeeze(dim)


def stored_triplet(s: Tensor, positive: Tensor, margin: float, negatives: str) -> Tensor:
    total = s.sum() * 0
    for n, m in positive.nonzero().tolist():
        for others, allowed in ((s[n], ~positive[n]), (s[:, m], ~positive[:, m])):
            if negatives == "semi-hard":
                allowed = allowed & (others < s[n, m])
            candidates = others[allowed]
            if len(candidates):
                hinge = (margin + candidates - s[n, m]).clamp(min=0)
                total = total + (hinge.mean() if negatives == "all" else hinge.max())
    return total / positive.sum().clamp(min=1)


def stored_infonce(s: Tensor, positive: Tensor, temperature: Tensor, symmetric: bool) -> Tensor:
    z = s / temperature
    total = s.sum() * 0
    for n, m in positive.nonzero().tolist():
        for others, allowed in ((z[n], ~positive[n]), (z[:, m], ~positive[:, m]))[: 1 + symmetric]:
            total = total + torch.cat((z[n, m, None], others[allowed])).logsumexp(0) - z[n, m]
    return total / (positive.sum().clamp(min=1) * (1 + symmetric))


def stored_sigmoid(s: Tensor, positive: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    z = s * scale + bias
    return torch.where(positive, softplus(-z, threshold=40), softplus(z, threshold=40)).sum() / max(len(s), 1)


LOSSES = {
    "hardest": Loss(set_triplet_loss, stored_triplet, options={"margin": 0.2, "negatives": "hardest"}),
    "semi-hard": Loss(set_triplet_loss, stored_triplet, options={"margin": 0.2, "negatives": "semi-hard"}),
    "all": Loss(set_triplet_loss, stored_triplet, options={"margin": 0.3, "negatives": "all"}),
    "infonce": Loss(set_infonce_loss, stored_infonce, {"temperature": 0.1}, {"symmetric": True}),
    "infonce, rows": Loss(set_infonce_loss, stored_infonce, {"temperature": 0.02}, {"symmetric": False}),
    "sigmoid": Loss(set_sigmoid_loss, stored_sigmoid, {"scale": 10.0, "bias": -5.0}),
}


def with_gradients(
    compute: Callable[[dict[str, Any], dict[str, Tensor]], Tensor], arguments: dict[str, Any], scalars: dict[str, float]
) -> dict[str, Tensor]:
    """The loss and its gradients for x, y, alpha and the scalars."""
    leaves = {
        n: arguments[n].detach().clone().requires_grad_() for n in ("x", "y", "alpha", "match_bias") if n in arguments
    }
    numbers = {n: torch.tensor(v, dtype=torch.float64, requires_grad=True) for n, v in scalars.items()}
    loss = compute(arguments | leaves, numbers)
    named = leaves | numbers
    gradients = torch.autograd.grad(1.7 * loss, list(named.values()), allow_unused=True)
    results = {n: torch.zeros_like(v) if g is None else g for (n, v), g in zip(named.items(), gradients, strict=True)}
    return {"loss": loss.detach(), **{f"{n}.grad": g for n, g in results.items()}}


def cut_finely(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every case be made of many tiles."""
    monkeypatch.setattr(tiles, "TILE", 6)
    monkeypatch.setattr(tiles, "GPU_TILE", 6)
    monkeypatch.setattr(triplet, "_CHUNK", 5)
    monkeypatch.setattr(pairs, "CHUNK_ELEMENTS", 64)
    monkeypatch.setattr(pairs, "GPU_CHUNK_ELEMENTS", 64)


def check(loss: Loss, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """Run one case and compare the loss and its gradients with stored similarities in float64.

    Next to 16-bit sets eager computes in float32, as the losses do: only the gradients of the sets are of 16 bits.
    """
    arguments = case.build(dtype)
    double, single = (
        {n: v.to(t) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in arguments.items()}
        for t in (torch.float64, torch.float32)
    )
    there = {n: v.to(device) if isinstance(v, Tensor) and v.dim() else v for n, v in arguments.items()}
    got = with_gradients(loss.run, there, loss.scalars)
    truth = with_gradients(loss.eager, double, loss.scalars)
    plain = with_gradients(loss.eager, single, loss.scalars)
    assert got["loss"].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    condition, sizes = conditioning(loss, double)
    for key, value in got.items():
        if dtype == torch.float64:
            size = sizes.get(key, 1.0)
            torch.testing.assert_close(value.cpu(), truth[key], rtol=1e-13 * condition, atol=1e-14 * condition * size)
            continue
        own = dtype if key in ("x.grad", "y.grad") else torch.float32
        size = sizes.get(key, truth[key].abs().max().item() if truth[key].numel() else 0.0)
        extra = 4 * torch.finfo(torch.float32).eps * size * condition
        where = f"{case.name}, {loss.options}, {dtype}, {key}"
        judge(where, value, truth[key], [plain[key]], plain[key], own, extra=extra)


def conditioning(loss: Loss, arguments: dict[str, Any]) -> tuple[float, dict[str, float]]:
    """The largest logit, at least 1, whose rounding is a relative error of its exponential. And for what is a sum over
    all pairs that may cancel, the sum of its terms' sizes."""
    s, positive = stored_similarity(**arguments)
    s.requires_grad_()
    numbers = {n: torch.tensor(v, dtype=torch.float64) for n, v in loss.scalars.items()}
    (g,) = torch.autograd.grad(loss.stored(s, positive, **numbers, **loss.options), s)
    alpha, factor = arguments["alpha"], loss.scalars.get("scale", 1 / loss.scalars.get("temperature", 1.0))
    K, L = arguments["x"].shape[1], arguments["y"].shape[1]
    entropy = math.log(max(K, L)) * (K if arguments.get("kind") == "soft_maxsim" else 1)
    by_alpha = torch.ones(()) / 4 if "match_bias" in arguments else entropy / alpha.square()
    sizes = {
        "loss": 1.0,
        "alpha.grad": (g.abs().sum() * by_alpha).item(),
        "match_bias.grad": g.abs().sum().item() / 4,
        "temperature.grad": (g * s).abs().sum().item() * factor,
        "scale.grad": (g * s).abs().sum().item() / factor,
        "bias.grad": g.abs().sum().item() / factor,
    }
    return (max(1.0, s.abs().max().item() * factor) if s.numel() else 1.0), sizes
