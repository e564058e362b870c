"""One step of slot attention: the public function and all that torch needs. The maths is in `reference`."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any, Literal, overload

import torch
from torch import Tensor

from setemb_kernels import _check
from setemb_kernels._direct import ops
from setemb_kernels._library import define, forbid_double_backward, implement, register_autocast, register_autograd
from setemb_kernels.backends import OpBackends
from setemb_kernels.ops.slot_attention import reference
from setemb_kernels.ops.slot_attention.layout import empty_like_slots

FORWARD = "setemb::slot_attention"
BACKWARD = "setemb::slot_attention_backward"


@overload
def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    scale: float | None = ...,
    eps: float = ...,
    token_eps: float = ...,
    return_attention: Literal[False] = ...,
) -> Tensor: ...


@overload
def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    scale: float | None = ...,
    eps: float = ...,
    token_eps: float = ...,
    return_attention: Literal[True],
) -> tuple[Tensor, Tensor]: ...


@overload
def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    bias: Tensor | None = ...,
    mask: Tensor | None = ...,
    scale: float | None = ...,
    eps: float = ...,
    token_eps: float = ...,
    return_attention: bool,
) -> Tensor | tuple[Tensor, Tensor]: ...


def slot_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    *,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    eps: float = 1e-7,
    token_eps: float = 0.0,
    return_attention: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""One step of slot attention: the slots compete for each token, then each takes the mean of its tokens.

    For each head, over the valid tokens t,

    .. math::
        A_{kt} = \mathrm{softmax}_k(\mathrm{scale}\; q_k \cdot k_t + \mathrm{bias}_k), \qquad
        U_k = \frac{\sum_t (A_{kt} + \mathrm{token\_eps})\, v_t}
                   {\sum_t (A_{kt} + \mathrm{token\_eps}) + \mathrm{eps}}

    The softmax is over the *slots* of a token, so one pass over k and v makes numerator and denominator together; the
    backward pass makes A again from q, k, U and the denominators. Nothing of size ``B H T K`` is stored, in either; on
    a GPU, where sums over tokens do not fit in registers, the weights of some items at a time pass through a workspace
    of 32 MiB (more where one item needs it).

    Args:
        q: ``[B, H, K, Dk]`` slots, on a GPU 256 a head at most (64 in CUDA C++); float32, bfloat16, float16 or float64
            (on a GPU: the reference). Any strides.
        k: ``[B, H, T, Dk]`` keys, or ``[B, 1, T, Dk]``, one head for all heads of q. Of the dtype and device of q.
        v: ``[B, H, T, Dv]`` values, or ``[B, 1, T, Dv]``; as many heads as k. None where the keys are the values too:
            then k is read once and gets one gradient. k and v that are both *expanded* over heads (stride 0) count as
            one head; pass one head yourself where its gradient matters, as that of an expanded tensor is made at full
            size by torch.
        bias: ``[B, H, K]``, added to the logits of a slot whatever the token; of the dtype of q.
        mask: bool ``[B, T]``, True = valid. A token that is not valid contributes exactly nothing, whatever it holds,
            and gets gradient 0.
        scale: a finite number; ``Dk ** -0.5`` unless given.
        eps: added to each slot's sum of weights, >= 0.
        token_eps: added to the weight of each valid token, >= 0; with ``eps=0`` this is the normalisation of Locatello
            et al. (2020).
        return_attention: also return ``A``.

    Returns:
        ``U [B, H, K, Dv]`` in the dtype of q, heads outermost in memory where they are so in q, else contiguous; 16-bit
        types are accumulated in float32. An item without a valid token gets zeros and passes no gradient. Gradients
        flow to q, k, v and bias, once: a second derivative raises. With ``return_attention`` also ``A [B, H, K, T]``,
        before it is normalised over tokens: each valid token's weights sum to 1, those of others are 0. It is computed
        by plain operations and differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Source: Locatello et al., "Object-Centric Learning with Slot Attention", NeurIPS 2020, algorithm 1; with heads as in
    Kim, Kim, Kwak, "Improving Cross-Modal Retrieval with Set of Diverse Embeddings", CVPR 2023, section 3.2.
    """
    _check.floating("q", q, _check.SLOTS)
    k, v = _as_one_head(k, v, q.shape[1])
    for name, value in (("k", k),) if v is None else (("k", k), ("v", v)):
        _check.floating(name, value, _check.TOKENS)
        _check.same_size(name, value, "q", q, {0: "items"})
        if value.shape[1] not in (1, q.shape[1]):
            raise ValueError(f"{name}: expected 1 or {q.shape[1]} heads as in q, got {value.shape[1]}")
        _check.like(name, value, "q", q)
    _check.same_size("k", k, "q", q, {3: "features"})
    if v is not None:
        _check.same_size("v", v, "k", k, {1: "heads", 2: "tokens"})
    if bias is not None:
        _check.floating("bias", bias, _check.SLOTS[:3])
        _check.same_size("bias", bias, "q", q, {0: "items", 1: "heads", 2: "slots"})
        _check.like("bias", bias, "q", q)
    if mask is not None:
        _check.mask("mask", mask, (k.shape[0], k.shape[2]), "the tokens of k", k)
    scale = q.shape[3] ** -0.5 if scale is None and q.shape[3] else 1.0 if scale is None else scale
    if isinstance(scale, bool) or not isinstance(scale, (int, float)):
        raise TypeError(f"scale: expected a number or None, got {type(scale).__name__}")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"scale: expected a finite number, got {scale}")
    _check.not_negative_and_finite("eps", eps)
    _check.not_negative_and_finite("token_eps", token_eps)
    out, _ = ops.slot_attention(q, k, v, bias, mask, float(scale), float(eps), float(token_eps))
    return (out, _attention(q, k, bias, mask, scale)) if return_attention else out


