"""What Triton has compiled."""

from __future__ import annotations

from typing import Any


def compiled(*kernels: Any) -> int:
    """How many variants of some ``triton.jit`` functions, in this process."""
    return sum(len(cache[0]) for kernel in kernels for cache in kernel.device_caches.values())
