"""Kernels of a GPU compiled before they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import product
from typing import get_args

import torch
from torch import Tensor

from setemb_kernels import _check
from setemb_kernels.backends import triton_absent
from setemb_kernels.ops.set_similarity import reference
from setemb_kernels.ops.set_similarity.op import Kind

LENGTHS = 16, 32, 64
"""A set of each kind that there are kernels for, by its number of vectors."""


def precompile_set_similarity(
    kind: Kind,
    features: int,
    dtype: torch.dtype,
    *,
    alpha: float | Tensor = 16.0,
    reduction: str = "sum",
    candidates: bool = False,
    gradients: bool = True,
    wide: bool = False,
    device: torch.device | str = "cuda",
) -> None:
    """Compile all kernels that `set_similarity` may launch on a GPU for sets of any lengths and numbers.

    Without this a kernel is compiled when it is first launched, which takes a second or so; of lengths it matters
    alone whether sets have up to 16, up to 32, or more vectors in the mean, on either side, and of numbers whether the
    gradients take several launches. After this no call with such options waits for the compiler. Triton keeps what it
    compiled on disk. Takes as long as all those first launches, and waits for the device.

    Args:
        kind, reduction: as of `set_similarity`.
        features: D of the sets, contiguous.
        dtype: bfloat16, float16 or float32, of the sets.
        alpha: a number, or a 0-dim tensor if that is what calls will have: one on the device is read by the kernels. Of
            match_probability the scale, with a bias that is likewise a number, or a tensor on the same device.
        candidates: for calls with candidates, or paired ones, rather than for all pairs.
        gradients: for the backward pass, too, with one for alpha where that is a tensor that requires it.
        wide: for ``out_dtype=torch.float32`` of 16-bit sets, as the losses, search and ranks have it.
        device: a CUDA device.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
        RuntimeError: if Triton's kernels cannot run here.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected one of {', '.join(get_args(Kind))}, got {kind!r}")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction: expected 'sum' or 'mean', got {reduction!r}")
    if not isinstance(features, int) or features < 1:
        raise ValueError(f"features: expected an integer > 0, got {features!r}")
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise ValueError(f"dtype: expected bfloat16, float16 or float32, got {dtype}")
    if torch.device(device).type != "cuda":
        raise ValueError(f"device: expected a CUDA device, got {device}")
    if reason := triton_absent():
        raise RuntimeError(f"triton cannot serve CUDA devices: {reason}")
    device = torch.empty(0, device=device).device
    sharpness = _check.sharpness("alpha", alpha, device).detach()
    needs = (gradients, gradients, gradients and isinstance(alpha, Tensor) and alpha.requires_grad)
    launch_all(kind, features, dtype, sharpness, reduction == "mean", candidates, needs, wide, device)
    torch.cuda.synchronize(device)


def launch_all(
    kind: str,
    D: int,
    dtype: torch.dtype,
    alpha: Tensor,
    mean: bool,
    candidates: bool,
    needs: tuple[bool, bool, bool],
    wide: bool,
    device: torch.device,
) -> None:
    """Forward and, if any of x, y and alpha needs a gradient, backward of few sets of zeros of each length, in as many
    launches, splits and windows as another number of sets may take."""
    from setemb_kernels.ops.set_similarity import triton

    N = M = 2
    lengths: tuple[int, ...] = LENGTHS
    if kind == "mean":  # the closest pair of one vector with one, in float32; see `op`
        lengths, kind, dtype = (LENGTHS[0],), "max", torch.float32
    who = torch.zeros(N, 2, dtype=torch.int64, device=device) if candidates else None
    # what a kind does not take is a number, wherever alpha is
    bias = alpha.new_zeros(()) if kind == "match_probability" else _check.number(0.0)
    alpha = alpha if kind in (*reference.SOFT, "match_probability") else _check.number(1.0)
    for (K, L), splits, windows in product(product(lengths, repeat=2), (False, True), (False, True)):
        x, y = (torch.zeros(count, D, dtype=dtype, device=device) for count in (N * K, M * L))
        sets = x, torch.arange(N + 1, device=device) * K, y, torch.arange(M + 1, device=device) * L, who
        with _limits(splits, windows):
            s = triton.forward(*sets, alpha, bias, kind, mean, wide)
            if any(needs):
                triton.backward(torch.zeros_like(s), *sets, alpha, bias, kind, mean, *needs, needs[2])


@contextmanager
def _limits(splits: bool, windows: bool) -> Iterator[None]:
    """Whether pairs are split, and whether the state of all sets is more than what is kept at a time."""
    from setemb_kernels.ops.set_similarity import triton_config

    before = triton_config.LIMITS
    triton_config.LIMITS = before._replace(
        programs_each=before.programs_each if splits else 0,
        workspace_bytes=1 if windows else before.workspace_bytes,
    )
    try:
        yield
    finally:
        triton_config.LIMITS = before
