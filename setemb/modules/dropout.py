"""Dropout from fewer random numbers, on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_STEPS = 1 << 16


class Dropout(nn.Dropout):
    """`torch.nn.Dropout`; on a CPU it draws 16 bits an element.

    There torch draws 53, one element after another on one thread (but for processors of Intel, where MKL does), which
    takes longer than an activation. So p is rounded to a multiple of 2^-16, and the scale is that of the rounded one:
    the mean is exact. From one seed it draws other elements than torch's.
    """

    def forward(self, input: Tensor) -> Tensor:
        dropped = round(self.p * _STEPS)
        usual = self.inplace or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if input.device.type != "cpu" or not self.training or dropped in (0, _STEPS) or usual:
            return super().forward(input)
        words = torch.empty((input.numel() + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        bits = words.view(torch.int16)[: input.numel()].view(input.shape)
        return (input * (_STEPS / (_STEPS - dropped))).masked_fill_(bits < dropped - _STEPS // 2, 0)
