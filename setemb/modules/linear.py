"""Products with weight matrices, by the faster of torch's two libraries.

On x86 torch computes float32 products with MKL, whose code for processors of AMD leaves half of their speed unused;
oneDNN, which torch brings along and takes for 16-bit types, does not. `linear` takes it for float32 too, forward and
backward. The numbers are the same to rounding.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# What torch's own compiler calls; it has no public name.
HAS_ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, as `torch.nn.functional.linear`.

    By oneDNN for float32 on an x86 processor; not under autocast, which casts, nor in code that torch compiles, where
    its compiler chooses, nor inside a transform of torch.func.
    """
    if x.dim() < 2 or not _onednn_serves(x, weight):
        return functional.linear(x, weight, bias)
    y: Tensor = _Product.apply(x.flatten(0, -2), weight, bias)
    return y.unflatten(0, x.shape[:-1])


def product(left: Tensor, right: Tensor, bias: Tensor | None = None) -> Tensor:
    """``left right^T + b`` of matrices of one dtype, as `linear` but without a gradient."""
    with torch.autocast(left.device.type, enabled=False):
        if not _onednn_serves(left, right):
            return functional.linear(left, right, bias)
        return _multiply(left, right, bias)


def linear_by_head(x: Tensor, weight: Tensor) -> Tensor:
    """``x_h W_h^T`` of each head: ``[heads, rows, in]`` and ``[heads, out, in]`` to ``[heads, rows, out]``."""
    if not _onednn_serves(x, weight):
        return x @ weight.mT
    y: Tensor = _Product.apply(x, weight, None)
    return y


class Linear(nn.Linear):
    """`torch.nn.Linear`, computed by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def linear_after(before: nn.Module, x: Tensor, layer: nn.Module) -> Tensor:
    """``layer(before(x))``, storing x for the backward and not ``before(x)``, which is made again.

    For a normalisation or an activation: quickly made, and as large as what it is made of. ``before`` must not keep
    statistics; where it or ``layer`` has hooks, or ``layer`` is no plain `torch.nn.Linear`, both are simply called.
    """
    if not is_plain(layer) or _hooked(before) or _nothing_is_remade():
        y: Tensor = layer(before(x))
        return y
    return product_after(before, x, cast(nn.Linear, layer).weight, cast(nn.Linear, layer).bias)


def is_plain(layer: nn.Module) -> bool:
    """Whether all that a call does is a product with the layer's weight."""
    return type(layer) in (nn.Linear, Linear) and not _hooked(layer)


