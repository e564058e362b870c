"""The judge of every case table: the float64 reference, with a bound that calibrates itself.

The error against the float64 reference, on the same rounded inputs, may be at most twice (the error of eager PyTorch in
the same dtype + one rounding of the largest value).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def on_cpu(inputs: Any) -> Any:
    """A named tuple with its tensors on the CPU, where judging is quick: what it makes of thousands of small operations
    a GPU waits for."""
    return inputs._replace(**{name: v.cpu() for name, v in inputs._asdict().items() if isinstance(v, Tensor)})


def judge(
    where: str,
    got: Tensor,
    truth: Tensor,
    eager: Sequence[Tensor],
    reference: Tensor,
    dtype: torch.dtype,
    *,
    saturates: bool = False,
    extra: float = 0.0,
) -> None:
    """Assert that `got` is as near to `truth` (float64) as eager PyTorch is in dtype.

    Args:
        where: what a failure says first.
        eager: the same in eager PyTorch, in several orders of summation since none of them is the right one; those that
            are not finite don't count.
        reference: our reference in dtype, which stands in where none of `eager` is finite.
        dtype: of the inputs.
        saturates: out of range `got` is the largest finite value; else it is infinite there, and only there.
        extra: added to the bound.
    """
    assert got.shape == truth.shape, where
    if not got.numel():
        return
    truth, got = truth.cpu(), got.detach().cpu()
    if saturates:
        assert got.isfinite().all(), f"{where}: not finite"
    else:
        assert torch.equal(got.isinf(), truth.to(got.dtype).isinf()), f"{where}: infinite elsewhere"
    limit = torch.finfo(got.dtype).max
    truth, got = truth.clamp(-limit, limit), got.double().clamp(-limit, limit)
    error = (got - truth).abs().max().item()
    plain = [p for p in eager if p.isfinite().all()] or [reference]
    plain_error = max((p.detach().cpu().double() - truth).abs().max().item() for p in plain)
    rounding = torch.finfo(dtype).eps * truth.abs().max().item()
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    bound = 2 * (plain_error + rounding) + smallest + extra
    assert error <= bound, (  # false for NaN
        f"{where}: error {error:.3g} > {bound:.3g} (eager {plain_error:.3g}, rounding {rounding:.3g})"
    )
