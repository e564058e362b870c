"""Slot attention over projected tokens, and the classic module built on it.

Keys and values are projections of the tokens that every iteration reads again. There are two ways to the same numbers:

- *projected*: ``k = W_k x`` and ``v = W_v x`` are made once, for every token and head;
- *absorbed*: ``q . W_k x = (W_k^T q) . x`` and ``sum_t w_t W_v x_t = W_v (sum_t w_t x_t)``, so the tokens themselves
  serve as keys and values, one head for all, and the projections move to the few slots. Keys and values never exist.

`absorbs` counts the operations of both. Where tokens are much narrower than the projections, a third way takes fewer
(`merges`): with slots z, ``q . W_k x = (W_k^T W_q z) . x`` and ``W_o W_v`` are products of weights alone, one matrix a
head each, made once for all items and iterations.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from setemb.modules.linear import (
    Linear,
    is_plain,
    linear,
    linear_after_attention,
    linear_by_head,
    linear_by_head_after,
    product_after,
)
from setemb_kernels import slot_attention


class Tokens(NamedTuple):
    """What the iterations read: once a forward pass, see `read_tokens`."""

    keys: Tensor
    """``[B, heads, T, dim_head]``, or absorbed ``[B, 1, T, dim_context]``."""
    values: Tensor | None
    """None where the keys are the values."""
    mask: Tensor | None
    """bool ``[B, T]``, True = valid."""
    absorbed: bool
    merged: Merged | None = None


class Merged(NamedTuple):
    """Products of the weights before and after absorbed attention."""

    queries: Tensor
    """``W_k^T W_q`` of each head, ``[heads x dim_context, dim]``."""
    updates: Tensor
    """``W_o W_v`` of each head, ``[dim, heads x dim_context]``."""


def absorbs(slots: int, heads: int, tokens: int, dim_context: int, dim_head: int, iterations: int) -> bool:
    """Whether absorbed projections take fewer multiplications for one item than projected tokens."""
    inner = heads * dim_head
    projected = 2 * tokens * dim_context * inner + iterations * 2 * slots * tokens * inner
    absorbed = iterations * (2 * slots * inner * dim_context + 2 * heads * slots * tokens * dim_context)
    return absorbed < projected


def read_tokens(
    key_context: Tensor,
    value_context: Tensor,
    to_k: nn.Linear,
    to_v: nn.Linear,
    *,
    slots: int,
    heads: int,
    iterations: int,
    mask: Tensor | None,
    absorbed: bool | None = None,
) -> Tokens:
    """Tokens ``[B, T, dim_context]`` as the iterations want them; the cheaper way unless `absorbed` says which."""
    dim_head = to_k.out_features // heads
    if absorbed is None:
        absorbed = absorbs(slots, heads, key_context.shape[1], to_k.in_features, dim_head, iterations)
    if not absorbed:
        keys, values = (
            project(context).unflatten(-1, (heads, dim_head)).transpose(1, 2)
            for project, context in ((to_k, key_context), (to_v, value_context))
        )
        return Tokens(keys, values, mask, absorbed=False)
    contexts = [key_context] if value_context is key_context else [key_context, value_context]
    device = key_context.device.type
    if torch.is_autocast_enabled(device) and key_context.dtype != torch.float64:  # once, not at each iteration
        contexts = [context.to(torch.get_autocast_dtype(device)) for context in contexts]
    keys, *values = (context[:, None] for context in contexts)
    return Tokens(keys, values[0] if values else None, mask, absorbed=True)


def attend(
    q: Tensor,
    tokens: Tokens,
    to_k: nn.Linear,
    to_v: nn.Linear,
    *,
    heads: int,
    eps: float,
    token_eps: float = 0.0,
    return_attention: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One step: queries ``[B, K, inner]`` -> what the slots gather, likewise; and the attention ``[B, heads, K, T]`` if
    asked for. One item of queries may serve all items of tokens.

    The projections may have a bias where ``eps`` is 0 (the weights of a slot then sum to 1, so that its values' bias is
    added once).
    """
    B, (items, K, inner) = len(tokens.keys), q.shape
    scale = (inner // heads) ** -0.5
    q = q.unflatten(-1, (heads, -1))  # [B or 1, K, heads, dim_head]

    def step(
        q: Tensor,
        keys: Tensor,
        values: Tensor | None,
        bias: Tensor | None,
        mask: Tensor | None,
        attention: bool = False,
    ) -> Any:
        return slot_attention(
            q.expand(B, -1, -1, -1),
            keys,
            values,
            bias=bias,
            mask=mask,
            scale=scale,
            eps=eps,
            token_eps=token_eps,
            return_attention=attention,
        )

    if not tokens.absorbed:
        result = step(q.transpose(1, 2), tokens.keys, tokens.values, None, tokens.mask, return_attention)
        update, attention = result if return_attention else (result, None)
        return update.transpose(1, 2).flatten(2), attention

    bias = None
    if to_k.bias is not None:
        bias = scale * torch.einsum("bkhd,hd->bhk", q, to_k.bias.unflatten(0, (heads, -1)))
        bias = bias.expand(B, -1, -1)
    by_head = linear_by_head(q.flatten(0, 1).transpose(0, 1), to_k.weight.unflatten(0, (heads, -1)).mT)
    q = by_head.unflatten(1, (items, K)).transpose(0, 1)  # [B or 1, heads, K, dim_context], heads first
    inputs = (q, tokens.keys, tokens.values, bias, tokens.mask)
    weight = to_v.weight.unflatten(0, (heads, -1))
    attention = None
    if return_attention:
        update, attention = step(*inputs, attention=True)
        by_head = linear_by_head(update.transpose(0, 1).flatten(1, 2), weight)
    else:  # updates are as large as the queries, and made by one pass over the tokens
        by_head = linear_by_head_after(lambda *i: step(*i).transpose(0, 1).flatten(1, 2), inputs, weight)
    gathered = by_head.unflatten(1, (B, K)).permute(1, 2, 0, 3).flatten(2)
    if to_v.bias is not None:
        value_bias = to_v.bias.to(gathered.dtype)
        if tokens.mask is not None:  # an item without tokens gathers nothing
            value_bias = value_bias * tokens.mask.any(1)[:, None, None]
        gathered = gathered + value_bias
    return gathered, attention


def merges(rows: int, heads: int, dim: int, dim_context: int, dim_head: int) -> bool:
    """Whether merged weights take fewer multiplications for so many slots, of all items and iterations together."""
    inner = heads * dim_head
    return inner * dim * dim_context + rows * dim * heads * dim_context < rows * inner * (dim + dim_context)


def merge(to_q: nn.Linear, to_k: nn.Linear, to_v: nn.Linear, to_out: nn.Linear, heads: int, rows: int) -> Merged | None:
    """The products of weights, where they pay and nothing else happens in these layers; of them only ``to_out`` may
    have a bias."""
    layers = (to_q, to_k, to_v, to_out)
    dim, dim_context = to_q.in_features, to_k.in_features
    if not merges(rows, heads, dim, dim_context, to_k.out_features // heads) or not all(map(is_plain, layers)):
        return None
    q, k, v = (layer.weight.unflatten(0, (heads, -1)) for layer in (to_q, to_k, to_v))  # [heads, dim_head, ...]
    out = to_out.weight.unflatten(1, (heads, -1)).transpose(0, 1)  # [heads, dim, dim_head]
    return Merged((k.mT @ q).flatten(0, 1), (out @ v).transpose(0, 1).flatten(1))


def attend_merged(
    norm: nn.Module, slots: Tensor, tokens: Tokens, bias: Tensor | None, *, heads: int, scale: float, eps: float
) -> Tensor:
    """``to_out`` of what the slots ``[B or 1, K, dim]`` gather, ``[B, K, dim]``; their queries are made of
    ``norm(slots)``."""
    assert tokens.merged is not None
    q = product_after(norm, slots, tokens.merged.queries, None).unflatten(-1, (heads, -1)).transpose(1, 2)

    def gathered(q: Tensor, keys: Tensor, values: Tensor | None, mask: Tensor | None) -> Tensor:
        q = q.expand(len(keys), -1, -1, -1)
        update: Tensor = slot_attention(q, keys, values, mask=mask, scale=scale, eps=eps)
        return update.transpose(1, 2).flatten(2)

    return linear_after_attention(gathered, (q, tokens.keys, tokens.values, tokens.mask), tokens.merged.updates, bias)


class SlotAttention(nn.Module):
    """Slot attention as first published: slots drawn from a learnt Gaussian, updated by a GRU and a residual MLP.

    ``slots = mu + exp(logsigma) noise``, then ``iterations`` times::

        weights = softmax over slots of to_q(LN(slots)) . to_k(LN(inputs)) / sqrt(dim)
        updates = mean over tokens of to_v(LN(inputs)), weighted
        slots = GRU(updates, slots)
        slots = slots + MLP(LN(slots))

    Parameters have the names of the package ``slot-attention`` (1.5.2), whose state dicts load, and draw the same noise
    from the same seed.

    Args:
        num_slots: K.
        dim: features of tokens and slots.
        iterations: how often the slots are refined.
        eps: added to each token's weight in a slot before weights are normalised over tokens.
        hidden_dim: of the MLP; at least ``dim`` is taken.

    Source: Locatello et al., "Object-Centric Learning with Slot Attention", NeurIPS 2020.
    """

    def __init__(self, num_slots: int, dim: int, iterations: int = 3, eps: float = 1e-8, hidden_dim: int = 128) -> None:
        super().__init__()
        for name, value in {"num_slots": num_slots, "dim": dim, "iterations": iterations}.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        hidden_dim = max(dim, hidden_dim)
        self.num_slots, self.dim, self.iterations, self.eps = num_slots, dim, iterations, eps
        self.slots_mu = nn.Parameter(torch.randn(1, 1, dim))
        self.slots_logsigma = nn.Parameter(nn.init.xavier_uniform_(torch.zeros(1, 1, dim)))
        self.to_q, self.to_k, self.to_v = (Linear(dim, dim) for _ in range(3))
        self.gru = nn.GRUCell(dim, dim)
        self.mlp = nn.Sequential(Linear(dim, hidden_dim), nn.ReLU(), Linear(hidden_dim, dim))
        self.norm_input, self.norm_slots, self.norm_pre_ff = (nn.LayerNorm(dim) for _ in range(3))

    def forward(
        self,
        inputs: Tensor,
        num_slots: int | None = None,
        *,
        mask: Tensor | None = None,
        return_attention: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Slots ``[B, K, dim]`` of tokens ``[B, T, dim]``.

        Args:
            inputs: ``[B, T, dim]``.
            num_slots: K for this call, where it is another.
            mask: bool ``[B, T]``, True = valid; a token that is not contributes nothing, whatever it holds.
            return_attention: also return the last iteration's softmax over slots, ``[B, K, T]``.

        Raises:
            ValueError, TypeError: naming the argument, what came and what was expected.
        """
        check_tokens("inputs", inputs, self.dim, mask)
        slots = self._initial(len(inputs), self.num_slots if num_slots is None else num_slots, inputs)
        if mask is not None:
            inputs = torch.where(mask[..., None], inputs, 0)
        context = self.norm_input(inputs)
        tokens = read_tokens(
            context,
            context,
            self.to_k,
            self.to_v,
            slots=slots.shape[1],
            heads=1,
            iterations=self.iterations,
            mask=mask,
        )
        attention = None
        for i in range(self.iterations):
            updates, attention = attend(
                self.to_q(self.norm_slots(slots)),
                tokens,
                self.to_k,
                self.to_v,
                heads=1,
                eps=0.0,
                token_eps=self.eps,
                return_attention=return_attention and i == self.iterations - 1,
            )
            slots = gru_cell(self.gru, updates, slots)
            slots = slots + self.mlp(self.norm_pre_ff(slots))
        return (slots, attention[:, 0]) if attention is not None else slots

    def _initial(self, items: int, num_slots: int, like: Tensor) -> Tensor:
        if num_slots < 1:
            raise ValueError(f"num_slots must be at least 1, got {num_slots}")
        mu = self.slots_mu.expand(items, num_slots, -1)
        noise = torch.randn(mu.shape, device=like.device, dtype=like.dtype)
        return mu + self.slots_logsigma.exp() * noise


def gru_cell(cell: nn.GRUCell, x: Tensor, h: Tensor) -> Tensor:
    """``cell(x, h)`` for ``[..., features]``, on a CPU with its products by `linear`."""
    if x.device.type != "cpu":
        return cell(x.flatten(0, -2), h.flatten(0, -2)).unflatten(0, h.shape[:-1])
    by_x, by_h = linear(x, cell.weight_ih, cell.bias_ih), linear(h, cell.weight_hh, cell.bias_hh)
    (x_reset, x_update, x_new), (h_reset, h_update, h_new) = by_x.chunk(3, -1), by_h.chunk(3, -1)
    reset, update = (x_reset + h_reset).sigmoid(), (x_update + h_update).sigmoid()
    new = (x_new + reset * h_new).tanh()
    return new + update * (h - new)


def check_tokens(name: str, tokens: Tensor, features: int, mask: Tensor | None) -> None:
    """Tokens are ``[B, T, features]``, their mask None or bool ``[B, T]``."""
    if tokens.ndim != 3 or tokens.shape[2] != features:
        raise ValueError(f"{name} must have shape [B, T, {features}], got {list(tokens.shape)}")
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be of bool (True = valid), got {mask.dtype}")
    if mask.shape != tokens.shape[:2]:
        raise ValueError(f"mask must have shape {list(tokens.shape[:2])}, got {list(mask.shape)}")
