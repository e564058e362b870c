"""Products with weight matrices, by the faster of torch's two libraries.

On x86 torch computes float32 products with MKL, whose code for processors of AMD leaves half of their speed unused;
oneDNN, which torch brings along and takes for 16-bit types, does not. `linear` takes it for float32 too, forward and
backward. The numbers are the same to rounding.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

# What torch's own compiler calls; it has no public name.
_HAS_ONEDNN = (
    platform.machine() in ("x86_64", "AMD64")
    and torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, as `torch.nn.functional.linear`.

    By oneDNN for float32 on an x86 processor; not under autocast, which casts, nor in code that torch compiles, where
    its compiler chooses.
    """
    if not _onednn_serves(x, weight):
        return functional.linear(x, weight, bias)
    y: Tensor = _Product.apply(x.flatten(0, -2), weight, bias)
    return y.unflatten(0, x.shape[:-1])


def linear_by_head(x: Tensor, weight: Tensor) -> Tensor:
    """``x_h W_h^T`` of each head: ``[heads, rows, in]`` and ``[heads, out, in]`` to ``[heads, rows, out]``."""
    if not _onednn_serves(x, weight):
        return x @ weight.mT
    y: Tensor = _Product.apply(x, weight, None)
    return y


def linear_after(before: nn.Module, x: Tensor, layer: nn.Module) -> Tensor:
    """``layer(before(x))``, storing x for the backward and not ``before(x)``, which is made again.

    For a normalisation or an activation: quickly made, and as large as what it is made of.

    Args:
        layer: a `torch.nn.Linear`.
    """
    assert isinstance(layer, nn.Linear)
    names, parameters = zip(*before.named_parameters(), strict=True) if [*before.parameters()] else ((), ())

    def made(x: Tensor, *parameters: Tensor) -> Tensor:
        y: Tensor = functional_call(before, dict(zip(names, parameters, strict=True)), (x,))
        return y

    return _after(linear, made, (x, *parameters), layer.weight, layer.bias)


def linear_by_head_after(before: Callable[..., Tensor], inputs: Sequence[Tensor | None], weight: Tensor) -> Tensor:
    """``linear_by_head(before(*inputs), weight)``, storing the inputs for the backward and not what is made of them."""
    return _after(lambda x, weight, _: linear_by_head(x, weight), before, inputs, weight, None)


def _after(
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    before: Callable[..., Tensor],
    inputs: Sequence[Tensor | None],
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    if torch.compiler.is_compiling() or not torch.is_grad_enabled():  # the compiler itself decides what is made again
        return product(before(*inputs), weight, bias)
    y: Tensor
    if _onednn_serves(inputs[0], weight):
        y = _ProductAfter.apply(before, weight, bias, *inputs)
    else:  # ends before it would repeat the product
        y = checkpoint(lambda *inputs: product(before(*inputs), weight, bias), *inputs, use_reentrant=False)
    return y


def _onednn_serves(x: Tensor | None, weight: Tensor) -> bool:
    return (
        _HAS_ONEDNN
        and x is not None
        and x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
    )


class Linear(nn.Linear):
    """`torch.nn.Linear`, computed by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class _Product(torch.autograd.Function):
    """``left right^T + b`` of matrices, or without b of as many pairs of matrices."""

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(left, right)
        return _multiply(left, right, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        need_left, need_right, need_bias = ctx.needs_input_grad
        return (
            _Product.apply(grad, right.mT, None) if need_left else None,
            _Product.apply(grad.mT, left.mT, None) if need_right else None,
            grad.sum(0) if need_bias else None,
        )


class _ProductAfter(torch.autograd.Function):
    """The product with ``before(*inputs)``, which is not stored; see `linear_after`."""

    @staticmethod
    def forward(
        ctx: Any, before: Callable[..., Tensor], weight: Tensor, bias: Tensor | None, *inputs: Tensor | None
    ) -> Tensor:
        ctx.before, ctx.random_state = before, torch.get_rng_state()
        ctx.save_for_backward(weight, *inputs)
        left = before(*inputs)
        return _multiply(_rows(left, weight), weight, bias).view(*left.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors
        _, need_weight, need_bias, *needs = ctx.needs_input_grad
        inputs = [t if t is None else t.detach().requires_grad_(n) for t, n in zip(inputs, needs, strict=True)]
        with torch.enable_grad(), torch.random.fork_rng(devices=[]):
            torch.set_rng_state(ctx.random_state)
            made = ctx.before(*inputs)
        shape, edge = made.shape, torch.autograd.graph.get_gradient_edge(made) if made.requires_grad else None
        left, grad = _rows(made.detach(), weight), _rows(grad, weight)
        by_weight = _multiply(grad.mT, left.mT, None) if need_weight else None
        del made, left  # the graph does not need it
        gradients: list[Tensor | None] = [None] * len(inputs)
        if edge is not None:
            asked = [i for i, need in enumerate(needs) if need]
            by_left = _multiply(grad, weight.mT, None).view(shape)
            found = torch.autograd.grad(edge, [inputs[i] for i in asked], by_left)
            for i, gradient in zip(asked, found, strict=True):
                gradients[i] = gradient
        return None, by_weight, grad.sum(0) if need_bias else None, *gradients


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
    if not (right.is_contiguous() or right.mT.is_contiguous()):
        right = right.contiguous()  # for other strides it has no fast code
    product: Tensor = torch.ops.mkldnn._linear_pointwise(left, right, bias, "none", [], "")
    return product
