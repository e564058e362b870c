"""Checks of what callers pass: one error each, naming the argument, what came and what was expected."""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from setemb_kernels import _direct

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SETS = ("sets", "vectors", "features")
SLOTS = ("batch", "heads", "slots", "features")
TOKENS = ("batch", "heads", "tokens", "features")


def floating(name: str, value: Tensor, axes: tuple[str, ...], also: tuple[torch.dtype, ...] = ()) -> None:
    """`value` is a floating tensor, or of a dtype of `also`, with these axes."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.is_nested:
        also_takes = ", or call set_similarity, which takes nested tensors" if axes == SETS else ""
        raise TypeError(
            f"{name}: expected a padded tensor [{', '.join(axes)}], got a nested one: pad it, as"
            f" torch.nested.to_padded_tensor does, and pass a mask{also_takes}"
        )
    if value.dim() != len(axes):
        raise ValueError(f"{name}: expected {len(axes)} dimensions [{', '.join(axes)}], got shape {list(value.shape)}")
    if value.dtype not in FLOATING and value.dtype not in also:
        *most, last = map(_dtype, (*FLOATING, *also))
        raise TypeError(f"{name}: expected {', '.join(most)} or {last}, got {_dtype(value.dtype)}")


def like(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    """Both have one dtype (under autocast they will have, float64 aside) and one device."""
    if value.dtype != other.dtype:
        cast = torch.float64 not in (value.dtype, other.dtype) and torch.is_autocast_enabled(other.device.type)
        if not cast:
            raise TypeError(f"{name}: expected {_dtype(other.dtype)} as in {other_name}, got {_dtype(value.dtype)}")
    if value.device != other.device:
        raise ValueError(f"{name}: expected device {other.device} as of {other_name}, got {value.device}")


def same_size(name: str, value: Tensor, other_name: str, other: Tensor, axes: dict[int, str]) -> None:
    """Both have one size along each of these axes (number -> what lies along it)."""
    for axis, what in axes.items():
        if value.shape[axis] != other.shape[axis]:
            raise ValueError(
                f"{name}: expected {other.shape[axis]} {what} as in {other_name}, got {value.shape[axis]}"
                f" (shape {list(value.shape)})"
            )


def mask(name: str, value: Tensor | None, expected: tuple[int, ...], of_name: str, of: Tensor) -> None:
    """`value` is None or boolean, of the `expected` shape, on the device of `of`."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a boolean torch.Tensor or None, got {type(value).__name__}")
    if value.dtype != torch.bool:
        raise TypeError(f"{name}: expected bool (True = valid), got {_dtype(value.dtype)}")
    if value.shape != expected:
        raise ValueError(f"{name}: expected shape {list(expected)} as of {of_name}, got {list(value.shape)}")
    if value.device != of.device:
        raise ValueError(f"{name}: expected device {of.device} as of {of_name}, got {value.device}")


def similar_sets(x: Tensor, y: Tensor, x_mask: Tensor | None, y_mask: Tensor | None) -> None:
    """Two batches of sets that can be compared, with their masks."""
    floating("x", x, SETS)
    floating("y", y, SETS)
    same_size("y", y, "x", x, {2: "features"})
    like("y", y, "x", x)
    if x_mask is not None:
        mask("x_mask", x_mask, x.shape[:2], "x", x)
    if y_mask is not None:
        mask("y_mask", y_mask, y.shape[:2], "y", y)


def group(name: str, value: Tensor | None, sets_name: str, sets: Tensor, *, on_its_device: bool = True) -> None:
    """`value` is None or one integer a set, on the device of the sets unless told."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor of integers or None, got {type(value).__name__}")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TypeError(f"{name}: expected integers, got {_dtype(value.dtype)}")
    if value.shape != sets.shape[:1]:
        raise ValueError(f"{name}: expected shape {list(sets.shape[:1])} as of {sets_name}, got {list(value.shape)}")
    if on_its_device and value.device != sets.device:
        raise ValueError(f"{name}: expected device {sets.device} as of {sets_name}, got {value.device}")


def scalar(name: str, value: Tensor, device: torch.device) -> Tensor:
    """A floating tensor of 0 dimensions, on the CPU or on `device`."""
    if value.dim() != 0:
        raise ValueError(f"{name}: expected a number or a tensor of 0 dimensions, got shape {list(value.shape)}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected a floating dtype, got {_dtype(value.dtype)}")
    if value.device.type != "cpu" and value.device != device:
        raise ValueError(f"{name}: expected device cpu or {device}, got {value.device}")
    return value


def sharpness(name: str, value: float | Tensor, device: torch.device) -> Tensor:
    """`value`, a finite number > 0, as a 0-dim tensor. The value of a tensor is checked where it is read, by the
    kernels."""
    if isinstance(value, Tensor):
        return scalar(name, value, device)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number or a torch.Tensor, got {type(value).__name__}")
    positive_and_finite(name, value)
    return number(value)


def real(name: str, value: float | Tensor, device: torch.device) -> Tensor:
    """`value`, a finite number, as a 0-dim tensor. The value of a tensor is not checked."""
    if isinstance(value, Tensor):
        return scalar(name, value, device)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number or a torch.Tensor, got {type(value).__name__}")
    if not -math.inf < value < math.inf:
        raise ValueError(f"{name}: expected a finite number, got {value}")
    return number(value)


def number(value: float) -> Tensor:
    """`value` as a 0-dim tensor, not to be written to: it is kept for the next call, unless that may see another."""
    return torch.tensor(float(value), dtype=torch.float64) if _direct.watched() else _number(float(value))


@functools.lru_cache(256)
def _number(value: float) -> Tensor:
    with torch.inference_mode(False):  # autograd does not save what was made in it
        return torch.tensor(value, dtype=torch.float64)


def wide_result(name: str, value: torch.dtype | None, of_name: str, of: Tensor) -> bool:
    """Whether a result is wanted in float32, not in the 16-bit type of `of` (under autocast it may become one)."""
    if value is None:
        return False
    if value == of.dtype:
        return value == torch.float32
    if not isinstance(value, torch.dtype):
        raise TypeError(f"{name}: expected a torch.dtype or None, got {type(value).__name__}")
    if value != torch.float32 or of.dtype == torch.float64:
        also = " or float32" if of.dtype.itemsize == 2 else ""
        raise TypeError(f"{name}: expected {_dtype(of.dtype)} as of {of_name}{also}, got {_dtype(value)}")
    return True


def positive_and_finite(name: str, value: float) -> None:
    """`value` > 0, not NaN, not infinite."""
    if not 0 < value < math.inf:  # false for NaN; traceable, unlike math.isfinite
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")


def not_negative_and_finite(name: str, value: float) -> None:
    """`value` >= 0, not NaN, not infinite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name}: expected a finite number >= 0, got {value}")


def boolean(name: str, value: bool) -> None:
    """`value` is True or False, no tensor."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
