"""One table of cases for smooth_chamfer, run on every backend against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from setemb_kernels.ops.smooth_chamfer import reference
from tests.kernels.judge import judge, on_cpu


class Inputs(NamedTuple):
    """Arguments of one call, and the upstream gradient."""

    x: Tensor
    y: Tensor
    alpha: Tensor
    x_mask: Tensor | None
    y_mask: Tensor | None
    grad: Tensor


@dataclass(frozen=True)
class Case:
    """Sizes and kind of values of one call."""

    name: str
    N: int
    M: int
    K: int
    L: int
    D: int
    alpha: float = 16.0
    norm: float = 1.0
    """Length of the vectors."""
    unit: bool = True
    """Vectors of exactly that length (else Gaussian)."""
    x_mask: str = ""
    """"random", "some empty", "all" (all masked) or none."""
    y_mask: str = ""
    poison: bool = False
    """Masked vectors hold NaN and inf."""
    layout: str = ""
    """"transposed", "expanded", "sliced" or contiguous."""
    ties: bool = False
    """All vectors are copies of two."""
    outlier: float = 1.0
    """One vector of x is this many times as long."""
    wide: bool = False
    """Needs more range than float16 has."""

    def build(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
        """Fresh inputs, rounded to dtype; the same for every backend."""
        generator = torch.Generator().manual_seed(seed)
        x = self._sets(self.N, self.K, generator)
        y = self._sets(self.M, self.L, generator)
        if self.outlier != 1 and x.numel():
            x[self.N // 2, 0] *= self.outlier
        x_mask = _mask(self.x_mask, self.N, self.K, generator)
        y_mask = _mask(self.y_mask, self.M, self.L, generator)
        if self.poison:
            for v, mask in ((x, x_mask), (y, y_mask)):
                if mask is not None:
                    v[~mask] = torch.tensor([float("nan"), float("inf"), -float("inf")])[
                        torch.arange(self.D) % 3
                    ].double()
        grad = torch.randn(self.N, self.M, generator=generator, dtype=torch.float64)
        x, y, grad = (_lay_out(v.to(device, dtype), self.layout) for v in (x, y, grad))
        return Inputs(
            x,
            y,
            torch.tensor(self.alpha, dtype=torch.float64),
            None if x_mask is None else x_mask.to(device),
            None if y_mask is None else y_mask.to(device),
            grad,
        )

    def _sets(self, sets: int, vectors: int, generator: torch.Generator) -> Tensor:
        v = torch.randn(sets, vectors, self.D, generator=generator, dtype=torch.float64)
        if self.ties and v.numel():
            v = v.flatten(0, 1)[torch.arange(sets * vectors) % 2].view_as(v)
        if self.unit:
            v = torch.nn.functional.normalize(v, dim=-1)
        return v * self.norm


def _mask(kind: str, sets: int, vectors: int, generator: torch.Generator) -> Tensor | None:
    if not kind:
        return None
    mask = torch.rand(sets, vectors, generator=generator) < 0.6
    if kind == "random" and vectors:
        mask[:, 0] = True
    elif kind == "some empty":
        mask[::3] = False
    elif kind == "all":
        mask[:] = False
    return mask


def _lay_out(v: Tensor, layout: str) -> Tensor:
    """The same values behind other strides."""
    if layout == "transposed":
        return v.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "sliced":
        padded = v.new_full([2 * v.shape[0], *v.shape[1:-1], v.shape[-1] + 3], float("nan"))
        padded[::2, ..., 1:-2] = v
        return padded[::2, ..., 1:-2]
    if layout == "expanded" and v.dim() == 3:
        return v[:1].expand_as(v)
    return v


CASES = [
    Case("odd sizes", 5, 7, 3, 4, 33),
    Case("paper", 20, 100, 4, 4, 64),
    Case("larger than a tile", 70, 150, 4, 4, 300),
    Case("larger than a tile, whole steps", 70, 50, 4, 4, 328),
    Case("many rows", 300, 9, 4, 4, 40),
    Case("one element", 1, 1, 1, 1, 1),
    Case("one vector a set", 37, 70, 1, 1, 65),
    Case("one vector a set, alpha 1e-4", 37, 24, 1, 1, 64, alpha=1e-4),
    Case("one against many", 1, 90, 1, 6, 32),
    Case("many against one", 90, 1, 6, 1, 32),
    Case("K 2 L 7", 19, 23, 2, 7, 48),
    Case("K 16 L 3", 9, 40, 16, 3, 24),
    Case("K 8 L 8", 17, 33, 8, 8, 128),
    Case("K 64 L 5", 4, 11, 64, 5, 16),
    Case("K 5 L 64", 11, 4, 5, 64, 16),
    Case("sets larger than a tile", 3, 5, 130, 70, 20),
    Case("few long sets", 6, 3, 70, 40, 20),
    Case("few long sets, masks", 6, 3, 40, 70, 20, x_mask="some empty", y_mask="random"),
    Case("K 1 L 16", 40, 20, 1, 16, 40),
    Case("D 1", 6, 20, 3, 2, 1),
    Case("D 1031", 6, 20, 3, 2, 1031),
    Case("Gaussian", 12, 35, 4, 5, 64, unit=False),
    Case("masks", 21, 50, 4, 6, 40, x_mask="random", y_mask="random"),
    Case("x mask alone", 21, 50, 4, 6, 40, x_mask="random"),
    Case("y mask alone", 21, 50, 4, 6, 40, y_mask="random"),
    Case("empty sets among others", 21, 50, 4, 6, 40, x_mask="some empty", y_mask="some empty"),
    Case("empty sets, Gaussian", 21, 50, 4, 6, 40, x_mask="some empty", y_mask="some empty", unit=False),
    Case("all masked", 5, 9, 3, 2, 16, x_mask="all", y_mask="random"),
    Case("masked NaN and inf", 21, 50, 4, 6, 40, x_mask="some empty", y_mask="some empty", poison=True),
    Case(
        "masked NaN and inf, Gaussian", 21, 50, 4, 6, 40, x_mask="random", y_mask="some empty", poison=True, unit=False
    ),
    Case("transposed", 12, 35, 4, 5, 64, layout="transposed"),
    Case("expanded", 12, 35, 4, 5, 64, layout="expanded"),
    Case("sliced", 12, 35, 4, 5, 64, layout="sliced"),
    Case("ties", 10, 40, 4, 4, 32, ties=True),
    Case("ties, hard", 10, 40, 4, 4, 32, ties=True, alpha=1e5),
    Case("alpha 40", 10, 40, 4, 4, 32, alpha=40.0),
    Case("alpha 1e4", 10, 40, 4, 4, 32, alpha=1e4),
    Case("alpha 1e30", 10, 40, 4, 4, 32, alpha=1e30),
    Case("alpha 0.01", 10, 40, 4, 4, 32, alpha=0.01),
    Case("alpha 1e-3, long", 10, 40, 4, 4, 32, alpha=1e-3, norm=30.0),
    Case("long vectors", 10, 40, 4, 4, 32, norm=20.0),
    Case("short vectors", 10, 40, 4, 4, 32, norm=1e-3),
    Case("tiny vectors", 10, 40, 4, 4, 32, norm=1e-18, wide=True),
    Case("huge vectors", 10, 40, 4, 4, 32, norm=1e18, wide=True),
    Case("overflowing products", 10, 40, 4, 4, 32, norm=1e30, wide=True),
    Case("gradients out of the range of float16", 10, 40, 4, 4, 32, norm=9e4),
    Case("gradients out of the range of float32", 10, 40, 4, 4, 32, norm=3e38, wide=True),
    Case("one outlier", 10, 40, 4, 4, 32, outlier=1e3),
    Case("one far outlier", 10, 40, 4, 4, 32, outlier=1e30, wide=True),
    Case("no x", 0, 4, 3, 2, 8),
    Case("no y", 4, 0, 3, 2, 8),
    Case("no vectors in x", 3, 4, 0, 2, 8),
    Case("no vectors in y", 3, 4, 2, 0, 8),
    Case("no features", 3, 4, 2, 5, 0),
]


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """The cases that dtype can hold."""
    return (case for case in CASES if not (case.wide and dtype == torch.float16))


def eager(i: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What one would write: the similarity and the gradients for x, y, alpha, all in the dtype of the inputs."""
    x, y = (v.detach().clone().requires_grad_() for v in (i.x, i.y))
    alpha = i.alpha.to(x.device, x.dtype).requires_grad_()
    x_valid = x.new_ones(x.shape[:2], dtype=torch.bool) if i.x_mask is None else i.x_mask
    y_valid = y.new_ones(y.shape[:2], dtype=torch.bool) if i.y_mask is None else i.y_mask
    a, b = torch.where(x_valid[..., None], x, 0), torch.where(y_valid[..., None], y, 0)
    z = alpha * torch.einsum("nkd,mld->nmkl", a, b)
    z = torch.where(x_valid[:, None, :, None] & y_valid[:, None, :], z, float("-inf"))
    by_row = torch.where(x_valid[:, None] & y_valid.any(1)[:, None], z.logsumexp(3), 0).sum(2)
    by_column = torch.where(x_valid.any(1)[:, None, None] & y_valid, z.logsumexp(2), 0).sum(2)
    s = by_row / x_valid.sum(1).clamp(min=1)[:, None] + by_column / y_valid.sum(1).clamp(min=1)
    s = s / (2 * alpha)
    s.backward(i.grad)
    return s.detach(), x.grad, y.grad, alpha.grad


