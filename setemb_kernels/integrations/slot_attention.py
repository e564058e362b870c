"""The attention step of the package `slot-attention` by `setemb_kernels.slot_attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from setemb_kernels.integrations._patch import Patch, package
from setemb_kernels.ops.slot_attention.op import slot_attention

Function = Callable[..., Any]


def patch_slot_attention() -> Patch:
    """Replace, in the package `slot-attention` (1.5), the forward of ``SlotAttention`` and ``MultiHeadSlotAttention``,
    and so of the wrappers round them, and of ``WeightedAttention`` where its softmax is over the slots.

    Parameters, random numbers, values and gradients are the package's; the attention ``[B, H, K, T]`` is never stored.
    `setemb.modules.SlotAttention` loads the same state dict, is faster still, and takes masks.

    Returns:
        A `Patch`: ``replaced`` lists what was, ``undo()`` and the end of a ``with`` block put it back.

    Raises:
        ImportError: no such package, or one without these modules.
    """
    package(
        "slot_attention",
        "slot-attention >= 1.5",
        "slot_attention.multi_head_slot_attention",
        "slot_attention.slot_attention_experimental",
    )
    from slot_attention import MultiHeadSlotAttention, SlotAttention
    from slot_attention.slot_attention_experimental import WeightedAttention

    patch = Patch("slot_attention")
    patch.method(SlotAttention, "forward", forward)
    patch.method(MultiHeadSlotAttention, "forward", forward)
    patch.method(WeightedAttention, "forward", weighted_forward)
    return patch


def forward(own: Function, self: Any, inputs: Tensor, num_slots: int | None = None) -> Tensor:
    """Tokens ``[B, T, D]`` to slots ``[B, K, D]``."""
    shape = (len(inputs), self.num_slots if num_slots is None else num_slots, inputs.shape[2])
    noise = torch.randn(shape, device=inputs.device, dtype=inputs.dtype)
    slots = self.slots_mu + self.slots_logsigma.exp() * noise
    split, merge = getattr(self, "split_heads", _one_head), getattr(self, "merge_heads", _no_heads)
    combine = getattr(self, "combine_heads", None)
    tokens = self.norm_input(inputs)
    keys, values = split(self.to_k(tokens)), split(self.to_v(tokens))
    for _ in range(self.iters):
        queries = split(self.to_q(self.norm_slots(slots)))
        updates = merge(slot_attention(queries, keys, values, scale=self.scale, eps=0.0, token_eps=self.eps))
        if combine is not None:
            updates = combine(updates)
        slots = self.gru(updates.flatten(0, 1), slots.flatten(0, 1)).view(shape)
        slots = slots + self.mlp(self.norm_pre_ff(slots))
    return slots


def weighted_forward(own: Function, self: Any, inputs: Tensor, context: Tensor) -> Tensor:
    """Slots ``[B, K, D]`` that gather from tokens ``[B, T, D]``; the other way round is the package's own."""
    if (self.softmax_dim, self.weighted_mean_dim) != (1, 2):
        result: Tensor = own(self, inputs, context)
        return result
    context = self.norm_context(context)
    q, k, v = self.to_q(self.norm_input(inputs)), self.to_k(context), self.to_v(context)
    return slot_attention(q[:, None], k[:, None], v[:, None], scale=self.scale, eps=0.0, token_eps=self.eps)[:, 0]


def _one_head(vectors: Tensor) -> Tensor:
    return vectors[:, None]


def _no_heads(vectors: Tensor) -> Tensor:
    return vectors[:, 0]
