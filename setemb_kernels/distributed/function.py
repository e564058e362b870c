"""The losses as functions that autograd knows. Forward and backward both exchange, so all ranks must run both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from setemb_kernels.distributed.batch import Batch
from setemb_kernels.distributed.losses import Loss
from setemb_kernels.distributed.ring import Ring
from setemb_kernels.losses.tiles import TENSORS, Gradients, Sets


def compute(
    name: str,
    loss: Loss,
    arguments: Sequence[Any],
    scalars: Sequence[Tensor],
    group: ProcessGroup | None,
    timeout: float,
) -> Tensor:
    """The loss of the batch of all ranks; ``arguments`` are those of `Sets`, checked."""
    x, y, *others = arguments[:TENSORS]
    similarity = tuple(arguments[TENSORS:])
    if torch.is_autocast_enabled(x.device.type):  # as the ops of the losses of one process
        dtype = torch.get_autocast_dtype(x.device.type)
        x, y = (v if v.dtype == torch.float64 else v.to(dtype) for v in (x, y))
    with torch.autocast(x.device.type, enabled=False):
        # Wants a gradient on every rank, even one whose own inputs do not, so that backward can be called on all.
        anchor = torch.zeros((), requires_grad=True)
        result: Tensor = _Function.apply(name, loss, similarity, group, timeout, anchor, x, y, *others, *scalars)
    return result


_BEFORE = 6
"""What `_Function.apply` takes before the sets."""


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        name: str,
        loss: Loss,
        similarity: tuple[str, bool],
        group: ProcessGroup | None,
        timeout: float,
        *tensors: Any,
    ) -> Tensor:
        kind, mean = similarity
        sets, scalars = Sets(*tensors[1 : 1 + TENSORS])._replace(kind=kind, mean=mean), tensors[1 + TENSORS :]
        ctx.needs = ctx.needs_input_grad[_BEFORE : _BEFORE + TENSORS]
        batch = Batch(Ring(name, group, timeout, sets.x.device), sets, ctx.needs[1], repr(loss))
        result, ctx.state = loss.forward(batch, *scalars)
        ctx.loss, ctx.batch = loss, batch
        ctx.save_for_backward(*batch.sets[:TENSORS], *scalars)
        batch.sets = batch.sets._replace(x=sets.x[:0], y=sets.y[:0])  # saved above, where hooks see them
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved, batch = ctx.saved_tensors, ctx.batch
        sets, scalars = Sets(*saved[:TENSORS])._replace(kind=batch.sets.kind, mean=batch.sets.mean), saved[TENSORS:]
        batch.sets = sets
        need_x, need_y, need_alpha, need_bias = ctx.needs[:4]
        with torch.no_grad(), torch.autocast(sets.x.device.type, enabled=False):
            gradients = Gradients(sets, need_x, False, need_alpha, need_bias)
            gradients.needs = need_x, batch.need_y, need_alpha, need_bias  # those of y of other ranks
            by_scalars = ctx.loss.backward(batch, gradients, grad.to(sets.dtype), ctx.state, *scalars)
            gradients.needs = need_x, need_y and batch.need_y, need_alpha, need_bias
            found = gradients.results()
        batch.sets = sets._replace(x=sets.x[:0], y=sets.y[:0])
        first = [g if need else None for g, need in zip(found, ctx.needs, strict=False)]
        last = [g.to(s.device, s.dtype) for g, s in zip(by_scalars, scalars, strict=True)]
        results = *(None,) * _BEFORE, *first, *(None,) * (TENSORS - 4), *last
        if torch.is_grad_enabled():  # with create_graph
            anchor = torch.zeros((), requires_grad=True)
            return tuple(g if g is None else _Final.apply(batch.ring.name, anchor, g) for g in results)
        return results


class _Final(torch.autograd.Function):
    """A gradient that raises where it is differentiated, instead of passing silently for a constant."""

    @staticmethod
    def forward(ctx: Any, name: str, anchor: Tensor, gradient: Tensor) -> Tensor:
        ctx.name = name
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(f"{ctx.name} has no second derivative: call backward without create_graph=True")