def product_after(before: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear(before(x), weight, bias)``, stored as by `linear_after`."""
    if _nothing_is_remade():
        return linear(before(x), weight, bias)
    names = [name for name, _ in before.named_parameters()]
    training = [module.training for module in before.modules()]

    def made(x: Tensor, *parameters: Tensor) -> Tensor:
        with _training_as(before, training):
            y: Tensor = functional_call(before, dict(zip(names, parameters, strict=True)), (x,))
        return y

    random = any(isinstance(module, nn.modules.dropout._DropoutNd) for module in before.modules())
    inputs = (x, *before.parameters())
    if _onednn_serves(x, weight):
        y: Tensor = _ProductAfter.apply(made, random, weight, bias, *inputs)
        return y.unflatten(0, x.shape[:-1])
    return _remade(lambda *inputs: functional.linear(made(*inputs), weight, bias), inputs, random)


def linear_by_head_after(before: Callable[..., Tensor], inputs: Sequence[Tensor | None], weight: Tensor) -> Tensor:
    """``linear_by_head(before(*inputs), weight)``, storing the inputs for the backward and not what is made of them.

    What ``before`` makes depends on the inputs alone; it holds no other tensor.
    """
    if _nothing_is_remade():
        return linear_by_head(before(*inputs), weight)
    if _onednn_serves(inputs[0], weight):
        y: Tensor = _ProductAfter.apply(before, False, weight, None, *inputs)
        return y
    return _remade(lambda *inputs: linear_by_head(before(*inputs), weight), inputs, False)


def linear_after_attention(
    before: Callable[..., Tensor], inputs: Sequence[Tensor | None], weight: Tensor, bias: Tensor | None
) -> Tensor:
    """``linear(before(*inputs), weight, bias)``, stored and made again as by `linear_by_head_after`."""
    if _nothing_is_remade():
        return linear(before(*inputs), weight, bias)
    if not _onednn_serves(inputs[0], weight):
        return _remade(lambda *i: functional.linear(before(*i), weight, bias), inputs, False)
    y: Tensor = _ProductAfter.apply(before, False, weight, bias, *inputs)
    (keys, slots) = (cast(Tensor, inputs[1]), cast(Tensor, inputs[0]).shape[2])
    return y.unflatten(0, (len(keys), slots))


def _nothing_is_remade() -> bool:
    """The compiler itself decides what is made again."""
    return torch.compiler.is_compiling() or not torch.is_grad_enabled() or torch._C._are_functorch_transforms_active()


def _remade(function: Callable[..., Tensor], inputs: Sequence[Tensor | None], random: bool) -> Tensor:
    """``function(*inputs)``; the backward makes it again, and ends before it would repeat the last product."""
    y: Tensor = checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=random)
    return y


def _hooked(module: nn.Module) -> bool:
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks for m in module.modules()
    )


@contextmanager
def _training_as(module: nn.Module, training: Sequence[bool]) -> Iterator[None]:
    """In the backward a module may have another mode than it had in the forward."""
    modules = list(module.modules())
    now = [m.training for m in modules]
    try:
        for m, mode in zip(modules, training, strict=True):
            m.training = mode
        yield
    finally:
        for m, mode in zip(modules, now, strict=True):
            m.training = mode


def _onednn_serves(x: Tensor | None, weight: Tensor) -> bool:
    return (
        HAS_ONEDNN
        and x is not None
        and x.device.type == weight.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and all(type(t) in (Tensor, nn.Parameter) for t in (x, weight))
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and bool(torch.backends.mkldnn.enabled)
    )


class _Product(torch.autograd.Function):
    """``left right^T + b`` of matrices, or without b of as many pairs of matrices."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        need_left, need_right, _ = ctx.needs_input_grad
        ctx.save_for_backward(left if need_right else None, right if need_left else None)
        return _multiply(left, right, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        return (
            None if right is None else _Product.apply(grad, right.mT, None),
            None if left is None else _Product.apply(grad.mT, left.mT, None),
            grad.sum(0) if ctx.needs_input_grad[2] else None,
        )


class _ProductAfter(torch.autograd.Function):
    """The product with ``before(*inputs)``, which is not stored; see `linear_after`."""

    @staticmethod
    def forward(
        ctx: Any,
        before: Callable[..., Tensor],
        random: bool,
        weight: Tensor,
        bias: Tensor | None,
        *inputs: Tensor | None,
    ) -> Tensor:
        ctx.before, ctx.random_state = before, torch.get_rng_state() if random else None
        ctx.save_for_backward(weight, *inputs)
        return _multiply(_rows(before(*inputs), weight), weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        _, _, need_weight, need_bias, *needs = ctx.needs_input_grad
        inputs = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(inputs, needs, strict=True)]
        with torch.enable_grad(), torch.autocast("cpu", enabled=False), _random_state(ctx.random_state):
            made = ctx.before(*inputs)
        shape, edge = made.shape, torch.autograd.graph.get_gradient_edge(made) if made.requires_grad else None
        left = _rows(made.detach(), weight)
        by_weight = _multiply(grad.mT, left.mT, None) if need_weight else None
        del made, left  # the graph does not need it
        gradients: list[Tensor | None] = [None] * len(inputs)
        if edge is not None:
            asked = [i for i, need in enumerate(needs) if need]
            by_left = _multiply(grad, weight.mT, None).view(shape)
            found = torch.autograd.grad(edge, [inputs[i] for i in asked], by_left, allow_unused=True)
            for i, gradient in zip(asked, found, strict=True):
                gradients[i] = gradient
        return None, None, by_weight, grad.sum(0) if need_bias else None, *gradients


@contextmanager
def _random_state(state: Tensor | None) -> Iterator[None]:
    if state is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.set_rng_state(state)
        yield


def _rows(x: Tensor, weight: Tensor) -> Tensor:
    """``[..., in]`` as one matrix for a weight that is one."""
    return x if weight.dim() == 3 else x.flatten(0, -2)


def _multiply(left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
    if left.dim() == 3:
        out = left.new_empty(len(left), left.shape[1], right.shape[1])
        for result, one, other in zip(out, left, right, strict=True):
            result.copy_(_multiply(one, other, None))
        return out
    if 0 in (*left.shape, *right.shape):  # which oneDNN refuses
        return functional.linear(left, right, bias)
    if right.stride() not in ((right.shape[1], 1), (1, right.shape[0])):  # for others it has no fast code
        right = right.clone(memory_format=torch.contiguous_format)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return product
