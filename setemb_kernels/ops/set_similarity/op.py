"""Similarities of sets of any sizes: the public functions and all that torch needs.

One op for padded, ragged, paired and candidate sets, and for all kinds: both sides are packed (`layout`), and "paired"
is one candidate each. The maths is in `reference`, the kernels in ``csrc/cpu/set_similarity*`` and `triton`.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from setemb_kernels import _check
from setemb_kernels._direct import ops
from setemb_kernels._library import (
    define,
    forbid_double_backward,
    forbid_gradient,
    implement,
    register_autocast,
    register_autograd,
)
from setemb_kernels.backends import OpBackends
from setemb_kernels.ops.set_similarity import codes, reference
from setemb_kernels.ops.set_similarity.layout import CODES, PackedSets, means, packed
from setemb_kernels.ops.smooth_chamfer.op import smooth_chamfer

FORWARD = "setemb::set_similarity"
BACKWARD = "setemb::set_similarity_backward"

Kind = Literal["smooth_chamfer", "chamfer", "maxsim", "soft_maxsim", "max", "mean", "match_probability"]


def set_similarity(
    x: Tensor,
    y: Tensor,
    kind: Kind = "smooth_chamfer",
    *,
    alpha: float | Tensor = 16.0,
    scale: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    reduction: Literal["sum", "mean"] = "sum",
    x_mask: Tensor | None = None,
    y_mask: Tensor | None = None,
    x_offsets: Tensor | None = None,
    y_offsets: Tensor | None = None,
    x_scale: Tensor | None = None,
    y_scale: Tensor | None = None,
    pairs: Literal["all", "paired"] = "all",
    candidates: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    r"""Similarity of sets of x with sets of y, of any sizes: all pairs, paired, or chosen candidates.

    With :math:`c_{kl} = x_k \cdot y_l` over the vectors of one pair of sets X and Y:

    ================= ================================================================================================
    kind              similarity
    ================= ================================================================================================
    smooth_chamfer    :math:`\frac{1}{2 \alpha |X|} \sum_k \log \sum_l e^{\alpha c_{kl}}
                      + \frac{1}{2 \alpha |Y|} \sum_l \log \sum_k e^{\alpha c_{kl}}`, see `smooth_chamfer`
    chamfer           :math:`\frac{1}{2 |X|} \sum_k \max_l c_{kl} + \frac{1}{2 |Y|} \sum_l \max_k c_{kl}`
    maxsim            :math:`\sum_k \max_l c_{kl}`: x are the queries (ColBERT's late interaction)
    soft_maxsim       :math:`\sum_k \frac{1}{\alpha} \log \sum_l e^{\alpha c_{kl}}`; alpha is 1 / temperature
    max               :math:`\max_{kl} c_{kl}` (multiple-instance learning, MIL)
    mean              :math:`\frac{1}{|X| |Y|} \sum_{kl} c_{kl}`
    match_probability :math:`\frac{1}{|X| |Y|} \sum_{kl} \sigma(\text{scale} \, c_{kl} + \text{bias})`
    ================= ================================================================================================

    No scores of all pairs of vectors are stored, in the forward or in the backward pass, which makes them again. Sets
    of any size are streamed through a tile. A maximum gives its gradient to exactly one vector: of equals that of the
    lowest index, for "max" the lowest (k, l) in row order. The result is finite where the dot products are: what is out
    of the range of its dtype becomes the largest finite value. A NaN reaches only the pairs of the set that holds it.

    Args:
        x, y: sets of vectors in one of three forms, which may differ between the sides; float32, bfloat16, float16 or
            float64, of one dtype and device:
            padded ``[N, K, D]``, all vectors valid or as the mask says; packed rows ``[X, D]`` with offsets; or a
            nested tensor of layout ``torch.jagged`` ``[N, *, D]``. For scoring, without gradients, either may be of
            int8 or float8_e4m3fn, next to any dtype on the other side: the result is that of the decoded vectors in
            float32, in float64 next to that. Where the device multiplies int8, sums of int8 with int8 are exact up to
            65,536 features.
        kind: see above.
        alpha: sharpness of smooth_chamfer and soft_maxsim, a finite number > 0, or a 0-dim tensor that may require a
            gradient.
        scale, bias: of match_probability; numbers or 0-dim tensors that may require gradients.
        reduction: of maxsim and soft_maxsim: "sum" over the vectors of X, or their "mean".
        x_mask, y_mask: bool ``[N, K]`` and ``[M, L]``, True = valid, beside padded sets. A vector that is not valid
            does not exist, whatever it holds, and gets gradient 0. The valid rows are copied once.
        x_offsets, y_offsets: int32 or int64 ``[N + 1]`` and ``[M + 1]``, on the device of x: set i is the rows
            ``offsets[i]`` to ``offsets[i + 1]`` (cu_seqlens). On a GPU their values are not checked.
        x_scale, y_scale: of int8 or float8 vectors, floating ``[N, K]`` and ``[M, L]`` beside padded sets, else
            ``[X]`` and ``[Y]``: what the codes of each vector are multiplied by; None: 1.
        pairs: "all", or "paired": set i of x with set i of y alone.
        candidates: int64 ``[N, C]``: set i of x with sets ``candidates[i]`` of y; -1 is none and has similarity -inf.
        out_dtype: of the result: None, the dtype of x, or float32 where x is of a 16-bit type, whose similarities are
            accumulated in float32 and then not rounded.

    Returns:
        ``[N, M]`` in the dtype of x or `out_dtype`; ``[N]`` for "paired"; ``[N, C]`` for candidates. A pair in which
        one set has no vector has similarity 0 and passes no gradient. Gradients flow to x, y, alpha, scale and bias,
        once: a second derivative raises.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Sources: Kim, Kim, Kwak, "Improving Cross-Modal Retrieval with Set of Diverse Embeddings", CVPR 2023; Khattab,
    Zaharia, "ColBERT: efficient and effective passage search via contextualized late interaction over BERT", SIGIR
    2020; Chun et al., "Probabilistic embeddings for cross-modal retrieval" (PCME), CVPR 2021.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind: expected one of {', '.join(get_args(Kind))}, got {kind!r}")
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction: expected 'sum' or 'mean', got {reduction!r}")
    if reduction == "mean" and kind not in ("maxsim", "soft_maxsim"):
        raise ValueError(f"reduction: expected 'sum' for {kind}, which has one form, got 'mean'")
    if pairs not in ("all", "paired"):
        raise ValueError(f"pairs: expected 'all' or 'paired', got {pairs!r}")
    padded = x_offsets is None and y_offsets is None and not _nested(x) and not _nested(y)
    as_codes = (
        x_scale is not None or y_scale is not None or any(isinstance(v, Tensor) and v.dtype in CODES for v in (x, y))
    )
    padded = padded and not as_codes
    if kind == "smooth_chamfer" and padded and pairs == "all" and candidates is None:
        return smooth_chamfer(x, y, alpha=alpha, x_mask=x_mask, y_mask=y_mask, out_dtype=out_dtype)
    xs, ys = packed("x", x, x_mask, x_offsets, x_scale), packed("y", y, y_mask, y_offsets, y_scale)
    _check.same_size("y", ys.rows, "x", xs.rows, {1: "features"})
    if as_codes:
        wide = _check_codes(xs, ys, (alpha, scale, bias), out_dtype)
    else:
        _check.like("y", ys.rows, "x", xs.rows)
        wide = _check.wide_result("out_dtype", out_dtype, "x", xs.rows)
    chosen = _candidates(xs, ys, pairs, candidates)
    if kind == "mean":
        s = _product_of_means(xs, ys, chosen, wide)
        return s.squeeze(1) if pairs == "paired" else s
    if kind == "match_probability":
        sharpness, shift = (_check.real(name, v, x.device) for name, v in (("scale", scale), ("bias", bias)))
    else:
        sharpness = _check.sharpness("alpha", alpha if kind in reference.SOFT else 1.0, x.device)
        shift = _check.number(0.0)
    if as_codes:
        result = codes.similarity(xs, ys, chosen, sharpness, shift, kind, reduction == "mean")
    else:
        result = ops.set_similarity(
            xs.rows, xs.offsets, ys.rows, ys.offsets, chosen, sharpness, shift, kind, reduction == "mean", wide
        )
    return result.squeeze(1) if pairs == "paired" else result


def smooth_chamfer_of_long_sets(
    x: Tensor, y: Tensor, alpha: Tensor, x_mask: Tensor | None, y_mask: Tensor | None, wide: bool
) -> Tensor:
    """All pairs of padded sets, checked."""
    xs, ys = packed("x", x, x_mask, None), packed("y", y, y_mask, None)
    shift = _check.number(0.0)
    result: Tensor = ops.set_similarity(
        xs.rows, xs.offsets, ys.rows, ys.offsets, None, alpha, shift, "smooth_chamfer", False, wide
    )
    return result


def maxsim(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """``sum_k max_l x_k . y_l``: `set_similarity` of kind "maxsim", with its options. x are the queries."""
    return set_similarity(x, y, "maxsim", **options)


def soft_maxsim(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """``sum_k log(sum_l exp(alpha x_k . y_l)) / alpha``: `set_similarity` of kind "soft_maxsim", with its options."""
    return set_similarity(x, y, "soft_maxsim", **options)


def chamfer(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """Half the mean over X of the largest dot product, and half that over Y: `set_similarity` of kind "chamfer", with
    its options."""
    return set_similarity(x, y, "chamfer", **options)


def match_probability(x: Tensor, y: Tensor, **options: Any) -> Tensor:
    """The mean of ``sigmoid(scale x_k . y_l + bias)``: `set_similarity` of kind "match_probability", with its
    options."""
    return set_similarity(x, y, "match_probability", **options)


def _nested(v: Any) -> bool:
    return isinstance(v, Tensor) and v.is_nested


def _candidates(xs: PackedSets, ys: PackedSets, pairs: str, candidates: Tensor | None) -> Tensor | None:
    N, M = xs.sets, ys.sets
    if pairs == "paired":
        if candidates is not None:
            raise ValueError("candidates: expected None beside pairs='paired'")
        if N != M:
            raise ValueError(f"y: expected {N} sets as in x for pairs='paired', got {M}")
        return torch.arange(N, device=xs.rows.device)[:, None]
    if candidates is None:
        return None
    if not isinstance(candidates, Tensor):
        raise TypeError(f"candidates: expected a torch.Tensor of int64 or None, got {type(candidates).__name__}")
    if candidates.dtype != torch.int64:
        raise TypeError(f"candidates: expected int64, got {str(candidates.dtype).removeprefix('torch.')}")
    if candidates.dim() != 2 or candidates.shape[0] != N:
        raise ValueError(f"candidates: expected shape [{N}, candidates] as of x, got {list(candidates.shape)}")
    if candidates.device != xs.rows.device:
        raise ValueError(f"candidates: expected device {xs.rows.device} as of x, got {candidates.device}")
    return candidates


def _check_codes(xs: PackedSets, ys: PackedSets, numbers: tuple[Any, ...], out_dtype: torch.dtype | None) -> bool:
    """What codes ask for: no gradients, and a result in what it is computed in. Says True: it is not rounded."""
    if ys.rows.device != xs.rows.device:
        raise ValueError(f"y: expected device {xs.rows.device} as of x, got {ys.rows.device}")
    names = ("x", "y", "x_scale", "y_scale", "alpha", "scale", "bias")
    for name, v in zip(names, (xs.rows, ys.rows, xs.scale, ys.scale, *numbers), strict=True):
        if isinstance(v, Tensor) and v.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name}: expected no gradient to be required, as x or y are codes (int8, float8)")
    dtype = torch.float64 if torch.float64 in (xs.rows.dtype, ys.rows.dtype) else torch.float32
    if out_dtype not in (None, dtype):
        raise ValueError(f"out_dtype: expected None or {dtype} beside codes (int8, float8), got {out_dtype}")
    return True


def _product_of_means(xs: PackedSets, ys: PackedSets, candidates: Tensor | None, wide: bool) -> Tensor:
    """The mean over all pairs is the dot product of the means: sets of one vector, whose only pair is the closest."""
    device = xs.rows.device.type
    types = (xs.rows.dtype, ys.rows.dtype)
    as_codes = types[0] in CODES or types[1] in CODES
    wider = torch.float64 if torch.float64 in types else torch.float32
    dtype = wider if as_codes else types[0]
    if torch.is_autocast_enabled(device) and dtype != torch.float64 and not as_codes:
        dtype = torch.get_autocast_dtype(device)
        xs, ys = (s._replace(rows=s.rows.to(dtype)) for s in (xs, ys))
    with torch.autocast(device, enabled=False):
        (x, x_some), (y, y_some) = means("x", xs, wider), means("y", ys, wider)
        one, nothing = _check.number(1.0), _check.number(0.0)
        offsets = (torch.arange(v.shape[0] + 1, device=v.device) for v in (x, y))
        s = ops.set_similarity(x, next(offsets), y, next(offsets), candidates, one, nothing, "max", False, True)
        if candidates is None:
            both = x_some[:, None] & y_some
        else:  # -1 is none, also where y has no set
            both = x_some[:, None] & torch.cat((y_some, y_some.new_zeros(1)))[candidates] | (candidates < 0)
        s = torch.where(both, s, 0)
        if wide or dtype == s.dtype:
            return s
        largest = torch.finfo(dtype).max
        narrow = s.clamp(-largest, largest).to(dtype)
        return narrow if candidates is None else narrow.masked_fill(candidates < 0, -torch.inf)


define(
    FORWARD,
    # alpha: of match_probability the scale. mean: the reduction of maxsim and soft_maxsim. wide: the result is in what
    # it was accumulated in
    "(Tensor x, Tensor x_offsets, Tensor y, Tensor y_offsets, Tensor? candidates, Tensor alpha, Tensor bias,"
    " str kind, bool mean, bool wide) -> Tensor",
)
define(
    BACKWARD,  # grad: in the dtype of x, or in what it is accumulated in
    "(Tensor grad, Tensor x, Tensor x_offsets, Tensor y, Tensor y_offsets, Tensor? candidates, Tensor alpha,"
    " Tensor bias, str kind, bool mean, bool need_x, bool need_y, bool need_alpha, bool need_bias)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
)


# --- implementations: csrc registers itself for the CPU when it is loaded; Triton serves CUDA; the reference all else


def _triton() -> ModuleType:
    from setemb_kernels.ops.set_similarity import triton

    return triton


BACKENDS = OpBackends(
    "set_similarity", triton=_triton, triton_dtypes=(torch.float32, torch.bfloat16, torch.float16, *CODES)
)


@implement(FORWARD)
def _forward(
    x: Tensor,
    x_offsets: Tensor,
    y: Tensor,
    y_offsets: Tensor,
    candidates: Tensor | None,
    alpha: Tensor,
    bias: Tensor,
    kind: str,
    mean: bool,
    wide: bool,
) -> Tensor:
    if alpha.device.type == "cpu" and kind in reference.SOFT:
        _check.positive_and_finite("alpha", float(alpha))
    return BACKENDS.implementation(reference, x, y).forward(
        x, x_offsets, y, y_offsets, candidates, alpha, bias, kind, mean, wide
    )


@implement(codes.FORWARD)
def _forward_of_codes(
    x: Tensor,
    x_scale: Tensor | None,
    x_offsets: Tensor,
    y: Tensor,
    y_scale: Tensor | None,
    y_offsets: Tensor,
    candidates: Tensor | None,
    alpha: Tensor,
    bias: Tensor,
    kind: str,
    mean: bool,
) -> Tensor:
    result: Tensor = BACKENDS.implementation(reference, x, y).forward_of_codes(
        x, x_scale, x_offsets, y, y_scale, y_offsets, candidates, alpha, bias, kind, mean
    )
    return result


@implement(BACKWARD)
def _backward(
    grad: Tensor,
    x: Tensor,
    x_offsets: Tensor,
    y: Tensor,
    y_offsets: Tensor,
    candidates: Tensor | None,
    alpha: Tensor,
    bias: Tensor,
    kind: str,
    mean: bool,
    need_x: bool,
    need_y: bool,
    need_alpha: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return BACKENDS.implementation(reference, x, y).backward(
        grad,
        x,
        x_offsets,
        y,
        y_offsets,
        candidates,
        alpha,
        bias,
        kind,
        mean,
        need_x,
        need_y,
        need_alpha,
        need_bias,
    )


# --- shapes for tracing


@torch.library.register_fake(FORWARD)
def _(
    x: Tensor,
    x_offsets: Tensor,
    y: Tensor,
    y_offsets: Tensor,
    candidates: Tensor | None,
    alpha: Tensor,
    bias: Tensor,
    kind: str,
    mean: bool,
    wide: bool,
) -> Tensor:
    shape = (x_offsets.shape[0] - 1, y_offsets.shape[0] - 1) if candidates is None else candidates.shape
    return x.new_empty(shape, dtype=reference.accumulate_dtype(x.dtype) if wide else x.dtype)


@torch.library.register_fake(BACKWARD)
def _(
    grad: Tensor,
    x: Tensor,
    x_offsets: Tensor,
    y: Tensor,
    y_offsets: Tensor,
    candidates: Tensor | None,
    alpha: Tensor,
    bias: Tensor,
    kind: str,
    mean: bool,
    need_x: bool,
    need_y: bool,
    need_alpha: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if need_x else 0),
        y.new_empty(y.shape if need_y else 0),
        alpha.new_empty(() if need_alpha else 0),
        bias.new_empty(() if need_bias else 0),
    )


# --- autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.kind, ctx.mean, _ = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    needs = ctx.needs_input_grad
    need = (needs[0], needs[2], needs[5], needs[6])
    gradients = ops.set_similarity_backward(grad, *ctx.saved_tensors, ctx.kind, ctx.mean, *need)
    x, y, alpha, bias = (g if n else None for g, n in zip(gradients, need, strict=True))
    return x, None, y, None, None, alpha, bias, None, None, None


register_autograd(FORWARD, _autograd, setup_context=_setup_context)
forbid_double_backward(BACKWARD)
forbid_gradient(codes.FORWARD, "is for scoring and has no gradient")
register_autocast(FORWARD, cast=3)  # x and y, as for a matrix product
