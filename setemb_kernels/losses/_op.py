"""What every loss needs of torch.library, written once: schema, implementation on any device, fake, autograd, autocast.

A loss op returns a scalar and what its backward wants to know of each row and each column (``O(N + M)``). It is made of
tiles (see `tiles`), so one implementation serves all devices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from setemb_kernels._direct import ops
from setemb_kernels._library import define, forbid_double_backward, implement, register_autocast, register_autograd
from setemb_kernels.losses.tiles import TENSORS, Gradients, Sets

_SETS = (
    "Tensor x, Tensor y, Tensor alpha, Tensor match_bias, Tensor? x_mask, Tensor? y_mask, Tensor? x_group,"
    " Tensor? y_group"
)
Forward = Callable[..., tuple[Tensor, Tensor, Tensor]]
Backward = Callable[..., Sequence[Tensor]]


def define_loss(
    name: str,
    scalars: Sequence[str],
    options: str,
    forward: Forward,
    backward: Backward,
    fake_state: Callable[..., tuple[Tensor, Tensor]],
) -> Any:
    """Define ``setemb::name`` and its backward, and return what calls the op.

    Args:
        name: of the op.
        scalars: names of its 0-dim tensor arguments, which may require gradients.
        options: the rest of its schema, "bool symmetric"; before it comes what says which similarity of sets it is.
        forward: ``(sets, *scalars, *options) -> (loss, row state, column state)``.
        backward: ``(sets, gradients, grad, row state, column state, *scalars, *options)`` -> gradients of the scalars;
            adds to ``gradients``.
        fake_state: ``(sets, *options) ->`` row and column state, for tracing.
    """
    own = TENSORS + len(scalars)  # where options begin
    rest = "".join(f", Tensor {scalar}" for scalar in scalars) + ", str kind, bool mean"
    rest += f", {options}" if options else ""
    name_forward, name_backward = f"setemb::{name}", f"setemb::{name}_backward"
    define(name_forward, f"({_SETS}{rest}) -> (Tensor, Tensor, Tensor)")
    results = ", ".join(["Tensor"] * (4 + len(scalars)))
    needs = "bool need_x, bool need_y, bool need_alpha, bool need_bias"
    define(name_backward, f"(Tensor grad, Tensor rows, Tensor columns, {_SETS}{rest}, {needs}) -> ({results})")

    def sets_of(args: Sequence[Any]) -> Sets:
        return Sets(*args[:TENSORS], *args[own : own + 2])

    def others(args: Sequence[Any]) -> Sequence[Any]:
        """Scalars and options."""
        return *args[TENSORS:own], *args[own + 2 :]

    @implement(name_forward)
    def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        return forward(sets_of(args), *others(args))

    @implement(name_backward)
    def _(grad: Tensor, rows: Tensor, columns: Tensor, *args: Any) -> tuple[Tensor, ...]:
        sets, rest, needs = sets_of(args), others(args[:-4]), args[-4:]
        gradients = Gradients(sets, *needs)
        by_scalars = backward(sets, gradients, grad.to(sets.dtype), rows, columns, *rest)
        return *gradients.results(), *(g.to(s.device, s.dtype) for g, s in zip(by_scalars, rest, strict=False))

    @torch.library.register_fake(name_forward)
    def _(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        sets = sets_of(args)
        return sets.x.new_empty((), dtype=sets.dtype), *fake_state(sets, *args[own + 2 :])

    @torch.library.register_fake(name_backward)
    def _(grad: Tensor, rows: Tensor, columns: Tensor, *args: Any) -> tuple[Tensor, ...]:
        sets, (need_x, need_y, need_alpha, need_bias) = sets_of(args), args[-4:]
        return (
            sets.x.new_empty(sets.x.shape if need_x else 0),
            sets.y.new_empty(sets.y.shape if need_y else 0),
            sets.alpha.new_empty(() if need_alpha else 0),
            sets.bias.new_empty(() if need_bias else 0),
            *(s.new_empty(()) for s in args[TENSORS:own]),
        )

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.save_for_backward(*output[1:], *inputs[:own])
        ctx.options = inputs[own:]
        ctx.set_materialize_grads(False)  # those of the states are nothing, and need not be filled with zeros

    def autograd(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * (own + len(ctx.options))
        needs = ctx.needs_input_grad
        found = getattr(ops, f"{name}_backward")(grad, *ctx.saved_tensors, *ctx.options, *needs[:4])
        first = [g if need else None for g, need in zip(found[:4], needs, strict=False)]
        last = [g if need else None for g, need in zip(found[4:], needs[TENSORS:], strict=False)]
        return *first, *(None,) * (TENSORS - 4), *last, *(None for _ in ctx.options)

    register_autograd(name_forward, autograd, setup_context=setup_context)
    forbid_double_backward(name_backward)
    register_autocast(name_forward, cast=2)
    return getattr(ops, name)
