"""What every op needs of `torch.library`, written once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._library.autograd import Info, make_autograd_impl
from torch.autograd import forward_ad

from setemb_kernels import _direct

_LIBRARY = torch.library.Library("setemb", "FRAGMENT")
_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}
_F = TypeVar("_F", bound=Callable[..., Any])


def define(qualified_name: str, schema: str) -> None:
    """Declare an op ``setemb::name``."""
    torch.library.define(qualified_name, schema, lib=_LIBRARY, tags=(torch.Tag.pt2_compliant_tag,))


def implement(qualified_name: str) -> Callable[[_F], _F]:
    """Let a function serve an op where no compiled kernel is registered: called by the dispatcher, or by `_direct`."""

    def register(function: _F) -> _F:
        torch.library.impl(qualified_name, "CompositeExplicitAutograd", function, lib=_LIBRARY)
        _direct.implementation(qualified_name.removeprefix("setemb::"), function)
        return function

    return register


def register_autograd(qualified_name: str, backward: Callable[..., Any], *, setup_context: Callable[..., None]) -> None:
    """What `torch.library.register_autograd` does, for `_direct` and `torch.func` too, and with an error for tangents
    of forward mode, which that drops."""
    name = qualified_name.removeprefix("setemb::")
    _implement_autograd(name, backward, setup_context)
    _direct.autograd(name, backward, setup_context)
    _direct.transformed(name, backward, setup_context)


def forbid_double_backward(qualified_name: str) -> None:
    """Make the backward op raise where its own result is differentiated."""
    forbid_gradient(qualified_name, "has no second derivative: call backward without create_graph=True")


def forbid_gradient(qualified_name: str, why: str) -> None:
    """Make an op raise where its result is differentiated, instead of passing silently for a constant."""

    def raise_error(ctx: Any, *grads: Any) -> Any:
        raise NotImplementedError(f"{qualified_name} {why}")

    name = qualified_name.removeprefix("setemb::")
    _implement_autograd(name, raise_error, None)
    _direct.transformed(name, raise_error, lambda ctx, inputs, output: None)


def _implement_autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None] | None) -> None:
    derivative = make_autograd_impl(getattr(torch.ops.setemb, name).default, Info(backward, setup_context))

    def kernel(keyset: Any, *args: Any) -> Any:
        if forward_ad._current_level >= 0 and any(_has_tangent(v) for v in args):
            raise _direct.no_forward_mode(name)
        return derivative(keyset, *args)

    _LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def _has_tangent(value: Any) -> bool:
    return isinstance(value, Tensor) and forward_ad.unpack_dual(value).tangent is not None


def register_autocast(qualified_name: str, *, cast: int) -> None:
    """Under autocast, cast the first `cast` arguments to the dtype autocast has at the moment of the call.

    (`torch.library.register_autocast` fixes the dtype when the op is registered.)
    """
    namespace, name = qualified_name.split("::")
    op = getattr(getattr(torch.ops, namespace), name)

    def as_cast(args: tuple[Any, ...], dtype: torch.dtype) -> list[Any]:
        return [*(_cast(a, dtype) for a in args[:cast]), *args[cast:]]

    _direct.autocast(name, as_cast)
    for device, key in _AUTOCAST_KEYS.items():

        def autocast(*args: Any, _device: str = device, _key: str = key) -> Any:
            cast_args = as_cast(args, torch.get_autocast_dtype(_device))
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, _key))):
                return op(*cast_args)

        _LIBRARY.impl(name, autocast, key)


def _cast(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if value is None or not value.is_floating_point() or value.dtype == torch.float64:
        return value
    return value.to(dtype)
