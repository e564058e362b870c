"""One table of cases for slot_attention, run on every backend against the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from setemb_kernels.ops.slot_attention import reference
from tests.kernels.judge import judge, on_cpu
from tests.kernels.tf32 import Tf32Products


class Inputs(NamedTuple):
    """Arguments of one call, and the upstream gradient."""

    q: Tensor
    k: Tensor
    v: Tensor | None
    bias: Tensor | None
    mask: Tensor | None
    scale: float
    eps: float
    token_eps: float
    grad: Tensor


Results = tuple[Tensor, ...]
"""The update, and the gradients of q, k and, where there are, v and bias."""


@dataclass(frozen=True)
class Case:
    """Sizes and kind of values of one call."""

    name: str
    B: int
    H: int
    K: int
    T: int
    Dk: int
    Dv: int
    shared: bool = False
    """k and v have one head."""
    same: bool = False
    """The keys are the values: v is None."""
    bias: bool = False
    mask: str = ""
    """"random", "some empty", "tail", "all" (all masked) or none."""
    poison: bool = False
    """Masked tokens hold NaN and inf."""
    layout: str = ""
    """"transposed", "heads first", "expanded", "sliced" or contiguous."""
    norm: float = 1.0
    """Factor on q."""
    scale: float | None = None
    eps: float = 1e-7
    token_eps: float = 0.0
    ties: bool = False
    """All slots are alike."""

    def build(self, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Inputs:
        """Fresh inputs, rounded to dtype; the same for every backend."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        G = 1 if self.shared else self.H
        q = normal(self.B, self.H, self.K, self.Dk) * self.norm
        k, v = normal(self.B, G, self.T, self.Dk), normal(self.B, G, self.T, self.Dv)
        grad = normal(self.B, self.H, self.K, self.Dv)
        bias = normal(self.B, self.H, self.K) if self.bias else None
        if self.ties and self.K:
            q = q[:, :, :1].expand_as(q)
        mask = self._mask(generator)
        if self.poison and mask is not None:
            for tokens in (k, v):
                bad = torch.tensor([float("nan"), float("inf"), -float("inf")])[torch.arange(tokens.shape[3]) % 3]
                tokens.copy_(torch.where(mask[:, None, :, None], tokens, bad.double()))
        q, k, v, grad = (_lay_out(t.to(device, dtype), self.layout) for t in (q, k, v, grad))
        v = None if self.same else v
        return Inputs(
            q,
            k,
            v,
            None if bias is None else bias.to(device, dtype),
            None if mask is None else mask.to(device),
            self.scale if self.scale is not None else max(self.Dk, 1) ** -0.5,
            self.eps,
            self.token_eps,
            grad,
        )

    def _mask(self, generator: torch.Generator) -> Tensor | None:
        if not self.mask:
            return None
        mask = torch.rand(self.B, self.T, generator=generator) < 0.6
        if self.mask == "tail":
            lengths = torch.randint(1, self.T + 1, (self.B, 1), generator=generator)
            mask = torch.arange(self.T) < lengths
        elif self.mask == "some empty":
            mask[::2] = False
        elif self.mask == "all":
            mask[:] = False
        return mask


def _lay_out(t: Tensor, layout: str) -> Tensor:
    """The same values behind other strides (expanded: those of the first item for all)."""
    if layout == "transposed":
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "heads first":
        return t.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "sliced":
        padded = t.new_full([*t.shape[:2], 2 * t.shape[2], t.shape[3] + 3], float("nan"))
        padded[:, :, ::2, 1:-2] = t
        return padded[:, :, ::2, 1:-2]
    if layout == "expanded":
        return t[:1].expand_as(t)
    return t


