"""Ours, one by one: every implementation that can serve a device, chosen by name for the time of a call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

from setemb_kernels import backends


def ours(device: str) -> dict[str, Callable[[], AbstractContextManager[object]]]:
    """Name -> what makes it serve, while entered. Those that are absent are in `absent`."""
    (name,) = {row.implementation for row in backends() if row.device == device}
    return {name: nullcontext}


def absent(device: str) -> dict[str, str]:
    """Name -> why it cannot serve."""
    return {}
