"""PyLate with its scores replaced: its own results and gradients, its losses, and back again."""

from __future__ import annotations

import importlib
import itertools
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from setemb_kernels.integrations import Patch, patch_pylate
from tests.integrations.same import EXACT, Calls, flags, sets, with_gradients

pytestmark = pytest.mark.usefixtures("pylate")


def scores() -> Any:
    return importlib.import_module("pylate.scores")


def same(name: str, *inputs: Tensor, **options: Any) -> None:
    """A function of pylate.scores gives the same before and after, with gradients."""
    theirs = with_gradients(getattr(scores(), name), *inputs, **options)
    with patch_pylate():
        ours = with_gradients(getattr(scores(), name), *inputs, **options)
    torch.testing.assert_close(ours, theirs, **EXACT)


MASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "bool": lambda mask: mask,
    "integers": lambda mask: mask.long(),
    "floats": lambda mask: mask.double(),
    "weights": lambda mask: mask * torch.linspace(0.5, 2, mask.numel(), dtype=torch.float64).view_as(mask),
    "all": torch.ones_like,
    "a set of nothing": lambda mask: mask & (torch.arange(len(mask)) > 0).view(-1, *[1] * (mask.dim() - 1)),
}


@pytest.mark.parametrize("of", ["queries", "documents", "both"])
@pytest.mark.parametrize("kind", MASKS)
def test_scores(kind: str, of: str) -> None:
    q, d = sets(5, 6, seed=1), sets(7, 9, seed=2)
    q_mask = MASKS[kind](flags(5, 6)) if of != "documents" else None
    d_mask = MASKS[kind](flags(7, 9)) if of != "queries" else None
    same("colbert_scores", q, d, queries_mask=q_mask, documents_mask=d_mask)


def test_scores_without_masks() -> None:
    same("colbert_scores", sets(5, 6, seed=1), sets(7, 9, seed=2))


def test_a_masked_token_beats_a_negative_similarity_unless_dropped() -> None:
    q, d = torch.ones(1, 1, 2), -torch.ones(1, 3, 2)
    mask = torch.tensor([[True, True, False]])
    assert scores().colbert_scores(q, d, documents_mask=mask).item() == 0
    with patch_pylate():
        assert scores().colbert_scores(q, d, documents_mask=mask).item() == 0
    with patch_pylate(drop_masked=True):
        assert scores().colbert_scores(q, d, documents_mask=mask).item() == -2


@pytest.mark.parametrize("kind", [None, *MASKS])
def test_own_documents(kind: str | None) -> None:
    masks = {}
    if kind:
        masks = {"queries_mask": MASKS[kind](flags(5, 6)), "documents_mask": MASKS[kind](flags(5, 3, 9))}
    same("colbert_kd_scores", sets(5, 6, seed=1), sets(15, 9, seed=2).view(5, 3, 9, 16), **masks)


def test_groups_of_documents() -> None:
    q, d = sets(5, 6, seed=1), sets(12, 9, seed=2).view(4, 3, 9, 16)
    metric = scores().ColBERTScores()  # made before
    masks = {"queries_mask": flags(5, 6), "documents_mask": flags(4, 3, 9)}
    theirs = with_gradients(metric, q, d, **masks)
    with patch_pylate():
        torch.testing.assert_close(with_gradients(metric, q, d, **masks), theirs, **EXACT)


def test_pairs() -> None:
    same("colbert_scores_pairwise", sets(5, 6, seed=1), sets(5, 9, seed=2))
    same("colbert_scores_pairwise", sets(5, 6, seed=1), sets(3, 9, seed=2)[:3])  # the shorter side ends it


def test_pairs_of_any_sizes_in_lists() -> None:
    sizes = [3, 1, 8, 5]
    q = [sets(1, k, seed=k)[0] for k in sizes]
    d = [sets(1, k + 2, seed=10 + k)[0] for k in reversed(sizes)]
    theirs = scores().colbert_scores_pairwise(q, d)
    with patch_pylate():
        torch.testing.assert_close(scores().colbert_scores_pairwise(q, d), theirs, **EXACT)


def test_lists_and_arrays() -> None:
    q, d = sets(3, 4, seed=1, dtype=torch.float32), sets(3, 5, seed=2, dtype=torch.float32)
    for form in (list, lambda t: t.numpy(), lambda t: [v.numpy() for v in t], lambda t: t.tolist()):
        theirs = scores().colbert_scores(form(q), form(d))
        with patch_pylate():
            torch.testing.assert_close(scores().colbert_scores(form(q), form(d)), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype) -> None:
    """No further from the truth than the package is, and of its dtype."""
    q, d = sets(5, 32, 64, seed=1, dtype=dtype), sets(7, 50, 64, seed=2, dtype=dtype)
    masks = {"queries_mask": flags(5, 32), "documents_mask": flags(7, 50)}
    truth = scores().colbert_scores(q.double(), d.double(), **masks)
    theirs = scores().colbert_scores(q, d, **masks)
    with patch_pylate():
        ours = scores().colbert_scores(q, d, **masks)
    rounding = torch.finfo(dtype).eps * truth.abs().max()
    assert ours.dtype == theirs.dtype
    assert (ours - truth).abs().max() <= 2 * ((theirs - truth).abs().max() + rounding)