CASES = [
    Case("odd sizes", 3, 2, 5, 7, 9, 11),
    Case("paper", 5, 4, 4, 36, 64, 64),
    Case("paper, absorbed", 5, 4, 4, 36, 96, 96, shared=True),
    Case("one element", 1, 1, 1, 1, 1, 1),
    Case("one slot", 3, 2, 1, 20, 16, 16),
    Case("two slots", 3, 1, 2, 20, 16, 24, shared=True),
    Case("one token", 4, 2, 4, 1, 16, 16),
    Case("seven slots", 2, 3, 7, 33, 20, 20),
    Case("eleven slots, shared", 2, 3, 11, 50, 24, 24, shared=True),
    Case("64 slots", 2, 1, 64, 40, 16, 16),
    Case("more slots than tokens", 2, 2, 16, 3, 16, 16),
    Case("many tokens", 1, 1, 8, 1500, 16, 24),
    Case("many tokens, masked", 2, 1, 4, 1100, 8, 8, mask="some empty"),
    Case("Dk 1", 3, 2, 4, 19, 1, 16),
    Case("Dv 1", 3, 2, 4, 19, 16, 1),
    Case("Dk below Dv", 2, 2, 4, 19, 8, 150),
    Case("Dk above Dv", 2, 2, 4, 19, 150, 8),
    Case("D 1031", 1, 1, 4, 9, 1031, 1031),
    Case("mask", 5, 2, 4, 33, 24, 24, mask="random"),
    Case("mask, shared", 5, 2, 4, 33, 24, 24, mask="random", shared=True),
    Case("padded", 5, 2, 4, 33, 24, 24, mask="tail", shared=True),
    Case("empty items among others", 5, 2, 4, 33, 24, 24, mask="some empty"),
    Case("all masked", 3, 2, 4, 12, 8, 8, mask="all"),
    Case("all masked, no eps", 3, 2, 4, 12, 8, 8, mask="all", eps=0.0),
    Case("masked NaN and inf", 5, 2, 4, 33, 24, 24, mask="some empty", poison=True),
    Case("masked NaN and inf, shared", 5, 2, 4, 33, 24, 24, mask="random", poison=True, shared=True),
    Case("transposed", 3, 2, 4, 17, 12, 12, layout="transposed"),
    Case("heads first", 3, 4, 4, 17, 12, 20, layout="heads first", shared=True),
    Case("expanded over items", 3, 2, 4, 17, 12, 12, layout="expanded", shared=True),
    Case("sliced", 3, 2, 4, 17, 12, 12, layout="sliced", mask="random", bias=True),
    Case("bias", 3, 2, 4, 33, 24, 24, bias=True),
    Case("bias, shared, masked", 3, 2, 4, 33, 24, 24, bias=True, shared=True, mask="random"),
    Case("classic normalisation", 3, 1, 7, 33, 24, 24, eps=0.0, token_eps=1e-8),
    Case("large token_eps", 3, 2, 4, 33, 24, 24, eps=0.0, token_eps=0.1, mask="random"),
    Case("large eps", 3, 2, 4, 33, 24, 24, eps=2.0),
    Case("keys are values", 3, 2, 4, 33, 24, 24, same=True),
    Case("keys are values, paper", 5, 4, 4, 36, 96, 96, shared=True, same=True, layout="heads first"),
    Case("keys are values, masked", 5, 3, 5, 33, 20, 20, shared=True, same=True, mask="some empty", poison=True),
    Case(
        "keys are values, token_eps", 2, 1, 3, 700, 20, 20, same=True, eps=0.0, token_eps=0.1, bias=True, mask="random"
    ),
    Case("ties", 3, 2, 4, 33, 24, 24, ties=True),
    Case("hard choice", 3, 2, 4, 33, 24, 24, norm=30.0),
    Case("harder than the exponential reaches", 3, 2, 4, 33, 24, 24, norm=300.0, eps=1e-6),
    Case("soft choice", 3, 2, 4, 33, 24, 24, norm=1e-3),
    Case("negative scale", 3, 2, 4, 33, 24, 24, scale=-0.3),
    Case("scale 0", 3, 2, 4, 33, 24, 24, scale=0.0),
    Case("no items", 0, 2, 4, 5, 8, 8),
    Case("no heads", 2, 0, 4, 5, 8, 8, shared=True),
    Case("no slots", 2, 2, 0, 5, 8, 8),
    Case("no tokens", 2, 2, 4, 0, 8, 8, mask="random"),
    Case("no features in k", 2, 2, 4, 5, 0, 8),
    Case("no features in v", 2, 2, 4, 5, 8, 0),
]


def eager(i: Inputs) -> Results:
    """What one would write, all in the dtype of the inputs."""
    q, k, v, bias = (None if t is None else t.detach().clone().requires_grad_() for t in (i.q, i.k, i.v, i.bias))
    keys, values = k, k if v is None else v
    if i.mask is not None:
        keys, values = (torch.where(i.mask[:, None, :, None], t, 0) for t in (keys, values))
    logits = (q @ keys.transpose(-1, -2)) * i.scale
    weights = (logits if bias is None else logits + bias[..., None]).softmax(2) + i.token_eps
    if i.mask is not None:
        weights = torch.where(i.mask[:, None, None], weights, 0)
    total = weights.sum(-1, keepdim=True) + i.eps
    out = torch.where(total > 0, (weights / torch.where(total > 0, total, 1)) @ values, 0)
    out.backward(i.grad)
    leaves = [t for t in (q, k, v, bias) if t is not None]
    return out.detach(), *(torch.zeros_like(t) if t.grad is None else t.grad for t in leaves)


