"""The call signatures of ``late_interaction_kernels.fp8``: MaxSim of float8 (e4m3) codes and their scales.

``import setemb_kernels.integrations.late_interaction_kernels_fp8 as fp8``

Codes are decoded while they are read, or multiplied as they are where the chip can; scores are float32 and without
gradients, as there. A document or query without a valid token scores 0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from setemb_kernels.ops.set_similarity.op import set_similarity

__all__ = [
    "dequantize_fp8_per_tensor",
    "dequantize_fp8_per_token",
    "maxsim_inference_fp8",
    "quantize_fp8_per_tensor",
    "quantize_fp8_per_token",
]

SMALLEST = 1e-6
"""What the largest number is taken for at least, so that zeros have a scale."""


def quantize_fp8_per_tensor(X: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """Codes of X and one scale ``[]``: X is about codes times scale, its largest number the largest of dtype."""
    largest = X.float().abs().amax() if X.numel() else torch.full((), torch.finfo(dtype).max, device=X.device)
    return _quantized(X, largest, dtype)


def quantize_fp8_per_token(X: Tensor, dtype: torch.dtype = torch.float8_e4m3fn) -> tuple[Tensor, Tensor]:
    """The same with a scale for each vector, ``X.shape[:-1]``."""
    return _quantized(X, X.float().abs().amax(-1), dtype)


def dequantize_fp8_per_tensor(X_fp8: Tensor, scale: Tensor) -> Tensor:
    """float32."""
    return X_fp8.float() * scale


def dequantize_fp8_per_token(X_fp8: Tensor, scale: Tensor) -> Tensor:
    """float32."""
    return X_fp8.float() * scale[..., None]


def maxsim_inference_fp8(
    Q: Tensor,
    D: Tensor,
    *,
    scale_Q: Tensor,
    scale_D: Tensor,
    q_mask: Tensor | None = None,
    d_mask: Tensor | None = None,
) -> Tensor:
    """MaxSim of all pairs of codes.

    Args:
        Q: ``[Nq, Lq, d]`` or ``[Lq, d]``, float8_e4m3fn.
        D: ``[Nd, Ld, d]`` or ``[Ld, d]``, likewise.
        scale_Q, scale_D: ``[]``, or of each vector, of the shapes of Q and D without the last.
        q_mask, d_mask: bool, of those shapes, True = valid.

    Returns:
        float32 ``[Nq, Nd]``, less the axes that Q and D lack.
    """
    (x, x_scale, x_mask), (y, y_scale, y_mask) = _side(Q, scale_Q, q_mask), _side(D, scale_D, d_mask)
    with torch.no_grad():
        scores = set_similarity(x, y, "maxsim", x_scale=x_scale, y_scale=y_scale, x_mask=x_mask, y_mask=y_mask)
    if D.dim() == 2:
        scores = scores[:, 0]
    return scores[0] if Q.dim() == 2 else scores


def _quantized(X: Tensor, largest: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    limit = torch.finfo(dtype).max
    scale = largest.clamp(min=SMALLEST) / limit
    codes = X.float() / (scale[..., None] if scale.dim() else scale)
    return codes.clamp(-limit, limit).to(dtype).contiguous(), scale


def _side(codes: Tensor, scale: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """As a batch of sets, with a scale for each vector."""
    batch = codes.dim() == 2
    sets = codes[None] if batch else codes
    scale = scale.float()
    scale = scale[None] if batch and scale.dim() else scale
    mask = mask[None] if mask is not None and mask.dim() == 1 else mask
    return sets, scale.expand(sets.shape[:2]).contiguous(), mask
