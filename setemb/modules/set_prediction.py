"""The set prediction module: K slots gather an item's local features into K embeddings.

Source: Kim, Kim, Kwak, "Improving Cross-Modal Retrieval with Set of Diverse Embeddings", CVPR 2023, section 3.2.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from setemb.modules.dropout import Dropout
from setemb.modules.linear import Linear, linear_after
from setemb.modules.slot_attention import Tokens, attend, attend_merged, check_tokens, merge, read_tokens

EPS = 1e-7
"""Added to the sum over tokens that normalises an attention row: a slot that no token chose gathers 0, not NaN."""


class SetOutput(NamedTuple):
    """The set of embeddings of each item of a batch."""

    embeddings: Tensor
    """``[B, K, dim]``, unit norm."""
    slots: Tensor
    """``[B, K, dim]``, the slots before the global vector is added; the diversity loss is taken over them."""
    attention: Tensor | None = None
    """``[B, heads, K, T]``, what each token gave each slot in the last iteration (sums to 1 over K, masked: 0)."""


class SlotCrossAttention(nn.Module):
    """Multi-head slot attention of slots to tokens: projections around `setemb_kernels.slot_attention`."""

    def __init__(self, dim: int, dim_context: int, heads: int, dim_head: int) -> None:
        super().__init__()
        inner = heads * dim_head
        self.heads = heads
        self.to_q = Linear(dim, inner, bias=False)
        self.to_k = Linear(dim_context, inner, bias=False)
        self.to_v = Linear(dim_context, inner, bias=False)
        self.to_out = Linear(inner, dim)

    def read_tokens(
        self, keys: Tensor, values: Tensor, *, slots: int, iterations: int, mask: Tensor | None, absorbed: bool | None
    ) -> Tokens:
        """What each call of `forward` reads of tokens ``[B, T, dim_context]``."""
        tokens = read_tokens(
            keys,
            values,
            self.to_k,
            self.to_v,
            slots=slots,
            heads=self.heads,
            iterations=iterations,
            mask=mask,
            absorbed=absorbed,
        )
        if not tokens.absorbed:
            return tokens
        rows = len(keys) * slots * iterations
        return tokens._replace(merged=merge(self.to_q, self.to_k, self.to_v, self.to_out, self.heads, rows))

    def forward(
        self, norm: nn.Module, slots: Tensor, tokens: Tokens, return_attention: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """The update ``[B, K, dim]`` by queries ``to_q(norm(slots))`` of slots ``[B or 1, K, dim]``; the attention
        ``[B, heads, K, T]`` if asked for."""
        if tokens.merged is not None and not return_attention:
            scale = (self.to_q.out_features // self.heads) ** -0.5
            bias = self.to_out.bias
            return attend_merged(norm, slots, tokens, bias, heads=self.heads, scale=scale, eps=EPS), None
        q = linear_after(norm, slots, self.to_q)
        gathered, attention = attend(
            q,
            tokens,
            self.to_k,
            self.to_v,
            heads=self.heads,
            eps=EPS,
            return_attention=return_attention,
        )
        return self.to_out(gathered), attention


class SetPrediction(nn.Module):
    """K embeddings of an item from its local features and its global vector.

    K learnt slots x, shared by all items, are refined ``iterations`` times by one attention and one feed-forward
    network, which all iterations share::

        x = x + Attention(LN(x), LN(local))
        x = x + FFN(LN(x))                          dim -> 4 dim -> dim, exact GELU, dropout
        slots = LN(x)
        embeddings = unit(LN(global) + slots)

    A masked token contributes nothing, whatever it holds. An item without a valid token gathers 0: its slots follow
    from their own path and the attention's output bias alone.

    Args:
        dim_local: features of a local token.
        dim_global: features of the global vector; a linear projection is added where it is not ``dim``.
        dim: features of an embedding.
        num_slots: K.
        iterations: T, how often the slots are refined.
        heads, dim_head: of the attention; the published module has 4 heads of 512.
        dropout: in the feed-forward network.
        position: "sine" adds a sine position encoding to what the keys (not the values) are made of; for text.
        padding: "exact", or "dive" to reproduce the published code: there a masked token has weight 1/K in every slot
            and positions are spread over the padded length, so that an embedding depends on what else is in its batch.
        absorbed: whether the projections of keys and values are absorbed into the slots (see `slot_attention`); None
            counts operations and takes the cheaper way. The numbers are the same.
    """

    def __init__(
        self,
        dim_local: int,
        dim_global: int,
        dim: int,
        num_slots: int = 4,
        iterations: int = 4,
        heads: int = 4,
        dim_head: int = 64,
        dropout: float = 0.1,
        position: Literal["sine"] | None = None,
        padding: Literal["exact", "dive"] = "exact",
        absorbed: bool | None = None,
    ) -> None:
        super().__init__()
        sizes = {
            "dim_local": dim_local,
            "dim_global": dim_global,
            "dim": dim,
            "num_slots": num_slots,
            "iterations": iterations,
        }
        for name, value in {**sizes, "heads": heads, "dim_head": dim_head}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if position not in (None, "sine"):
            raise ValueError(f'position must be None or "sine", got {position!r}')
        if padding not in ("exact", "dive"):
            raise ValueError(f'padding must be "exact" or "dive", got {padding!r}')
        self.dim_local, self.dim_global = dim_local, dim_global
        self.iterations, self.position, self.padding = iterations, position, padding
        self.absorbed = absorbed
        self.slots = nn.Parameter(torch.randn(num_slots, dim))
        self.norm_slots = nn.LayerNorm(dim)
        self.norm_local = nn.LayerNorm(dim_local)
        self.attention = SlotCrossAttention(dim, dim_local, heads, dim_head)
        self.norm_feedforward = nn.LayerNorm(dim)
        self.feedforward = nn.Sequential(Linear(dim, 4 * dim), nn.GELU(), Dropout(dropout), Linear(4 * dim, dim))
        self.norm_last = nn.LayerNorm(dim)
        self.project_global = nn.Identity() if dim_global == dim else Linear(dim_global, dim)
        self.norm_global = nn.LayerNorm(dim)

    def forward(
        self, local: Tensor, global_: Tensor, mask: Tensor | None = None, return_attention: bool = False
    ) -> SetOutput:
        """Embeds a batch.

        Args:
            local: ``[B, T, dim_local]`` local features.
            global_: ``[B, dim_global]`` global vectors.
            mask: bool ``[B, T]``, True = valid, or None where all are.
            return_attention: also return the attention of the last iteration.

        Raises:
            ValueError, TypeError: naming the argument, what came and what was expected.
        """
        self._check(local, global_, mask)
        exact = self.padding == "exact"
        if mask is not None and exact:
            local = torch.where(mask[..., None], local, 0)  # 0 * NaN would be NaN
        context = self.norm_local(local)
        key_context = context
        if self.position == "sine":
            key_context = context + self._positions(context, mask)
        if mask is not None and not exact:  # equal logits for all slots: weight 1/K in each
            key_context, mask = torch.where(mask[..., None], key_context, 0), None
        tokens = self.attention.read_tokens(
            key_context, context, slots=len(self.slots), iterations=self.iterations, mask=mask, absorbed=self.absorbed
        )
        x = self.slots[None]  # one for all items until they differ
        attention = None
        for i in range(self.iterations):
            last = i == self.iterations - 1
            update, attention = self.attention(self.norm_slots, x, tokens, return_attention and last)
            x = x + update
            hidden = linear_after(self.norm_feedforward, x, self.feedforward[0])
            x = x + linear_after(self.feedforward[1:-1], hidden, self.feedforward[-1])
        slots = self.norm_last(x)
        out = self.norm_global(self.project_global(global_))[:, None] + slots
        return SetOutput(functional.normalize(out, dim=-1), slots, attention)

    def _positions(self, context: Tensor, mask: Tensor | None) -> Tensor:
        """``[B or 1, T, dim_local]``; position t of n is the angle ``2 pi t / n``, t = 1..n."""
        index = torch.arange(1, context.shape[1] + 1, device=context.device, dtype=context.dtype)[None]
        length = index.new_tensor(float(context.shape[1]))
        if mask is not None and self.padding == "exact":
            index = mask.to(context.dtype).cumsum(1)  # the item's own length, so that padding changes nothing
            length = index[:, -1:]
        angle = 2 * math.pi * index / (length + 1e-6)
        return sine_encoding(angle, context.shape[2])

    def _check(self, local: Tensor, global_: Tensor, mask: Tensor | None) -> None:
        check_tokens("local", local, self.dim_local, mask)
        if global_.shape != (local.shape[0], self.dim_global):
            raise ValueError(
                f"global_ must have shape [{local.shape[0]}, {self.dim_global}], got {list(global_.shape)}"
            )


def sine_encoding(position: Tensor, dim: int) -> Tensor:
    """``[..., T]`` -> ``[..., T, dim]``: sine (even i) or cosine (odd) of ``position / 10000^(2 floor(i/2) / dim)``."""
    i = torch.arange(dim, device=position.device)
    frequency = 10000.0 ** (-2 * (i // 2) / dim)
    angle = position[..., None] * frequency.to(position.dtype)
    return torch.where(i % 2 == 0, angle.sin(), angle.cos())
