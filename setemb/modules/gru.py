"""The last states of a bidirectional GRU over texts of different lengths, on a CPU.

torch walks over the words and multiplies the gradients of each step into those of the weights; and under autocast to
bfloat16 its states are rounded at each word. Here a direction is one node of the graph: the weights' gradients are one
product over all words, products are those of `setemb.modules.linear`, nothing is multiplied by the states that are
still 0, and states are kept in float32. The numbers are the same to rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from setemb.modules.linear import product

_DTYPES = (torch.float32, torch.float64, torch.bfloat16)


@torch.compiler.disable  # a loop over words, as many as the batch has: its compiler would unroll it for each length
def last_states(rnn: nn.GRU, x: Tensor, lengths: Tensor) -> Tensor:
    """``[2, B, hidden]``: the forward state after the last word and the backward state after the first.

    As ``rnn(pack_padded_sequence(x, lengths))[1]``, which is what runs where a GRU is not one bidirectional layer, on
    other devices than a CPU, and under autocast to float16.

    Args:
        rnn: with ``batch_first``.
        x: ``[B, T, features]``.
        lengths: int64 ``[B]`` on the CPU, each at least 1; the words of a text come first.
    """
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
    plain = rnn.bidirectional and rnn.num_layers == 1 and rnn.bias and not rnn.proj_size
    if not plain or x.device.type != "cpu" or dtype not in _DTYPES or len(x) == 0:
        states: Tensor = rnn(packed)[1]
        return states
    words, counts = packed.data.to(dtype), packed.batch_sizes.tolist()
    lengths = lengths[packed.sorted_indices]
    result = []
    for suffix in ("", "_reverse"):
        weights = [getattr(rnn, f"{name}_l0{suffix}") for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
        own = words[_reversed_order(counts, lengths)] if suffix else words
        state: Tensor = _LastState.apply(own, counts, *(weight.to(dtype) for weight in weights))
        result.append(state[packed.unsorted_indices])
    return torch.stack(result)


def _reversed_order(counts: Sequence[int], lengths: Tensor) -> Tensor:
    """For each word of packed texts, the row of the one as far from the end of its text."""
    sizes = torch.tensor(counts)
    starts = sizes.cumsum(0) - sizes
    position = torch.arange(len(counts)).repeat_interleave(sizes)
    text = torch.arange(len(position)) - starts[position]
    return starts[lengths[text] - 1 - position] + text


class _LastState(torch.autograd.Function):
    r"""State ``[B, H]`` after the last of the words ``[n, features]``, of which the first ``counts[0]`` are the texts'
    first words, the next ``counts[1]`` the second, of texts in the order of falling lengths.

    .. math::
        r, z &= \sigma(W x + b + W' h + b'), \quad m = W'_n h + b'_n, \quad n = \tanh(W_n x + b_n + r m) \\
        h' &= n + z (h - n)

    Backward, with g the gradient of h': ``dn = g (1 - z)(1 - n^2)``, ``dz = g (h - n) z (1 - z)``,
    ``dr = dn m r (1 - r)``; the gradient of h is ``z g + W'^T (dr, dz, r dn)``.
    """

    @staticmethod
    def forward(
        ctx: Any, words: Tensor, counts: list[int], w_ih: Tensor, w_hh: Tensor, b_ih: Tensor, b_hh: Tensor
    ) -> Tensor:
        gates = product(words, w_ih, b_ih)  # [n, 3 H], word by word becomes (r, z, n)
        H = w_hh.shape[1]
        by_state = gates.new_empty(len(words), H)  # m
        before = gates.new_empty(len(words), H)  # h
        state = torch.zeros(counts[0], H, dtype=_state_dtype(gates), device=gates.device)
        end = 0
        for i, count in enumerate(counts):
            start, end = end, end + count
            gate, m, h = gates[start:end], by_state[start:end], state[:count]
            before[start:end] = h
            hidden = product(before[start:end], w_hh, b_hh) if i else b_hh.expand(count, -1)
            m.copy_(hidden[:, 2 * H :])
            gate[:, : 2 * H].add_(hidden[:, : 2 * H]).sigmoid_()
            r, z, n = gate.chunk(3, 1)
            n.addcmul_(r, m).tanh_()
            h.sub_(n).mul_(z).add_(n)
        ctx.counts = counts
        ctx.save_for_backward(words, w_ih, w_hh, gates, by_state, before)
        return state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        words, w_ih, w_hh, gates, by_state, before = ctx.saved_tensors
        counts, H = ctx.counts, w_hh.shape[1]
        made = torch.empty_like(gates)  # (dr, dz, r dn)
        by_word = torch.empty_like(by_state)  # dn
        upstream = grad.clone()
        end = len(words)
        for i in range(len(counts) - 1, -1, -1):
            start = end - counts[i]
            here, g = slice(start, end), upstream[: counts[i]]
            r, z, n = gates[here].chunk(3, 1)
            dr, dz, r_dn = made[here].chunk(3, 1)
            kept = g * z
            by_n = (g - kept).mul_(1 - n.square())
            dz.copy_((before[here] - n).mul_(kept).mul_(1 - z))
            by_word[here] = by_n
            by_n.mul_(r)
            r_dn.copy_(by_n)
            dr.copy_(by_n.mul_(by_state[here]).mul_(1 - r))
            if i:  # the state before the first word is a constant
                kept += product(made[here], w_hh.mT, None)
                g.copy_(kept)
            end = start
        by_w_hh = product(made[counts[0] :].mT, before[counts[0] :].mT, None)
        by_b_hh = made.sum(0)
        made[:, 2 * H :] = by_word
        by_words = product(made, w_ih.mT, None) if ctx.needs_input_grad[0] else None
        return by_words, None, product(made.mT, words.mT, None), by_w_hh, made.sum(0), by_b_hh


def _state_dtype(gates: Tensor) -> torch.dtype:
    return torch.float32 if gates.dtype == torch.bfloat16 else gates.dtype