def _eager_in_another_order(i: Inputs, seed: int) -> Results:
    """`eager` with tokens and features permuted: no order of summation is the right one."""
    generator = torch.Generator().manual_seed(seed)
    t, d, e = (torch.randperm(n, generator=generator).to(i.q.device) for n in (*i.k.shape[2:], i.grad.shape[3]))
    e = d if i.v is None else e
    v, mask = None if i.v is None else i.v[:, :, t][..., e], None if i.mask is None else i.mask[:, t]
    out, q, k, *rest = eager(i._replace(q=i.q[..., d], k=i.k[:, :, t][..., d], v=v, mask=mask, grad=i.grad[..., e]))
    t, d, e = t.argsort(), d.argsort(), e.argsort()
    if i.v is not None:
        rest[0] = rest[0][:, :, t][..., e]
    return out[..., e], q[..., d], k[:, :, t][..., d], *rest


def judge_in_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `check` judge by eager PyTorch in tf32."""
    eager_in_float32 = _eager_in_another_order

    def in_tf32(i: Inputs, seed: int) -> Results:
        with Tf32Products() as mode:
            results = eager_in_float32(i, seed)
        assert mode.products or not i.k.numel()
        return results

    monkeypatch.setattr(f"{__name__}._eager_in_another_order", in_tf32)


def reference_results(i: Inputs) -> Results:
    """The reference in the dtype of the inputs."""
    return through(reference, i)


def through(backend: object, i: Inputs) -> Results:
    """`forward` and `backward` of an implementation."""
    out, total = backend.forward(*i[:-1])  # type: ignore[attr-defined]
    needs = (True, True, i.v is not None, i.bias is not None)
    gradients = backend.backward(i.grad, *i[:5], out, total, i.scale, i.token_eps, *needs)  # type: ignore[attr-defined]
    return out, *(g for g, need in zip(gradients, needs, strict=True) if need)


def cancelling_terms(i: Inputs) -> dict[str, float]:
    """How large the terms are of which gradients are differences, summed as independent errors are.

    Through a softmax and a mean a gradient is ``A (h . v - h . out)`` less its own mean over the slots. Where all
    tokens are alike, it is nothing but rounding.
    """
    if not i.q.numel() or not i.k.numel() or not i.grad.numel():
        return {}
    keys, values = i.k, i.k if i.v is None else i.v
    if i.mask is not None:
        keys, values = (torch.where(i.mask[:, None, :, None], t, 0) for t in (keys, values))
    out, total = reference.forward(*i[:-1])
    h = torch.where(total[..., None] > 0, i.grad / total[..., None], 0)
    logits = i.scale * (i.q @ keys.transpose(-1, -2)) + (0 if i.bias is None else i.bias[..., None])
    by_attention = (h @ values.transpose(-1, -2)).abs() + (h * out).sum(-1, keepdim=True).abs()
    a = logits.softmax(2)
    by_logit = (a * (by_attention + (a * by_attention).sum(2, keepdim=True))).square()
    q = i.scale**2 * (by_logit @ keys.square())
    k = i.scale**2 * (by_logit.transpose(-1, -2) @ i.q.square())
    if keys.shape[1] == 1:
        k = k.sum(1)
    squares = {"q.grad": q, "k.grad": k, "bias.grad": by_logit.sum(-1)}
    return {name: t.amax().sqrt().item() for name, t in squares.items()}


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """The cases of a dtype: all."""
    return iter(CASES)


def check(run: Callable[[Inputs], Results], case: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> None:
    """Run one case and compare update and gradients with the float64 reference."""
    inputs = case.build(dtype, device, seed)
    results = run(inputs)
    inputs = on_cpu(inputs)
    double = inputs._replace(
        **{n: t.double() for n, t in inputs._asdict().items() if isinstance(t, Tensor) and n != "mask"}
    )
    truths, ours = reference_results(double), reference_results(inputs)
    orders = [_eager_in_another_order(inputs, order) for order in range(3)]
    names = ["out", "q.grad", "k.grad"]
    names += ["v.grad"] * (inputs.v is not None) + ["bias.grad"] * (inputs.bias is not None)
    terms = cancelling_terms(double)
    for name, got, truth, in_reference, *plain in zip(names, results, truths, ours, *orders, strict=True):
        extra = torch.finfo(dtype).eps * terms.get(name, 0.0)
        judge(f"{case.name}, {dtype}, {name}", got, truth, plain, in_reference, dtype, extra=extra)
        if name == "out":
            assert got.dtype == dtype
