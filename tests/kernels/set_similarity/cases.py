"""One table of cases for set_similarity, run on every backend and for every kind against the float64 reference.

The cases are packed, as the op takes them; that padded, masked and nested sets become the same is for `test_contract`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from setemb_kernels.ops.set_similarity import reference
from tests.kernels.judge import judge, on_cpu

KINDS = ("smooth_chamfer", "chamfer", "maxsim", "soft_maxsim", "max", "match_probability")
"""Those of the op; "mean" is made of one of them."""


class Inputs(NamedTuple):
    """Arguments of one call, and the upstream gradient."""

    x: Tensor
    x_offsets: Tensor
    y: Tensor
    y_offsets: Tensor
    candidates: Tensor | None
    alpha: Tensor
    bias: Tensor
    kind: str
    mean: bool
    grad: Tensor

    def to(self, dtype: torch.dtype) -> Inputs:
        return self._replace(**{name: getattr(self, name).to(dtype) for name in ("x", "y", "grad")})


Results = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]
"""The similarity and the gradients for x, y, alpha (the scale) and bias."""
NAMES = ("similarity", "x.grad", "y.grad", "alpha.grad", "bias.grad")


@dataclass(frozen=True)
class Case:
    """Sizes and kind of values of one call."""

    name: str
    N: int
    M: int
    K: int | tuple[int, int]
    """Vectors in a set of x: as many, or from so many to so many."""
    L: int | tuple[int, int]
    D: int
    alpha: float = 16.0
    scale: float = 5.0
    bias: float = -1.0
    mean: bool = False
    """Of maxsim and soft_maxsim."""
    pairs: str = ""
    """"paired", "candidates" (some of them -1, some twice) or all."""
    norm: float = 1.0
    """Length of the vectors."""
    unit: bool = True
    """Vectors of exactly that length (else Gaussian)."""
    empty: str = ""
    """Sides of which every third set is empty: "x", "y", "xy"."""
    layout: str = ""
    """"transposed", "expanded", "sliced" or contiguous."""
    ties: bool = False
    """Vectors are of small integers, and many are alike: all sums are exact."""
    spare: int = 0
    """Rows beyond the last set, of NaN."""
    wide: bool = False
    """Needs more range than float16 has."""
    kinds: tuple[str, ...] = KINDS

    def build(self, kind: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
        """Fresh inputs, rounded to dtype; the same for every backend."""
        generator = torch.Generator().manual_seed(seed)
        x, x_offsets = self._sets(self.N, self.K, "x", generator)
        y, y_offsets = self._sets(self.M, self.L, "y", generator)
        candidates = None
        if self.pairs == "paired":
            candidates = torch.arange(self.N)[:, None]
        elif self.pairs == "candidates":
            candidates = torch.randint(-1, self.M, (self.N, 5), generator=generator)
            candidates[:, 4] = candidates[:, 3]
        shape = (self.N, self.M) if candidates is None else candidates.shape
        grad = torch.randn(shape, generator=generator, dtype=torch.float64)
        x, y = (_lay_out(v.to(device, dtype), self.layout) for v in (x, y))
        grad = _lay_out(grad.to(device, dtype), self.layout.replace("expanded", ""))
        first = {"match_probability": self.scale}.get(kind, self.alpha if kind in reference.SOFT else 1.0)
        return Inputs(
            x,
            x_offsets.to(device),
            y,
            y_offsets.to(device),
            None if candidates is None else candidates.to(device),
            torch.tensor(first, dtype=torch.float64),
            torch.tensor(self.bias if kind == "match_probability" else 0.0, dtype=torch.float64),
            kind,
            self.mean and "maxsim" in kind,
            grad,
        )

    def _sets(
        self, sets: int, vectors: int | tuple[int, int], side: str, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        low, high = (vectors, vectors) if isinstance(vectors, int) else vectors
        counts = torch.randint(low, high + 1, (sets,), generator=generator)
        if side in self.empty:
            counts[::3] = 0
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
        shape = (int(offsets[-1]) + self.spare, self.D)
        if self.ties:
            v = torch.randint(-1, 2, shape, generator=generator).double()
            v = v[torch.randint(0, max(1, min(4, len(v))), (len(v),), generator=generator)] if len(v) else v
        else:
            v = torch.randn(shape, generator=generator, dtype=torch.float64)
            v = torch.nn.functional.normalize(v, dim=-1) if self.unit else v
        if self.spare:
            v[-self.spare :] = float("nan")
        return v * self.norm, offsets


def _lay_out(v: Tensor, layout: str) -> Tensor:
    """The same values behind other strides."""
    if layout == "transposed":
        return v.T.contiguous().T
    if layout == "sliced":
        padded = v.new_full([2 * v.shape[0], v.shape[1] + 3], float("nan"))
        padded[::2, 1:-2] = v
        return padded[::2, 1:-2]
    if layout == "expanded":
        return v[:1].expand_as(v)
    return v


HARD = ("chamfer", "maxsim", "max")
CASES = [
    Case("odd sizes", 5, 7, 3, 4, 33),
    Case("paper", 20, 60, 4, 4, 64),
    Case("one element", 1, 1, 1, 1, 1),
    Case("one vector a set", 37, 70, 1, 1, 65),
    Case("one against many", 1, 90, 1, 6, 32),
    Case("many against one", 90, 1, 6, 1, 32),
    Case("K 2 L 17", 19, 23, 2, 17, 48),
    Case("K 16 L 3", 9, 40, 16, 3, 24),
    Case("tokens", 6, 9, 32, 50, 128),
    Case("a query", 1, 40, 32, 60, 96),
    Case("a small query", 1, 300, 4, (1, 9), 128),
    Case("D 1", 6, 20, 3, 2, 1),
    Case("D 1031", 6, 20, 3, 2, 1031),
    Case("D 1024", 3, 8, 4, 9, 1024),
    Case("ragged", 13, 31, (1, 9), (1, 40), 40),
    Case("ragged documents", 4, 11, 32, (8, 90), 64, mean=True),
    Case("ragged, Gaussian", 13, 31, (1, 9), (1, 40), 40, unit=False),
    Case("sets larger than a tile", 2, 3, 300, 130, 20),
    Case("sets of 1100", 1, 2, (3, 1100), 1100, 16),
    Case("a set of many among small", 4, 5, (1, 3), (1, 700), 24),
    Case("paired", 23, 23, (1, 5), (1, 70), 48, pairs="paired"),
    Case("paired, one vector", 23, 23, 1, 1, 48, pairs="paired"),
    Case("candidates", 9, 20, (1, 20), (1, 40), 64, pairs="candidates", mean=True),
    Case("candidates, empty sets", 9, 20, (1, 6), (1, 40), 64, pairs="candidates", empty="xy"),
    Case("empty sets among others", 21, 50, (1, 4), (1, 6), 40, empty="xy"),
    Case("empty sets of x", 21, 50, 4, 6, 40, empty="x"),
    Case("all empty", 5, 9, 0, 4, 16),
    Case("rows of no set", 5, 9, (1, 4), (1, 30), 16, spare=3),
    Case("transposed", 12, 12, 4, 5, 64, layout="transposed"),
    Case("expanded", 12, 12, 4, 5, 64, layout="expanded"),
    Case("sliced", 12, 12, 4, 5, 64, layout="sliced"),
    Case("ties", 10, 40, (1, 6), (1, 30), 32, ties=True, norm=0.25),
    Case("ties, hard", 10, 40, (1, 6), (1, 30), 32, ties=True, alpha=1e5, norm=0.25),
    Case("alpha 40", 10, 40, 4, 4, 32, alpha=40.0, scale=40.0),
    Case("alpha 1e4", 10, 40, 4, 4, 32, alpha=1e4, scale=-20.0, bias=3.0),
    Case("alpha 1e30", 10, 40, 4, 4, 32, alpha=1e30, scale=1e30, kinds=("smooth_chamfer", "soft_maxsim")),
    Case("alpha 0.01", 10, 40, 4, 4, 32, alpha=0.01, scale=0.0),
    Case("alpha 1e-3, long", 10, 40, 4, 4, 32, alpha=1e-3, scale=1e-3, norm=30.0),
    Case("long vectors", 10, 40, 4, 4, 32, norm=20.0, scale=0.1),
    Case("short vectors", 10, 40, 4, 4, 32, norm=1e-3),
    Case("tiny vectors", 10, 40, 4, 4, 32, norm=1e-18, wide=True),
    Case("huge vectors", 10, 40, 4, 4, 32, norm=1e18, wide=True, kinds=(*HARD, "smooth_chamfer", "soft_maxsim")),
    Case("out of the range of float16", 10, 40, 4, 4, 32, norm=300.0, kinds=HARD),
    Case("no x", 0, 4, 3, 2, 8),
    Case("no y", 4, 0, 3, 2, 8),
    Case("no features", 3, 4, 2, 5, 0, kinds=("smooth_chamfer", "chamfer", "soft_maxsim", "max", "match_probability")),
]


def cases(dtype: torch.dtype) -> Iterator[tuple[Case, str]]:
    """The cases that dtype can hold, for each kind."""
    return ((c, kind) for c in CASES if not (c.wide and dtype == torch.float16) for kind in c.kinds)


def eager(i: Inputs) -> Results:
    """What one would write: padded sets and stored scores, all in the dtype of the inputs."""
    x, y = (v.detach().clone().requires_grad_() for v in (i.x, i.y))
    alpha, bias = (v.to(x.device, x.dtype).requires_grad_() for v in (i.alpha, i.bias))
    (a, a_valid), (b, b_valid) = _padded(x, i.x_offsets), _padded(y, i.y_offsets)
    if i.candidates is None:
        c = torch.einsum("nkd,mld->nmkl", a, b)
        valid = a_valid[:, None, :, None] & b_valid[:, None, :]
    else:
        chosen = i.candidates.clamp(min=0)
        c = torch.einsum("nkd,nmld->nmkl", a, b[chosen])
        valid = a_valid[:, None, :, None] & b_valid[chosen][:, :, None, :]
    x_count, y_count = valid.any(3).sum(2).clamp(min=1), valid.any(2).sum(2).clamp(min=1)
    if i.kind == "match_probability":
        s = torch.where(valid, torch.sigmoid(alpha * c + bias), 0).sum((2, 3)) / x_count / y_count
    elif i.kind == "max":
        s = _largest(c.masked_fill(~valid, -torch.inf).flatten(2), 2)
    else:

        def along(dim: int) -> Tensor:
            if i.kind in reference.SOFT:
                found = (alpha * c).masked_fill(~valid, -torch.inf).logsumexp(dim) / alpha
            else:
                found = _largest(c.masked_fill(~valid, -torch.inf), dim)
            return torch.where(valid.any(dim), found, 0).sum(2)

        if i.kind in ("smooth_chamfer", "chamfer"):
            s = along(3) / (2 * x_count) + along(2) / (2 * y_count)
        else:
            s = along(3) / x_count if i.mean else along(3)
    s = torch.where(valid.any(3).any(2), s, 0)
    if i.candidates is not None:
        s = s.masked_fill(i.candidates < 0, -torch.inf)
    s.backward(i.grad)
    zero = torch.zeros_like(alpha)
    return (s.detach(), *(v.grad if v.grad is not None else zero for v in (x, y, alpha, bias)))  # type: ignore[return-value]


def _padded(v: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    counts = offsets.diff()
    place = torch.arange(int(counts.max()), device=v.device)
    valid = place < counts[:, None]
    return torch.where(valid[..., None], v[torch.where(valid, offsets[:-1, None] + place, 0)], 0), valid


def _largest(values: Tensor, dim: int) -> Tensor:
    return values.take_along_dim(values.argmax(dim, keepdim=True), dim).squeeze(dim)


def _eager_in_another_order(i: Inputs, seed: int) -> Results:
    """`eager` with sets and features permuted: no order of summation is the right one, and in float64 the judge has
    one too."""
    generator = torch.Generator().manual_seed(seed)
    sizes = (len(i.x_offsets) - 1, len(i.y_offsets) - 1, i.x.shape[1])
    n, m, d = (torch.randperm(size, generator=generator).to(i.x.device) for size in sizes)
    (x_rows, x_offsets), (y_rows, y_offsets) = _permuted(i.x_offsets, n, len(i.x)), _permuted(i.y_offsets, m, len(i.y))
    if i.candidates is None:
        candidates, grad = None, i.grad[n][:, m]
    else:
        candidates, grad = i.candidates[n], i.grad[n]
        candidates = torch.where(candidates < 0, -1, m.argsort()[candidates.clamp(min=0)])
    try:
        s, x_grad, y_grad, *rest = eager(
            i._replace(
                x=i.x[x_rows][:, d],
                x_offsets=x_offsets,
                y=i.y[y_rows][:, d],
                y_offsets=y_offsets,
                candidates=candidates,
                grad=grad,
            )
        )
    except (IndexError, RuntimeError):  # empty reductions
        return reference_results(i)
    n, m, d = n.argsort(), m.argsort(), d.argsort()
    s = s[n][:, m] if candidates is None else s[n]
    return s, x_grad[x_rows.argsort()][:, d], y_grad[y_rows.argsort()][:, d], *rest  # type: ignore[return-value]


def _permuted(offsets: Tensor, order: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Which rows the sets are made of in this order (then those of no set), and their offsets."""
    pieces = [torch.arange(int(offsets[s]), int(offsets[s + 1]), device=offsets.device) for s in order.tolist()]
    pieces.append(torch.arange(int(offsets[-1]), rows, device=offsets.device))
    return torch.cat(pieces), torch.cat([offsets[:1], offsets.diff()[order].cumsum(0)])