def test_a_mask_of_a_wider_type_widens() -> None:
    q, d = sets(2, 3, seed=1, dtype=torch.bfloat16), sets(2, 4, seed=2, dtype=torch.bfloat16)
    mask = flags(2, 4).float()
    theirs = scores().colbert_scores(q, d, documents_mask=mask)
    with patch_pylate():
        assert scores().colbert_scores(q, d, documents_mask=mask).dtype == theirs.dtype == torch.float32


class Model(nn.Module):
    """What a loss needs of a ColBERT."""

    def __init__(self, do_query_expansion: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.skiplist, self.do_query_expansion = [3, 5], do_query_expansion
        self.tokens = nn.Embedding(50, 16, dtype=torch.float64)

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"token_embeddings": self.tokens(features["input_ids"])}


def features(rows: int, length: int, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(2, length + 1, (rows, 1), generator=generator)
    return {
        "input_ids": torch.randint(0, 50, (rows, length), generator=generator),
        "attention_mask": (torch.arange(length) < lengths).long(),
    }


@pytest.mark.parametrize("expansion", [True, False])
@pytest.mark.parametrize("name", ["Contrastive", "CachedContrastive", "Distillation"])
def test_losses(name: str, expansion: bool) -> None:
    losses = importlib.import_module("pylate.losses")
    if not hasattr(losses, name):
        pytest.skip("not in the stand-in")
    model = Model(expansion)
    items, labels = 6, torch.rand(6, 3, dtype=torch.float64)
    documents = [features(items * 3, 9, seed=2)] if name == "Distillation" else [features(items, 9, s) for s in (2, 3)]
    options = {"mini_batch_size": 4} if name == "CachedContrastive" else {}

    def run() -> tuple[Tensor, ...]:
        loss = getattr(losses, name)(model, **options)([features(items, 7, seed=1), *documents], labels)
        model.tokens.weight.grad = None
        loss.backward()
        return loss.detach(), model.tokens.weight.grad.clone()

    theirs = run()
    with patch_pylate() as replaced, Calls() as calls:
        ours = run()
    assert calls.count and "pylate.scores.colbert.ColBERTScores.__call__" in replaced
    torch.testing.assert_close(ours, theirs, **EXACT)


def test_an_explicit_backend_is_the_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    q, d = sets(2, 3), sets(2, 4)
    own = sets(8, 4).view(2, 4, 4, 16)
    with patch_pylate(), Calls() as calls:
        s = scores()
        s.colbert_scores(q, d, backend="torch")
        s.colbert_kd_scores(q, own, backend="torch")
        s.colbert_scores_pairwise(q, d, backend="torch")
        s.ColBERTScores()(q, own, backend="torch")
        monkeypatch.setenv("PYLATE_SCORES_BACKEND", "torch")
        s.colbert_scores(q, d)
        assert not calls.count
        s.colbert_scores(q, d, backend="auto")
        assert calls.count == 1


def test_says_what_it_replaced_and_puts_it_back() -> None:
    s, distillation = scores(), importlib.import_module("pylate.losses.distillation")
    user = types.ModuleType("a_training_script")
    user.score = s.colbert_scores  # type: ignore[attr-defined] -- from pylate.scores import colbert_scores as score
    sys.modules[user.__name__] = user
    try:
        before = [s.colbert_scores, s.colbert.colbert_kd_scores, s.ColBERTScores.__call__]
        default = distillation.Distillation.__init__.__defaults__
        patch = patch_pylate()
        assert isinstance(patch, Patch)
        assert {
            "a_training_script.score",
            "pylate.scores.colbert_scores",
            "pylate.scores.colbert_kd_scores",
            "pylate.scores.colbert_scores_pairwise",
            "pylate.scores.colbert.ColBERTScores.__call__",
            "pylate.losses.distillation.colbert_kd_scores",
            "pylate.losses.distillation.Distillation.__init__(score_metric)",
        } <= set(patch.replaced)
        assert all(name in repr(patch) for name in patch.replaced)
        assert user.score is s.colbert_scores is not before[0]
        assert s.colbert_scores.__name__ == "colbert_scores" and s.colbert_scores.__module__ == "pylate.scores.colbert"
        late = types.ModuleType("imported_later")
        late.score = s.colbert_scores  # type: ignore[attr-defined]
        sys.modules[late.__name__] = late
        patch.undo()
        assert patch.replaced == []
        assert before == [s.colbert_scores, s.colbert.colbert_kd_scores, s.ColBERTScores.__call__]
        assert user.score is late.score is before[0]
        assert distillation.Distillation.__init__.__defaults__ == default
        patch.undo()  # nothing more to do
    finally:
        sys.modules.pop("a_training_script"), sys.modules.pop("imported_later", None)


def test_blocks_nest_and_end_with_an_error() -> None:
    s = scores()
    own = s.colbert_scores
    q, d, mask = torch.ones(1, 1, 2), -torch.ones(1, 2, 2), torch.tensor([[True, False]])
    with patch_pylate():
        exact = s.colbert_scores
        with patch_pylate(drop_masked=True):
            assert s.colbert_scores(q, d, documents_mask=mask).item() == -2
            assert s.colbert_scores(q, d, documents_mask=mask, backend="torch").item() == 0  # the package's, not ours
        assert s.colbert_scores is exact and s.colbert_scores(q, d, documents_mask=mask).item() == 0
    assert s.colbert_scores is own
    with pytest.raises(ValueError, match="y: expected 2 features"), patch_pylate():
        s.colbert_scores(q, torch.ones(1, 2, 3))
    assert s.colbert_scores is own


@pytest.mark.parametrize("order", itertools.permutations(range(3)), ids=str)
def test_patches_are_undone_in_any_order(order: tuple[int, ...]) -> None:
    s, distillation = scores(), importlib.import_module("pylate.losses.distillation")
    before = [s.colbert_scores, vars(s.ColBERTScores)["__call__"], distillation.Distillation.__init__.__defaults__]

    def found() -> list[Any]:
        return [s.colbert_scores, vars(s.ColBERTScores)["__call__"], distillation.Distillation.__init__.__defaults__]

    patches = [patch_pylate(drop_masked=drop) for drop in (True, False, True)]
    last = found()
    for i in order:
        assert patches[2].replaced == [] or found() == last  # what is covered shows nothing when it goes
        patches[i].undo()
        assert patches[i].replaced == []
    assert found() == before


def test_a_cell_that_runs_twice_is_undone_at_once() -> None:
    s = scores()
    own, method = s.colbert_scores, vars(s.ColBERTScores)["__call__"]
    for _ in range(3):
        patch = patch_pylate()
    assert s.colbert_scores is not own
    patch.undo()
    assert s.colbert_scores is own and vars(s.ColBERTScores)["__call__"] is method


def test_a_call_within_a_block_and_a_block_over_a_call() -> None:
    s = scores()
    own = s.colbert_scores
    lasting = patch_pylate()
    exact = s.colbert_scores
    with patch_pylate(drop_masked=True):
        dropped = s.colbert_scores
        patch_pylate()
        inner = patch_pylate()
        assert s.colbert_scores not in (own, exact, dropped)
        inner.undo()
        assert s.colbert_scores is dropped
        kept = patch_pylate()
    assert s.colbert_scores not in (own, exact, dropped)  # made by a call, not by the block
    kept.undo()
    assert s.colbert_scores is own and lasting.replaced == []


def test_what_others_put_over_ours_stays() -> None:
    s = scores()
    own, method = s.colbert_scores, vars(s.ColBERTScores)["__call__"]

    def theirs(*args: Any) -> str:
        return "theirs"

    patch = patch_pylate()
    s.colbert_scores = s.ColBERTScores.__call__ = theirs
    try:
        patch.undo()
        assert s.colbert_scores is theirs and vars(s.ColBERTScores)["__call__"] is theirs
    finally:
        s.colbert_scores, s.ColBERTScores.__call__ = own, method


def test_a_patch_that_fails_leaves_what_was(monkeypatch: pytest.MonkeyPatch) -> None:
    s = scores()
    with patch_pylate():
        exact, method = s.colbert_scores, vars(s.ColBERTScores)["__call__"]
        with monkeypatch.context() as patch:
            patch.delattr(s.colbert, "colbert_kd_scores")
            with pytest.raises(ImportError, match="colbert_kd_scores: expected a function to replace"):
                patch_pylate()
        assert s.colbert_scores is exact and vars(s.ColBERTScores)["__call__"] is method


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pylate.scores.colbert", None)
    with pytest.raises(ImportError, match=r"pylate >= 1.5 is needed: cannot import pylate.scores.colbert"):
        patch_pylate()


def test_rerank(request: pytest.FixtureRequest) -> None:
    if request.node.callspec.params["pylate"] == "stand-in":
        pytest.skip("not in the stand-in")
    rank = importlib.import_module("pylate.rank")
    queries = list(sets(2, 4, seed=1, dtype=torch.float32))
    documents = [[sets(1, k, seed=k, dtype=torch.float32)[0] for k in (3, 6, 5)] for _ in queries]
    names = [["a", "b", "c"]] * 2
    theirs = rank.rerank(documents_ids=names, queries_embeddings=queries, documents_embeddings=documents)
    with patch_pylate(), Calls() as calls:
        ours = rank.rerank(documents_ids=names, queries_embeddings=queries, documents_embeddings=documents)
    assert calls.count and [[r["id"] for r in row] for row in ours] == [[r["id"] for r in row] for row in theirs]
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close([r["score"] for r in a], [r["score"] for r in b], rtol=1e-5, atol=1e-5)
