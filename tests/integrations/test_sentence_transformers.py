"""sentence-transformers with MaxSim replaced: its own results and gradients, its losses, and back again."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from setemb_kernels.integrations import patch_sentence_transformers
from tests.integrations.same import Calls, flags, sets, with_gradients

pytest.importorskip("sentence_transformers.multi_vector_encoder.losses", reason="sentence-transformers 6 is not there")

from sentence_transformers import util
from sentence_transformers.multi_vector_encoder import losses, scoring

CLOSE = {"rtol": 1e-6, "atol": 1e-6}
"""Maxima are float32 there, whatever the inputs."""


def same(function: Callable[..., Tensor], *inputs: Tensor, **options: Any) -> None:
    theirs = with_gradients(function, *inputs, **options)
    with patch_sentence_transformers(), Calls() as calls:
        ours = with_gradients(function, *inputs, **options)
    assert calls.count
    torch.testing.assert_close(ours, theirs, **CLOSE)


MASKS: dict[str, Callable[[Tensor], Tensor | None]] = {
    "none": lambda mask: None,
    "bool": lambda mask: mask,
    "floats": lambda mask: mask.double(),
    "weights": lambda mask: mask * torch.linspace(0.5, 2, mask.numel(), dtype=torch.float64).view_as(mask),
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["maxsim", "mean_maxsim"])
def test_all_pairs(name: str, mask: str) -> None:
    q, d = sets(5, 6, seed=1), sets(7, 9, seed=2)
    masks = {"a_mask": MASKS[mask](flags(5, 6)), "b_mask": MASKS[mask](flags(7, 9))}
    same(getattr(util, name), q, d, **masks)
    same(getattr(util, name), q, d, chunk_elements=500, **masks)  # many chunks


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["maxsim_pairwise", "mean_maxsim_pairwise"])
def test_pairs(name: str, mask: str) -> None:
    masks = {"a_mask": MASKS[mask](flags(5, 6)), "b_mask": MASKS[mask](flags(5, 9))}
    same(getattr(util, name), sets(5, 6, seed=1), sets(5, 9, seed=2), **masks)


def test_zero_rows_are_padding() -> None:
    q, d = sets(5, 6, seed=1) * flags(5, 6)[..., None], sets(7, 9, seed=2) * flags(7, 9)[..., None]
    same(util.maxsim, q, d)


def test_lists_arrays_and_single_sets() -> None:
    q = [sets(1, k, seed=k, dtype=torch.float32)[0] for k in (3, 1, 5)]
    d = [sets(1, k, seed=9 + k, dtype=torch.float32)[0] for k in (4, 7, 2)]
    for form in (list, lambda side: [v.numpy() for v in side], lambda side: side[0], lambda side: side[0].numpy()):
        for function in (util.maxsim, util.maxsim_pairwise):
            theirs = function(form(q), form(d))
            with patch_sentence_transformers():
                torch.testing.assert_close(function(form(q), form(d)), theirs)


def test_documents_without_tokens_rank_last() -> None:
    q, d = sets(3, 4, seed=1), sets(4, 5, seed=2)
    mask = flags(4, 5)
    mask[2] = False
    theirs, in_pairs = util.maxsim(q, d, b_mask=mask), util.maxsim_pairwise(q, d[1:], b_mask=mask[1:])
    with patch_sentence_transformers():
        ours = util.maxsim(q, d, b_mask=mask)
        assert (ours[:, 2] == -1e9).all()
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(util.maxsim_pairwise(q, d[1:], b_mask=mask[1:]), in_pairs)
        nothing = [v[:0] for v in d]
        assert (util.maxsim(list(q), nothing) == -1e9).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_is_nearer_to_the_truth(dtype: torch.dtype) -> None:
    q, d = sets(5, 32, 64, seed=1, dtype=dtype), sets(7, 50, 64, seed=2, dtype=dtype)
    truth = util.maxsim(q.double(), d.double())
    theirs = util.maxsim(q, d)
    with patch_sentence_transformers():
        ours = util.maxsim(q, d)
    assert ours.dtype == theirs.dtype == torch.float32
    assert (ours - truth).abs().max() < (theirs - truth).abs().max()


def test_scores_of_groups_and_of_own_documents() -> None:
    q, d = sets(4, 6, seed=1), sets(12, 9, seed=2).view(4, 3, 9, 16)
    masks = {"queries_mask": flags(4, 6), "documents_mask": flags(4, 3, 9)}
    for name in ("colbert_scores", "colbert_kd_scores", "mean_colbert_scores", "mean_colbert_kd_scores"):
        same(getattr(scoring, name), q, d, **masks)
    same(scoring.colbert_scores_pairwise, q, d[:, 0])


class Model(nn.Module):
    """What a loss needs of a `MultiVectorEncoder`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(50, 16)

    def forward(self, features: dict[str, Any], **options: Any) -> dict[str, Tensor]:
        embeddings = nn.functional.normalize(self.tokens(features["input_ids"]), dim=-1)
        return {"token_embeddings": embeddings, "attention_mask": features["attention_mask"]}


def features(rows: int, length: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (rows, 1), generator=generator)
    return {
        "input_ids": torch.randint(0, 50, (rows, length), generator=generator),
        "attention_mask": (torch.arange(length) < lengths).long(),
    }


@pytest.mark.parametrize(
    "loss",
    [
        losses.MultiVectorMultipleNegativesRankingLoss,
        partial(losses.MultiVectorMultipleNegativesRankingLoss, similarity_fct=scoring.mean_colbert_scores),
        partial(losses.CachedMultiVectorMultipleNegativesRankingLoss, mini_batch_size=4),
        losses.MultiVectorDistillKLDivLoss,
        losses.MultiVectorMarginMSELoss,
    ],
    ids=["negatives", "negatives, mean", "negatives, cached", "distillation", "margin"],
)
def test_losses(loss: Callable[..., nn.Module]) -> None:
    model = Model()
    columns = [features(6, 7, seed=1), features(6, 9, seed=2), features(6, 8, seed=3)]
    labels = torch.rand(6, 2, generator=torch.Generator().manual_seed(0))
    module = loss(model)  # made before

    def run() -> tuple[Tensor, Tensor]:
        model.tokens.weight.grad = None
        result = module([dict(c) for c in columns], labels)
        result.backward()
        return result.detach(), model.tokens.weight.grad.clone()

    theirs = run()
    with patch_sentence_transformers(), Calls() as calls:
        ours = run()
    assert calls.count
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_says_what_it_replaced_and_puts_it_back() -> None:
    own = util.similarity._maxsim_score_documents
    with patch_sentence_transformers() as replaced:
        assert replaced == [
            "sentence_transformers.util.similarity._maxsim_score_documents",
            "sentence_transformers.util.similarity._maxsim_score_pairs",
        ]
        assert util.similarity._maxsim_score_documents is not own
    assert util.similarity._maxsim_score_documents is own


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    own = util.similarity._maxsim_score_documents
    with monkeypatch.context() as context:
        context.delattr(util.similarity, "_maxsim_score_pairs")
        with pytest.raises(ImportError, match=r"similarity\._maxsim_score_pairs: expected a function to replace"):
            patch_sentence_transformers()
    assert util.similarity._maxsim_score_documents is own, "half a patch was left"
    monkeypatch.setitem(sys.modules, "sentence_transformers.util.similarity", None)
    with pytest.raises(ImportError, match=r"sentence-transformers >= 6.0 is needed"):
        patch_sentence_transformers()