def _eager_in_another_order(i: Inputs, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`eager` with sets and features permuted: no order of summation is the right one, and in float64 the judge has
    one too."""
    generator = torch.Generator().manual_seed(seed)
    n, m, d = (torch.randperm(size, generator=generator).to(i.x.device) for size in (*i.grad.shape, i.x.shape[2]))
    masks = [None if mask is None else mask[order] for mask, order in ((i.x_mask, n), (i.y_mask, m))]
    try:
        s, x_grad, y_grad, alpha_grad = eager(Inputs(i.x[n][..., d], i.y[m][..., d], i.alpha, *masks, i.grad[n][:, m]))
    except (IndexError, RuntimeError):  # empty reductions
        return reference_results(i)
    n, m, d = n.argsort(), m.argsort(), d.argsort()
    return s[n][:, m], x_grad[n][..., d], y_grad[m][..., d], alpha_grad


def reference_results(i: Inputs, wide: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The reference in the dtype of the inputs."""
    args = (i.x, i.y, i.alpha, i.x_mask, i.y_mask)
    return reference.forward(*args, wide), *reference.backward(i.grad, *args, True, True, True)


def _double(i: Inputs) -> Inputs:
    return Inputs(*(v.double() if v is not None and v.is_floating_point() else v for v in i))


Run = Callable[[Inputs], tuple[Tensor, Tensor, Tensor, Tensor]]


def check(run: Run, case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> None:
    """Run one case and compare similarity and gradients with the float64 reference."""
    inputs = case.build(dtype, device, seed)
    results = run(inputs)
    inputs = on_cpu(inputs)
    truths = reference_results(_double(inputs))
    in_reference = reference_results(inputs)
    terms = reference_results(_double(inputs)._replace(grad=inputs.grad.double().abs()))[3].abs().item()
    in_eager = [_eager_in_another_order(inputs, order) for order in range(3)]
    names = ("similarity", "x.grad", "y.grad", "alpha.grad")
    for name, got, truth, ours, *plain in zip(names, results, truths, in_reference, *in_eager, strict=True):
        judge(
            f"{case.name}, {dtype}, {name}",
            got,
            truth,
            plain,
            ours,
            dtype,
            saturates=name == "similarity",
            # A sum over all pairs that may cancel. Its terms have one sign for an upstream gradient of one sign; the
            # judge itself rounds each of them in float64.
            extra=2 * torch.finfo(torch.float64).eps * terms if name == "alpha.grad" else 0.0,
        )


def check_wide(run: Run, case: Case, dtype: torch.dtype, device: str = "cpu") -> None:
    """16-bit sets, and a similarity in float32 that is as near to the truth as eager's of the same values in float32.

    The upstream gradient is of float32 too; those of x and y are rounded to `dtype`, as in `check`.
    """
    inputs = case.build(dtype, device)
    inputs = inputs._replace(grad=inputs.grad.float() * (1 + 2**-12))  # which 16 bits cannot hold
    s, x_grad, y_grad, alpha_grad = run(inputs)
    assert (s.dtype, x_grad.dtype, y_grad.dtype) == (torch.float32, dtype, dtype)
    inputs = on_cpu(inputs)
    truths = reference_results(_double(inputs))
    single = Inputs(*(v.float() if v is not None and v.is_floating_point() else v for v in inputs))
    plain = [_eager_in_another_order(single, order) for order in range(3)]
    ours = reference_results(single)
    where = f"{case.name}, {dtype} in, float32 out"
    judge(f"{where}, similarity", s, truths[0], [p[0] for p in plain], ours[0], torch.float32, saturates=True)
    narrow = [_eager_in_another_order(inputs._replace(grad=inputs.grad.to(dtype)), order) for order in range(3)]
    for name, i, got in (("x.grad", 1, x_grad), ("y.grad", 2, y_grad)):
        judge(f"{where}, {name}", got, truths[i], [p[i] for p in narrow], ours[i].to(dtype), dtype)
    terms = reference_results(_double(inputs)._replace(grad=inputs.grad.double().abs()))[3].abs().item()
    extra = 2 * torch.finfo(torch.float64).eps * terms
    narrow_alpha = [p[3] for p in narrow]
    judge(f"{where}, alpha.grad", alpha_grad, truths[3], narrow_alpha, ours[3], dtype, extra=extra)
