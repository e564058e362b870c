"""Smooth-Chamfer similarity of all pairs of two batches of sets: the public function and all that torch needs.

To add an op, read this file from top to bottom and write its sibling: schema, implementations by device, fake,
autograd, autocast. The maths is in `reference`, the kernels in ``csrc/cpu/smooth_chamfer.cpp`` and `triton`.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from setemb_kernels import _check
from setemb_kernels._direct import ops
from setemb_kernels._library import define, forbid_double_backward, implement, register_autocast, register_autograd
from setemb_kernels.backends import AUTOMATIC, OpBackends
from setemb_kernels.ops.smooth_chamfer import reference

FORWARD = "setemb::smooth_chamfer"
BACKWARD = "setemb::smooth_chamfer_backward"

MAX_VECTORS = (256, 128)
"""That the Triton kernels take, of the larger sets and of the others, so that a tile holds whole sets. The sizes in
tests/kernels/test_triton_aot.py are compiled without spills; a few others spill some bytes (K = 32, L = 4, masked, with
a gradient for alpha, on sm_90: 24), and above 64 vectors more do."""


def streams(x: Tensor, y: Tensor) -> bool:
    """Whether padded sets are too long for the kernels of this op on a GPU: those of `set_similarity` serve them.

    Not on a CPU, where the op takes any, and where a dot product out of range is finite in the end."""
    if x.device.type != "cuda" or x.dtype == torch.float64 or BACKENDS.chosen not in (AUTOMATIC, "triton"):
        return False
    K, L = x.shape[1], y.shape[1]
    return max(K, L) > MAX_VECTORS[0] or min(K, L) > MAX_VECTORS[1]


def smooth_chamfer(
    x: Tensor,
    y: Tensor,
    *,
    alpha: float | Tensor = 16.0,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Smooth-Chamfer similarity of every set of x with every set of y.

    With :math:`c_{kl} = x_k \cdot y_l` over the valid vectors of one pair of sets,

    .. math::
        s(X, Y) = \frac{1}{2 \alpha |X|} \sum_k \log \sum_l e^{\alpha c_{kl}}
                + \frac{1}{2 \alpha |Y|} \sum_l \log \sum_k e^{\alpha c_{kl}}

    It is log-*sum*-exp, not mean: for unit vectors s lies in ``[-1, 1 + log(max(K, L)) / alpha]``. ``alpha -> inf``
    gives the Chamfer similarity (mean of maxima, both ways); ``K = L = 1`` gives the dot product. Vectors need not be
    normalised.

    Nothing of size ``N M K L`` is stored, in the forward or in the backward pass; on a GPU the backward (in float32 the
    forward, too) works in at most 512 MiB, or a hundredth of a smaller device's memory, beside copies of x and y and
    the smaller of their gradients in float32. The result is finite for finite input: what would overflow saturates at
    the largest finite value. A gradient is infinite where its value is out of range of its dtype (as a loss scaler
    expects), and only there. A NaN reaches only the pairs of the set that holds it.

    Args:
        x: ``[N, K, D]`` float32, bfloat16, float16 or float64 (float64 on a GPU: the reference). Any strides.
        y: ``[M, L, D]`` of the same dtype and device; K and L may differ. Long sets (on a GPU more than 256
            vectors, or more than 128 on both sides) are streamed by the kernels of `set_similarity`, whose results are
            finite where the dot products are. The CUDA C++ kernel takes up to 64.
        alpha: sharpness, a finite number > 0, or a 0-dim tensor (CPU or the device of x) that may require a gradient.
            On a GPU the value of a tensor that lives there is not checked (that would wait for the device); one that
            is not positive gives meaningless numbers.
        x_mask: bool ``[N, K]``, True = valid. A vector that is not valid does not exist, whatever it holds, and gets
            gradient 0.
        y_mask: bool ``[M, L]``, likewise.
        out_dtype: of the result: None, the dtype of x, or float32 where x is of a 16-bit type. Its similarities are
            computed in float32 and then not rounded; nor is the upstream gradient.

    Returns:
        ``[N, M]`` in the dtype of x or `out_dtype`; 16-bit types are accumulated in float32. A pair in which one set
        has no valid vector has similarity 0 and passes no gradient. Gradients flow to x, y and alpha, once:
        a second derivative raises.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Source: Kim, Kim, Kwak, "Improving Cross-Modal Retrieval with Set of Diverse Embeddings", CVPR 2023, equation 3.
    """
    _check.similar_sets(x, y, x_mask, y_mask)
    sharpness = _check.sharpness("alpha", alpha, x.device)
    wide = _check.wide_result("out_dtype", out_dtype, "x", x)
    if streams(x, y):
        from setemb_kernels.ops.set_similarity.op import smooth_chamfer_of_long_sets

        return smooth_chamfer_of_long_sets(x, y, sharpness, x_mask, y_mask, wide)
    result: Tensor = ops.smooth_chamfer(x, y, sharpness, x_mask, y_mask, wide)
    return result


