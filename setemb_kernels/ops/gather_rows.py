"""``setemb::gather_rows``: rows of a matrix by their places, and their gradients by the places they came from.

On the CPU the gradient of ``index_select`` sorts indices and adds up, though a mask has each row but once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from setemb_kernels._library import define

NAME = "setemb::gather_rows"

define(NAME, "(Tensor rows, Tensor places, Tensor back) -> Tensor")


def pays(v: Tensor) -> bool:
    """Whether `masked_rows` is the way: on the CPU, where its size waits for nothing, and not while it is traced, when
    shapes cannot depend on values."""
    if v.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._is_tracing() or type(v) is not Tensor:
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:  # vmap; tangents
        return False
    return torch._C._len_torch_dispatch_stack() == 0  # make_fx, fake tensors


def masked_rows(rows: Tensor, keep: Tensor, zero: Tensor | None = None) -> Tensor:
    """The rows of ``[R, D]`` where `keep`, bool ``[R]``, is true; of them those where `zero` is true as zeros that pass
    no gradient."""
    places = keep.nonzero().squeeze(1)
    back = keep.cumsum(0) - 1
    if zero is None:
        return gather_rows(rows, places, back.masked_fill_(~keep, -1))
    return gather_rows(rows, torch.where(zero[places], -1, places), back.masked_fill_(~keep | zero, -1))


def gather_rows(rows: Tensor, places: Tensor, back: Tensor) -> Tensor:
    """Row ``places[i]`` of ``[R, D]`` for each i, zeros for -1. ``back[places[i]] = i``, and -1 for what is not there:
    the gradient is gathered by it."""
    result: Tensor = torch.ops.setemb.gather_rows(rows, places, back)
    return result


def in_torch(rows: Tensor, places: Tensor, back: Tensor) -> Tensor:
    """What serves where csrc does not."""
    if rows.shape[0] == 0:
        return rows.new_zeros(places.shape[0], rows.shape[1])
    return rows.index_select(0, places.clamp(min=0)).masked_fill_((places < 0)[:, None], 0)


torch.library.impl(NAME, "CompositeExplicitAutograd", in_torch)


@torch.library.register_fake(NAME)
def _(rows: Tensor, places: Tensor, back: Tensor) -> Tensor:
    return rows.new_empty(places.shape[0], rows.shape[1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    places, back = ctx.saved_tensors
    return gather_rows(grad, back, places), None, None


torch.library.register_autograd(NAME, _autograd, setup_context=_setup_context)
