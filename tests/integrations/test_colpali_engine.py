"""colpali-engine with its late interaction replaced: its own results and gradients, hard and smooth, and back again."""

from __future__ import annotations

import importlib
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from setemb_kernels import soft_maxsim
from setemb_kernels.integrations import patch_colpali_engine
from tests.integrations.same import EXACT, Calls, sets, with_gradients

pytestmark = pytest.mark.usefixtures("colpali")

LOSSES = ("ColbertLoss", "ColbertPairwiseCELoss", "ColbertSigmoidLoss")
WITH_NEGATIVES = ("ColbertNegativeCELoss", "ColbertPairwiseNegativeCELoss")


def maxsim() -> Any:
    return importlib.import_module("colpali_engine.utils.maxsim")


def losses() -> Any:
    return importlib.import_module("colpali_engine.loss.late_interaction_losses")


def score_multi_vector(*args: Any, **options: Any) -> Tensor:
    module = importlib.import_module("colpali_engine.utils.processing_utils")
    return module.BaseVisualRetrieverProcessor.score_multi_vector(*args, device="cpu", **options)


def lengths(n: int, k: int, seed: int) -> Tensor:
    """A mask ``[n, k]`` of tokens from the first on; one set of full length."""
    found = torch.randint(1, k, (n, 1), generator=torch.Generator().manual_seed(seed))
    found[0] = k
    return torch.arange(k) < found


def batch(padded: bool) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """Queries, documents, negatives, and what a model multiplies them by: its attention masks."""
    values = sets(5, 6, seed=1), sets(5, 9, seed=2), sets(15, 9, seed=3).view(5, 3, 9, 16)
    masks = lengths(5, 6, 4), lengths(5, 9, 5), lengths(15, 9, 6).view(5, 3, 9)
    return values, tuple(mask if padded else torch.ones_like(mask) for mask in masks)


def same(function: Any, padded: bool, count: int) -> None:
    """The same before and after, with the gradients that reach a model through its attention masks."""
    values, masks = batch(padded)

    def of_model(*outputs: Tensor) -> Tensor:
        return function(*(o * mask[..., None] for o, mask in zip(outputs, masks, strict=False)))

    theirs = with_gradients(of_model, *values[:count])
    with patch_colpali_engine(), Calls() as calls:
        ours = with_gradients(of_model, *values[:count])
    assert calls.count
    torch.testing.assert_close(ours, theirs, **EXACT)


@pytest.mark.parametrize("padded", [False, True])
def test_scores(padded: bool) -> None:
    same(lambda q, d: maxsim().maxsim_inbatch(q, d), padded, 2)
    same(lambda q, d, n: maxsim().maxsim_kd(q, n) + d.sum(), padded, 3)


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize(
    ("padded", "options"),
    [(False, {}), (True, {}), (True, {"normalize_scores": False}), (True, {"pos_aware_negative_filtering": True})],
)
@pytest.mark.parametrize("name", LOSSES + WITH_NEGATIVES)
def test_losses(name: str, padded: bool, options: dict[str, bool], smooth: bool) -> None:
    loss = getattr(losses(), name)(use_smooth_max=smooth, temperature=0.3, **options)  # made before
    same(loss, padded, 3 if name in WITH_NEGATIVES else 2)


def test_zeros_beat_negative_similarities_unless_dropped() -> None:
    q = torch.ones(1, 2, 2) * torch.tensor([1.0, 0.0])[None, :, None]
    d = -torch.ones(1, 3, 2) * torch.tensor([1.0, 1.0, 0.0])[None, :, None]
    assert maxsim().maxsim_inbatch(q, d).item() == 0
    with patch_colpali_engine():
        assert maxsim().maxsim_inbatch(q, d).item() == 0
    with patch_colpali_engine(drop_masked=True):
        assert maxsim().maxsim_inbatch(q, d).item() == -2


