"""Calls of our ops that pass by the dispatcher where it has nothing to do.

`torch.library` costs the host tens of microseconds for a forward and a backward pass, as long as a GPU takes for a
small call. What is asked before each call costs one or two.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType, get_interpreter_stack, is_legacy_batchedtensor
from torch.autograd import forward_ad
from torch.nn import Parameter

ops = SimpleNamespace()
"""To be called like ``torch.ops.setemb``, with all arguments, in order."""

_PLAIN = frozenset((type(None), bool, float, str))
"""What an implementation takes as it is. Not int, which the dispatcher turns into a float where a schema says so."""

_IMPLEMENTATIONS: dict[str, Callable[..., Any]] = {}

_CASTS: dict[str, Callable[..., list[Any]]] = {}

_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCUDA)

_RECORDED: dict[str, Callable[..., Any]] = {}
"""The same where a gradient is wanted; of an op that has none it is the dispatcher's, which says so."""

_TRANSFORMED: dict[str, Callable[..., Any]] = {}
"""The op where `torch.func` differentiates it, which the derivative that `torch.library` makes refuses."""

_DEVICES = ("cpu", "cuda")
"""That have autocast rules."""


def implementation(name: str, function: Callable[..., Any]) -> None:
    """Let ``function`` serve calls of ``torch.ops.setemb.<name>`` on a GPU."""
    _IMPLEMENTATIONS[name] = function
    _RECORDED[name] = getattr(torch.ops.setemb, name)
    setattr(ops, name, functools.partial(_call, name))


def autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give an op its derivative, by the functions that `torch.library.register_autograd` takes."""
    function = _IMPLEMENTATIONS[name]

    def forward(ctx: Any, *args: Any) -> Any:
        output = function(*args)
        setup_context(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    # A profiler shows the name, as that of the op.
    _RECORDED[name] = type(f"setemb::{name}", (torch.autograd.Function,), members).apply  # type: ignore[attr-defined]


def transformed(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give an op its derivative under `torch.func`, by the same functions."""

    def forward(*args: Any) -> Any:
        return getattr(torch.ops.setemb, name)(*args)

    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise no_forward_mode(name)

    members = {
        "forward": staticmethod(forward),
        "setup_context": staticmethod(setup_context),
        "backward": staticmethod(backward),
        "jvp": staticmethod(jvp),
        "generate_vmap_rule": True,
    }
    _TRANSFORMED[name] = type(f"setemb::{name}", (torch.autograd.Function,), members).apply  # type: ignore[attr-defined]


def no_forward_mode(name: str) -> NotImplementedError:
    """What is raised where a tangent would be lost."""
    return NotImplementedError(
        f"setemb::{name} has no forward-mode derivative (jvp): use backward, torch.func.grad or torch.func.vjp"
    )


def autocast(name: str, cast: Callable[..., list[Any]]) -> None:
    """Give an op what `cast(args, dtype)` makes of its arguments under autocast."""
    _CASTS[name] = cast


def _call(name: str, *args: Any) -> Any:
    if watched() or _needs_dispatcher(args):
        return _by_dispatcher(name, args)
    if torch.is_autocast_enabled("cuda") and name in _CASTS:
        args = tuple(_CASTS[name](args, torch.get_autocast_dtype("cuda")))
        with torch._C._ExcludeDispatchKeyGuard(_AUTOCAST):
            return _serve(name, args)
    return _serve(name, args)


def _by_dispatcher(name: str, args: tuple[Any, ...]) -> Any:
    if name not in _TRANSFORMED or not _transform_differentiates():
        return getattr(torch.ops.setemb, name)(*args)
    device = args[0].device.type
    if name not in _CASTS or device not in _DEVICES or not torch.is_autocast_enabled(device):
        return _TRANSFORMED[name](*args)
    args = tuple(_CASTS[name](args, torch.get_autocast_dtype(device)))  # before, so that the cast has its derivative
    with torch.autocast(device, enabled=False):
        return _TRANSFORMED[name](*args)


def _serve(name: str, args: tuple[Any, ...]) -> Any:
    recording = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    if recording and any(v.requires_grad for v in args if isinstance(v, Tensor)):
        return _RECORDED[name](*args)
    return _IMPLEMENTATIONS[name](*args)


def watched() -> bool:
    """Whether something beside autograd is to see what is called: a compiler, a tracer, a mode, a transform."""
    return (
        torch.compiler.is_compiling()  # first: of what follows dynamo then sees nothing
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._is_tracing()
    )


def _transform_differentiates() -> bool:
    if torch.compiler.is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    return any(i.key() in (TransformType.Grad, TransformType.Jvp) for i in get_interpreter_stack() or ())


def _needs_dispatcher(args: tuple[Any, ...]) -> bool:
    """Whether it would do more with them than find the function that we know."""
    if not _on_gpu(args[0]) or forward_ad._current_level >= 0:
        return True
    for v in args:
        kind = type(v)
        if kind is Tensor or kind is Parameter:  # not a subclass, whose __torch_dispatch__ is asked
            if v.is_neg() or v._is_zerotensor() or is_legacy_batchedtensor(v):  # memory does not hold the values
                return True
        elif kind not in _PLAIN:
            return True
    return False


def _on_gpu(x: Tensor) -> bool:
    """Elsewhere compiled kernels serve, which only the dispatcher knows."""
    return x.is_cuda
