"""Checks of what callers pass: one error each, naming the argument, what came and what was expected."""

from __future__ import annotations

import math

import torch
from torch import Tensor

FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def embedding_sets(name: str, value: Tensor) -> None:
    """`value` is a floating tensor ``[sets, vectors, features]``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if value.dim() != 3:
        raise ValueError(f"{name}: expected 3 dimensions [sets, vectors, features], got shape {list(value.shape)}")
    if value.dtype not in FLOATING:
        raise TypeError(f"{name}: expected float32, bfloat16, float16 or float64, got {_dtype(value.dtype)}")


def matching_sets(x: Tensor, y: Tensor) -> None:
    """x and y share features, dtype and device."""
    if x.shape[2] != y.shape[2]:
        raise ValueError(f"y: expected {x.shape[2]} features as in x, got {y.shape[2]} (shape {list(y.shape)})")
    if x.dtype != y.dtype and not torch.is_autocast_enabled(x.device.type):
        raise TypeError(f"y: expected {_dtype(x.dtype)} as in x, got {_dtype(y.dtype)}")
    if x.device != y.device:
        raise ValueError(f"y: expected device {x.device} as of x, got {y.device}")


def mask(name: str, value: Tensor | None, sets_name: str, sets: Tensor) -> None:
    """`value` is None or a boolean ``[sets, vectors]`` beside `sets`."""
    if value is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a boolean torch.Tensor or None, got {type(value).__name__}")
    if value.dtype != torch.bool:
        raise TypeError(f"{name}: expected bool (True = valid), got {_dtype(value.dtype)}")
    if value.shape != sets.shape[:2]:
        raise ValueError(f"{name}: expected shape {list(sets.shape[:2])} as of {sets_name}, got {list(value.shape)}")
    if value.device != sets.device:
        raise ValueError(f"{name}: expected device {sets.device} as of {sets_name}, got {value.device}")


def sharpness(name: str, value: float | Tensor, device: torch.device) -> Tensor:
    """`value`, a finite number > 0, as a 0-dim tensor. The value of a tensor is checked where it is read, by the
    kernels."""
    if isinstance(value, Tensor):
        if value.dim() != 0:
            raise ValueError(f"{name}: expected a number or a tensor of 0 dimensions, got shape {list(value.shape)}")
        if value.dtype not in FLOATING:
            raise TypeError(f"{name}: expected a floating dtype, got {_dtype(value.dtype)}")
        if value.device.type != "cpu" and value.device != device:
            raise ValueError(f"{name}: expected device cpu or {device}, got {value.device}")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number or a torch.Tensor, got {type(value).__name__}")
    positive_and_finite(name, value)
    return torch.tensor(float(value), dtype=torch.float64)


def positive_and_finite(name: str, value: float) -> None:
    """`value` > 0, not NaN, not infinite."""
    if not 0 < value < math.inf:  # false for NaN; traceable, unlike math.isfinite
        raise ValueError(f"{name}: expected a finite number > 0, got {value}")


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