def _as_one_head(k: Tensor, v: Tensor | None, heads: int) -> tuple[Tensor, Tensor | None]:
    """k and v with one head, where both have one or are expanded over all."""
    for t in (k, k if v is None else v):
        if not isinstance(t, Tensor) or t.dim() != 4:
            return k, v
        if t.shape[1] != 1 and not (t.shape[1] == heads and t.stride(1) == 0):
            return k, v
    one_k, one_v = (t if t is None or t.shape[1] == 1 else t[:, :1] for t in (k, v))
    assert one_k is not None
    return one_k, one_v


def _attention(q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None, scale: float) -> Tensor:
    """``A [B, H, K, T]``, stored: it was asked for."""
    if mask is not None:
        k = torch.where(mask[:, None, :, None], k, 0)
    logits = (scale * q) @ k.transpose(-1, -2)
    attention = (logits if bias is None else logits + bias[..., None]).softmax(2)
    return attention if mask is None else torch.where(mask[:, None, None], attention, 0)


define(
    FORWARD,
    "(Tensor q, Tensor k, Tensor? v, Tensor? bias, Tensor? mask, float scale, float eps, float token_eps)"
    " -> (Tensor, Tensor)",
)
define(
    BACKWARD,
    "(Tensor grad, Tensor q, Tensor k, Tensor? v, Tensor? bias, Tensor? mask, Tensor out, Tensor total, float scale,"
    " float token_eps, bool need_q, bool need_k, bool need_v, bool need_bias) -> (Tensor, Tensor, Tensor, Tensor)",
)


# --- implementations: csrc registers itself for the CPU when it is loaded; Triton serves CUDA, or our CUDA C++ where it
# is asked for; the reference all else


def _triton() -> ModuleType:
    from setemb_kernels.ops.slot_attention import triton

    return triton


def _cuda() -> ModuleType:
    from setemb_kernels.ops.slot_attention import cuda

    return cuda


BACKENDS = OpBackends(
    "slot_attention", triton=_triton, triton_dtypes=(torch.float32, torch.bfloat16, torch.float16), cuda=_cuda
)


@implement(FORWARD)
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    eps: float,
    token_eps: float,
) -> tuple[Tensor, Tensor]:
    return BACKENDS.implementation(reference, q).forward(q, k, v, bias, mask, scale, eps, token_eps)


@implement(BACKWARD)
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    total: Tensor,
    scale: float,
    token_eps: float,
    need_q: bool,
    need_k: bool,
    need_v: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return BACKENDS.implementation(reference, q).backward(
        grad, q, k, v, bias, mask, out, total, scale, token_eps, need_q, need_k, need_v, need_bias
    )


# --- shapes for tracing


@torch.library.register_fake(FORWARD)
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    scale: float,
    eps: float,
    token_eps: float,
) -> tuple[Tensor, Tensor]:
    total = q.new_empty(q.shape[:3], dtype=reference.accumulate_dtype(q.dtype))
    return empty_like_slots(q, (k if v is None else v).shape[3]), total


@torch.library.register_fake(BACKWARD)
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    bias: Tensor | None,
    mask: Tensor | None,
    out: Tensor,
    total: Tensor,
    scale: float,
    token_eps: float,
    need_q: bool,
    need_k: bool,
    need_v: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        empty_like_slots(q, q.shape[3]) if need_q else q.new_empty(0),
        k.new_empty(k.shape if need_k else 0),
        k.new_empty(v.shape if v is not None and need_v else 0),
        q.new_empty(q.shape[:3] if need_bias else 0),
    )


# --- autograd


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scale, _, ctx.token_eps = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)  # that of total is nothing, and need not be filled with zeros


def _autograd(ctx: Any, grad: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 8
    needs = ctx.needs_input_grad[:4]
    gradients = ops.slot_attention_backward(grad, *ctx.saved_tensors, ctx.scale, ctx.token_eps, *needs)
    return *(g if need else None for g, need in zip(gradients, needs, strict=True)), None, None, None, None


register_autograd(FORWARD, _autograd, setup_context=_setup_context)
forbid_double_backward(BACKWARD)
register_autocast(FORWARD, cast=4)  # q, k, v and bias, as for a matrix product
