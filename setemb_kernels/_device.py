"""What all kernels of a GPU go by, whoever compiles them: its size, precision of products, memory."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def processors(x: Tensor) -> tuple[int, int]:
    """Multiprocessors and architecture (10 * major + minor of the compute capability)."""
    if x.device.type == "cpu":  # interpreted or emulated
        return 2, 90
    return _processors(x.device)


@functools.cache
def _processors(device: torch.device) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, 10 * properties.major + properties.minor


def precision() -> str:
    """Of products of float32: what torch may use for a plain one."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def workspace_bytes(most: int, device: torch.device) -> int:
    """`most`, or a hundredth of the memory of a smaller device."""
    if device.type == "cpu":  # emulated or interpreted
        return most
    return min(most, torch.cuda.get_device_properties(device).total_memory // 100)