def test_the_smooth_maximum_without_padding() -> None:
    (q, d, n), (q_mask, d_mask, n_mask) = batch(True)
    q, d, n = (t * mask[..., None] for t, mask in ((q, q_mask), (d, d_mask), (n, n_mask)))
    loss = losses().ColbertLoss(use_smooth_max=True, normalize_scores=False)
    with patch_colpali_engine(drop_masked=True):
        ours = loss._inbatch_scores(q, d)
        longer = torch.nn.functional.pad(d, (0, 0, 0, 5))
        torch.testing.assert_close(loss._inbatch_scores(q, longer), ours, **EXACT)
    truth = soft_maxsim(q, d, alpha=10.0, x_mask=q_mask, y_mask=d_mask)
    torch.testing.assert_close(ours, truth, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch_size", [128, 3])
def test_scoring_of_lists(batch_size: int, dtype: torch.dtype) -> None:
    """Also where it matters in which batch a document is: a zero is as good as the longest of it is longer."""
    qs = [sets(1, 2 + i, seed=i, dtype=dtype)[0] for i in range(5)]
    ps = [-qs[i % 5][:1].expand(1 + i % 4, -1) for i in range(8)]  # negative similarities only
    ps = [p + 0.01 * sets(1, len(p), seed=20 + i, dtype=dtype)[0] for i, p in enumerate(ps)]
    truth = score_multi_vector([q.double() for q in qs], [p.double() for p in ps], batch_size=batch_size)
    theirs = score_multi_vector(qs, ps, batch_size=batch_size)
    with patch_colpali_engine(), Calls() as calls:
        ours = score_multi_vector(qs, ps, batch_size=batch_size)
    assert calls.count and ours.dtype == theirs.dtype == torch.float32 and (truth == 0).any() and (truth < 0).any()
    rounding = torch.finfo(dtype).eps * truth.abs().max()
    assert (ours - truth).abs().max() <= 2 * ((theirs - truth).abs().max() + rounding)


def test_scoring_of_padded_tensors_and_of_nothing() -> None:
    (q, d, _), (q_mask, d_mask, _) = batch(True)
    q, d = (q * q_mask[..., None]).float(), (d * d_mask[..., None]).float()
    theirs = score_multi_vector(q, d)
    with patch_colpali_engine():
        torch.testing.assert_close(score_multi_vector(q, d), theirs)
        with pytest.raises(ValueError, match="No queries"):
            score_multi_vector([], [d[0]])


def test_an_explicit_backend_is_the_packages(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    monkeypatch.setenv("COLPALI_SCORES_BACKEND", "torch")
    (q, d, n), _ = batch(False)
    with patch_colpali_engine(), Calls() as calls:
        maxsim().maxsim_inbatch(q, d), maxsim().maxsim_kd(q, n), score_multi_vector(q, d)
        losses().ColbertNegativeCELoss()(q, d, n)
        assert not calls.count


def test_says_what_it_replaced_and_puts_it_back() -> None:
    module = losses()
    before = [module.maxsim_inbatch, module.ColbertModule._inbatch_scores, module.ColbertNegativeCELoss.forward]
    patch = patch_colpali_engine()
    assert {
        "colpali_engine.utils.maxsim.maxsim_inbatch",
        "colpali_engine.loss.late_interaction_losses.maxsim_inbatch",
        "colpali_engine.loss.late_interaction_losses.maxsim_kd",
        "colpali_engine.loss.late_interaction_losses.ColbertModule._inbatch_scores",
        "colpali_engine.loss.late_interaction_losses.ColbertNegativeCELoss.forward",
        "colpali_engine.loss.late_interaction_losses.ColbertPairwiseNegativeCELoss.forward",
        "colpali_engine.utils.processing_utils.BaseVisualRetrieverProcessor.score_multi_vector",
    } <= set(patch.replaced)
    patch.undo()
    assert before == [
        module.maxsim_inbatch,
        module.ColbertModule._inbatch_scores,
        module.ColbertNegativeCELoss.forward,
    ]


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "colpali_engine.utils.maxsim", None)
    with pytest.raises(ImportError, match=r"colpali-engine >= 0.3.17 is needed: cannot import colpali_engine"):
        patch_colpali_engine()