def reference_results(i: Inputs, wide: bool = False) -> Results:
    """The reference in the dtype of the inputs."""
    args = i[:-1]
    return reference.forward(*args, wide), *reference.backward(i.grad, *args, True, True, True, True)


Run = Callable[[Inputs], Results]


def check(
    run: Run, case: Case, kind: str, dtype: torch.dtype, device: str = "cpu", seed: int = 0, *, few: bool = False
) -> None:
    """Run one case and compare similarity and gradients with the float64 reference.

    Args:
        few: of so few sets that eager's own error may be small by chance: sums over all pairs may be off by what the
            rounding of the dot products, and of logits as large as these, comes to.
    """
    inputs = case.build(kind, dtype, device, seed)
    condition = 2 * case.D**0.5 * _largest_logit(inputs) if few else 1.0
    results = run(inputs)
    inputs = on_cpu(inputs)
    _compare(f"{case.name}, {kind}, {dtype}", inputs, results, inputs, inputs, dtype, condition)


def _largest_logit(i: Inputs) -> float:
    """Between 1 and 1,000: the rounding of a logit is a relative error of its exponential."""
    lengths = [v.double().nan_to_num(0, 0, 0).norm(dim=1).amax().item() if v.numel() else 0.0 for v in (i.x, i.y)]
    return min(max(1.0, abs(i.alpha.item()) * lengths[0] * lengths[1]), 1e3)


