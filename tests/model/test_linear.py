"""Products by oneDNN are those of torch.nn.functional.linear, and what is made again changes no number."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from setemb.modules import linear as module
from setemb.modules.linear import Linear, linear, linear_after, linear_by_head, linear_by_head_after

needs_onednn = pytest.mark.skipif(not module.HAS_ONEDNN, reason="no oneDNN on this processor")


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def compare(ours: Tensor, truth: Tensor, leaves: list[Tensor], upstream: Tensor) -> None:
    """Values and gradients against those in float64."""
    exact = torch.autograd.grad(truth, leaves, upstream.to(truth.dtype))
    found = torch.autograd.grad(ours, leaves, upstream)
    for a, b in zip((ours, *found), (truth, *exact), strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-5, atol=1e-5 * b.detach().abs().amax().item())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced", "one upstream for all"])
@pytest.mark.parametrize(("rows", "inside", "outside"), [(5, 7, 3), (1, 1, 1), (1, 9, 4), (130, 65, 33)])
def test_linear(rows: int, inside: int, outside: int, layout: str, bias: bool) -> None:
    x = normal(rows, inside)
    if layout == "transposed":
        x = x.T.contiguous().T
    if layout == "sliced":
        x = x.repeat_interleave(2, 0)[::2]
    leaves = [x.requires_grad_(), normal(outside, inside, seed=1).requires_grad_()]
    leaves += [normal(outside, seed=2).requires_grad_()] if bias else []
    upstream = normal(1, 1, seed=3).expand(rows, outside) if "all" in layout else normal(rows, outside, seed=3)
    compare(linear(*leaves), functional.linear(*(leaf.double() for leaf in leaves)), leaves, upstream)


@pytest.mark.parametrize(("rows", "inside", "outside"), [(0, 4, 3), (4, 0, 3), (4, 3, 0)])
def test_empty(rows: int, inside: int, outside: int) -> None:
    x, weight = normal(rows, inside).requires_grad_(), normal(outside, inside).requires_grad_()
    y = linear(x, weight)
    assert torch.equal(y, functional.linear(x, weight))
    for gradient, leaf in zip(torch.autograd.grad(y.sum(), (x, weight)), (x, weight), strict=True):
        assert torch.equal(gradient, torch.zeros_like(leaf))


def test_by_head() -> None:
    x = normal(10, 3, 8).transpose(0, 1).requires_grad_()  # rows of a head are not next to each other
    for weight in (normal(3, 6, 8, seed=1), normal(3, 8, 6, seed=1).mT):
        weight.requires_grad_()
        compare(linear_by_head(x, weight), x.double() @ weight.double().mT, [x, weight], normal(3, 10, 6, seed=2))


def test_second_derivative() -> None:
    x, weight = normal(3, 4).requires_grad_(), normal(5, 4, seed=1).requires_grad_()
    results = []
    for function, cast in ((linear, torch.float32), (functional.linear, torch.float64)):
        (first,) = torch.autograd.grad(function(x.to(cast), weight.to(cast)).pow(3).sum(), x, create_graph=True)
        results.append(torch.autograd.grad(first.square().sum(), (x, weight)))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().amax().item())


@needs_onednn
def test_only_float32_outside_autocast_goes_to_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = module._multiply
    monkeypatch.setattr(module, "_multiply", lambda *args: calls.append(args) or real(*args))
    layer = Linear(4, 3)
    layer(normal(2, 4))
    assert len(calls) == 1
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(normal(2, 4)).dtype == torch.bfloat16
    layer.double()(normal(2, 4, dtype=torch.float64))
    assert len(calls) == 1


@pytest.mark.parametrize("make", [lambda: normal(4, 9).expand(4, 9)[:1], lambda: normal(30).unfold(0, 9, 2)[:1]])
def test_one_row_of_odd_strides(make: Callable[[], Tensor]) -> None:
    x, weight = make().requires_grad_(), normal(5, 9, seed=1).requires_grad_()
    compare(linear(x, weight), functional.linear(x.double(), weight.double()), [x, weight], normal(1, 5, seed=2))


@pytest.mark.parametrize("shape", [(4,), (2, 3, 4), (2, 0, 4)])
def test_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    layer, x = Linear(4, 3), normal(*shape)
    torch.testing.assert_close(layer(x), functional.linear(x, layer.weight, layer.bias))


def test_transforms_of_torch_func() -> None:
    layer, x = Linear(4, 3), normal(5, 4)
    gradient = torch.func.grad(lambda x: layer(x).square().sum())(x)
    x.requires_grad_()
    torch.testing.assert_close(gradient, torch.autograd.grad(layer(x).square().sum(), x)[0])
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))


def test_frozen_weights_store_no_input() -> None:
    layer, x = Linear(4, 3).requires_grad_(False), normal(5, 4).requires_grad_()
    saved = Saved([layer])
    with saved.hooks:
        layer(x).sum().backward()
    assert not saved.storages


@pytest.mark.parametrize("frozen", ["x", "layer", "before", "all"])
def test_what_needs_no_gradient_gets_none(frozen: str) -> None:
    before, layer = nn.LayerNorm(8), Linear(8, 3)
    x = normal(2, 5, 8).requires_grad_(frozen not in ("x", "all"))
    layer.requires_grad_(frozen not in ("layer", "all"))
    before.requires_grad_(frozen not in ("before", "all"))
    leaves = [t for t in (x, *before.parameters(), *layer.parameters()) if t.requires_grad]
    results = []
    for y in (layer(before(x)), linear_after(before, x, layer)):
        results.append((y, *(torch.autograd.grad(y.square().sum(), leaves) if leaves else ())))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_the_backward_makes_what_the_forward_made() -> None:
    """Whatever mode and autocast hold by then."""
    before, layer, x = nn.Sequential(nn.GELU(), nn.Dropout(0.5)), Linear(8, 3), normal(5, 8).requires_grad_()
    gradients = []
    for function in (lambda: layer(before(x)), lambda: linear_after(before, x, layer)):
        before.train()
        torch.manual_seed(0)
        y = function()
        before.eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            gradients.append(torch.autograd.grad(y.sum(), (x, layer.weight)))
        assert not before.training
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_modules_with_hooks_are_called() -> None:
    before, layer, x = nn.LayerNorm(8), Linear(8, 3), normal(5, 8).requires_grad_()
    calls = []
    layer.register_forward_hook(lambda *_: calls.append("layer"))
    linear_after(before, x, layer).sum().backward()
    before.register_forward_pre_hook(lambda *_: calls.append("before"))
    linear_after(before, x, layer).sum().backward()
    assert calls == ["layer", "before", "layer"]
    linear_after(nn.GELU(), x, nn.Sequential(layer)).sum().backward()
    assert calls[3:] == ["layer"]


def test_by_head_after() -> None:
    x, other, weight = normal(3, 5, 8), normal(3, 5, 8, seed=1), normal(3, 4, 8, seed=2)
    leaves = [t.requires_grad_() for t in (x, other, weight)]
    ours = linear_by_head_after(lambda x, none, other: x * other, (x, None, other), weight)
    truth = (x.double() * other.double()) @ weight.double().mT
    compare(ours, truth, leaves, normal(3, 5, 4, seed=3))


def test_copies() -> None:
    layer = Linear(4, 3)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(normal(2, 4)), layer(normal(2, 4)))


class Saved:
    """Counts the bytes that autograd stores, parameters aside."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self.parameters = {p.data_ptr() for layer in layers for p in layer.parameters()}
        self.storages: dict[int, int] = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.pack, lambda t: t)

    def pack(self, t: Tensor) -> Tensor:
        if t.data_ptr() not in self.parameters:
            self.storages[t.data_ptr()] = t.untyped_storage().nbytes()
        return t


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # by oneDNN, and not
@pytest.mark.parametrize("kind", ["norm", "activation and dropout"])
def test_linear_after_stores_its_input_alone(kind: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    before = nn.LayerNorm(64) if kind == "norm" else nn.Sequential(nn.GELU(), nn.Dropout(0.5))
    layer = Linear(64, 5).to(dtype)
    before.to(dtype)
    x = normal(2, 40, 64, dtype=dtype).requires_grad_()
    leaves = [x, *layer.parameters(), *before.parameters()]
    results, sizes = [], []
    for function in (lambda: layer(before(x)), lambda: linear_after(before, x, layer)):
        saved = Saved([before, layer])
        torch.manual_seed(1)
        with saved.hooks:
            y = function()
        after = torch.get_rng_state()
        results.append((y, *torch.autograd.grad(y, leaves, normal(2, 40, 5, seed=2, dtype=dtype))))
        assert torch.equal(torch.get_rng_state(), after)
        sizes.append(sum(saved.storages.values()))
    for a, b in zip(*results, strict=True):
        tolerance = 1e-6 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
    assert sizes[1] <= x.numel() * x.element_size() < sizes[0] / 1.9