define(
    FORWARD,
    # wide: the result is in what it was accumulated in
    "(Tensor x, Tensor y, Tensor alpha, Tensor? x_mask=None, Tensor? y_mask=None, bool wide=False) -> Tensor",
)
define(
    BACKWARD,  # grad: in the dtype of x, or in what it is accumulated in
    "(Tensor grad, Tensor x, Tensor y, Tensor alpha, Tensor? x_mask, Tensor? y_mask,"
    " bool need_x, bool need_y, bool need_alpha) -> (Tensor, Tensor, Tensor)",
)


# --- implementations: csrc registers itself for the CPU when it is loaded; Triton serves CUDA, or our CUDA C++ where it
# is asked for; the reference all else


def _triton() -> ModuleType:
    from setemb_kernels.ops.smooth_chamfer import triton

    return triton


def _cuda() -> ModuleType:
    from setemb_kernels.ops.smooth_chamfer import cuda

    return cuda


BACKENDS = OpBackends(
    "smooth_chamfer", triton=_triton, triton_dtypes=(torch.float32, torch.bfloat16, torch.float16), cuda=_cuda
)


@implement(FORWARD)
def _forward(
    x: Tensor,
    y: Tensor,
    alpha: Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    wide: bool = False,
) -> Tensor:
    if alpha.device.type == "cpu":
        _check.positive_and_finite("alpha", float(alpha))
    return BACKENDS.implementation(reference, x, y).forward(x, y, alpha, x_mask, y_mask, wide)


@implement(BACKWARD)
def _backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    alpha: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    need_x: bool,
    need_y: bool,
    need_alpha: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return BACKENDS.implementation(reference, x, y).backward(
        grad, x, y, alpha, x_mask, y_mask, need_x, need_y, need_alpha
    )


def hardest_kernel(x: Tensor, y: Tensor) -> Callable[..., Any] | None:
    """A kernel that finds the most similar negative of each set without storing similarities, where one serves; see
    `cuda.hardest`."""
    return getattr(BACKENDS.implementation(reference, x, y), "hardest", None)


# --- shapes for tracing


@torch.library.register_fake(FORWARD)
def _(
    x: Tensor,
    y: Tensor,
    alpha: Tensor,
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    wide: bool = False,
) -> Tensor:
    return x.new_empty(x.shape[0], y.shape[0], dtype=reference.accumulate_dtype(x.dtype) if wide else x.dtype)


@torch.library.register_fake(BACKWARD)
def _(
    grad: Tensor,
    x: Tensor,
    y: Tensor,
    alpha: Tensor,
    x_mask: Tensor | None,
    y_mask: Tensor | None,
    need_x: bool,
    need_y: bool,
    need_alpha: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else 0),
        y.new_empty(y.shape if need_y else 0),
        alpha.new_empty(() if need_alpha else 0),
    )


# --- autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, _ = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, y, alpha, x_mask, y_mask = ctx.saved_tensors
    need_x, need_y, need_alpha, *_ = ctx.needs_input_grad
    grad_x, grad_y, grad_alpha = ops.smooth_chamfer_backward(
        grad, x, y, alpha, x_mask, y_mask, need_x, need_y, need_alpha
    )
    return grad_x if need_x else None, grad_y if need_y else None, grad_alpha if need_alpha else None, None, None, None


register_autograd(FORWARD, _autograd, setup_context=_setup_context)
forbid_double_backward(BACKWARD)
register_autocast(FORWARD, cast=2)  # x and y, as for a matrix product
