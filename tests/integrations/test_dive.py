"""Similarities under the names of published code: against their formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from setemb_kernels.integrations.dive import MPsimilarity, SetwiseSimilarity
from tests.integrations.same import EXACT, sets, with_gradients

K, L, T, DENOMINATOR = 4, 3, 16.0, 1.7


def of_both(c: Tensor, over_l: Tensor, over_k: Tensor) -> Tensor:
    """``[N, M, K]`` and ``[N, M, L]`` as the published code joins them."""
    return (over_l.sum(-1) / K + over_k.sum(-1) / L) / DENOMINATOR


FORMULAS = {
    "smooth_chamfer_similarity": lambda c: of_both(c, (T * c).logsumexp(3) / T, (T * c).logsumexp(2) / T),
    "chamfer_similarity": lambda c: of_both(c, c.max(3).values, c.max(2).values),
    "max_similarity": lambda c: c.flatten(2).max(2).values,
    "avg_similarity": lambda c: torch.sigmoid(2.0 * c - 0.5).mean((2, 3)),
}


@pytest.mark.parametrize("rows", [False, True], ids=["sets", "vectors in a row, as published"])
@pytest.mark.parametrize("name", FORMULAS)
def test_similarities(name: str, rows: bool) -> None:
    module = SetwiseSimilarity(K, L, DENOMINATOR, temperature=T).double()
    with torch.no_grad():
        module.mp_dist.alpha.fill_(2.0), module.mp_dist.beta.fill_(-0.5)
    x, y = sets(5, K, seed=1), sets(6, L, seed=2)
    theirs = with_gradients(lambda x, y: FORMULAS[name](torch.einsum("nkd,mld->nmkl", x, y)), x, y)
    given = (x.flatten(0, 1), y.flatten(0, 1)) if rows else (x, y)
    s, *gradients = with_gradients(getattr(module, name), *given)
    torch.testing.assert_close(s, theirs[0], **EXACT)
    for ours, their in zip(gradients, theirs[1:], strict=True):
        torch.testing.assert_close(ours.view_as(their), their, **EXACT)


def test_match_probability_learns() -> None:
    pool = nn.AvgPool2d((K, L))
    module = MPsimilarity(pool).double()
    x, y = sets(5 * K, 1, seed=1)[:, 0], sets(6 * L, 1, seed=2)[:, 0]
    ours = torch.autograd.grad(module(x, y).square().sum(), list(module.parameters()))
    published = pool(torch.sigmoid(module.alpha * (x @ y.T)[None] + module.beta))[0]
    theirs = torch.autograd.grad(published.square().sum(), list(module.parameters()))
    torch.testing.assert_close(ours, theirs, **EXACT)
    assert MPsimilarity()(sets(2, 3), sets(4, 5)).shape == (2, 4)


def test_what_does_not_fit_is_said() -> None:
    module = SetwiseSimilarity(K, L, 2)
    with pytest.raises(ValueError, match=r"txt_embs: expected sets of 3 vectors, got \[2, 5, 16\]"):
        module.max_similarity(sets(2, K), sets(2, 5))
    with pytest.raises(ValueError, match=r"img_embs: expected \[sets, vectors, features\] or rows of sets of 4"):
        module.max_similarity(sets(5, 1)[:, 0], sets(2, L))
    with pytest.raises(ValueError, match=r"rows of sets, got|got \[5, 16\]"):
        MPsimilarity()(sets(5, 1)[:, 0], sets(2, L))