def check_wide(run: Run, case: Case, kind: str, dtype: torch.dtype, device: str = "cpu") -> None:
    """16-bit sets, and a similarity in float32 that is as near to the truth as eager's of the same values in float32.

    The upstream gradient is of float32 too; those of x and y are rounded to `dtype`, as in `check`. A processor's own
    products of bfloat16 are 0 below the normal numbers of float32.
    """
    inputs = case.build(kind, dtype, device)
    inputs = inputs._replace(grad=inputs.grad.float() * (1 + 2**-12))  # which 16 bits cannot hold
    results = run(inputs)
    assert [r.dtype for r in results[:3]] == [torch.float32, dtype, dtype]
    inputs = on_cpu(inputs)
    single = inputs.to(torch.float32)
    narrow = inputs._replace(grad=inputs.grad.to(dtype))
    _compare(
        f"{case.name}, {kind}, {dtype} in, float32 out",
        inputs,
        results,
        single,
        narrow,
        torch.float32,
        flushed=case.D * torch.finfo(torch.float32).smallest_normal if dtype == torch.bfloat16 else 0.0,
    )


def _compare(
    where: str,
    i: Inputs,
    results: Results,
    forward: Inputs,
    backward: Inputs,
    dtype: torch.dtype,
    condition: float = 1.0,
    flushed: float = 0.0,
) -> None:
    """Judge `results`: the similarity by eager on `forward`, in dtype, the gradients by eager on `backward`."""
    truths = reference_results(i.to(torch.float64))
    terms = reference_results(i.to(torch.float64)._replace(grad=i.grad.double().abs()))
    eagers = [_eager_in_another_order(i, order) for i in (forward, backward) for order in range(3)]
    ours = (reference_results(forward)[0], *reference_results(backward)[1:])
    for n, (name, result, truth) in enumerate(zip(NAMES, results, truths, strict=True)):
        got = result.cpu()
        plain = [e[n] for e in (eagers[:3] if n == 0 else eagers[3:])]
        if n == 0 and i.candidates is not None:
            none = i.candidates < 0
            assert (got[none] == -torch.inf).all(), where
            got, truth = got.masked_fill(none, 0), truth.masked_fill(none, 0)
            plain = [p.masked_fill(none, 0) for p in plain]
        judge(
            f"{where}, {name}",
            got,
            truth,
            plain,
            ours[n],
            dtype if n == 0 else i.x.dtype,
            saturates=n == 0,
            # a sum over all pairs, in what it is accumulated in, that may cancel: its terms of one sign are rounded
            extra=2 * torch.finfo(reference.accumulate_dtype(i.x.dtype)).eps * terms[n].abs().item() * condition
            if n > 2
            else flushed
            if n == 0
            else 0.0,
        )
