"""The last states of a GRU by our node of the graph: those of torch's GRU, and the same gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from setemb.modules import GRUTextEncoder
from setemb.modules.gru import last_states

CASES = {
    "some": [3, 7, 1, 7, 2],
    "all alike": [4, 4, 4],
    "one word": [1, 1],
    "one text": [6],
    "longest first": [9, 5, 1],
}


def by_torch(rnn: nn.GRU, x: Tensor, lengths: Tensor) -> Tensor:
    packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    states: Tensor = rnn(packed)[1]
    return states


def both(rnn: nn.GRU, x: Tensor, lengths: Tensor, upstream: Tensor) -> list[list[Tensor]]:
    results = []
    for function in (last_states, by_torch):
        leaf = x.detach().requires_grad_()
        states = function(rnn, leaf, lengths)
        results.append([states, *torch.autograd.grad(states, [leaf, *rnn.parameters()], upstream.to(states.dtype))])
    return results


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])  # products by torch's own, and by oneDNN
@pytest.mark.parametrize("lengths", CASES.values(), ids=CASES)
def test_states_and_gradients_are_those_of_torch(lengths: list[int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rnn = nn.GRU(5, 8, batch_first=True, bidirectional=True).to(dtype)
    x, upstream = torch.randn(len(lengths), 9, 5, dtype=dtype), torch.randn(2, len(lengths), 8, dtype=dtype)
    ours, theirs = both(rnn, x, torch.tensor(lengths), upstream)
    rtol, atol = (1e-10, 1e-12) if dtype == torch.float64 else (1e-5, 1e-5)
    torch.testing.assert_close(ours, theirs, rtol=rtol, atol=atol)


def test_bfloat16_is_nearer_to_float64_than_torch() -> None:
    torch.manual_seed(0)
    rnn = nn.GRU(30, 64, batch_first=True, bidirectional=True)
    lengths = torch.randint(4, 20, (16,))
    x, upstream = torch.randn(16, 20, 30), torch.randn(2, 16, 64)
    exact = both(rnn.double(), x.double(), lengths, upstream.double())[1]
    rnn.float()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = both(rnn, x, lengths, upstream)
    for mine, other, true in zip(ours, theirs, exact, strict=True):
        error, allowed = ((t.double() - true).norm() / true.norm() for t in (mine, other))
        assert error <= 1.05 * allowed
        assert error < 0.02


@pytest.mark.parametrize("options", [{"num_layers": 2}, {"bias": False}, {"bidirectional": False}], ids=str)
def test_other_gru_are_left_to_torch(options: dict[str, int | bool]) -> None:
    torch.manual_seed(0)
    rnn = nn.GRU(5, 8, batch_first=True, **{"bidirectional": True, **options})  # type: ignore[arg-type]
    x, lengths = torch.randn(3, 4, 5), torch.tensor([2, 4, 1])
    assert torch.equal(last_states(rnn, x, lengths), by_torch(rnn, x, lengths))


def test_words_that_are_padding_change_nothing() -> None:
    torch.manual_seed(0)
    encoder = GRUTextEncoder(20, 8, 5).eval()
    ids, mask = torch.randint(1, 20, (3, 6)), torch.arange(6) < torch.tensor([[6], [2], [4]])
    _, together, _ = encoder(ids, mask)
    for i, length in enumerate((6, 2, 4)):
        _, alone, _ = encoder(ids[i : i + 1, :length], mask[i : i + 1, :length])
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-6)
