"""Losses and recall: published numbers, restated in plain loops, edges and errors."""

from __future__ import annotations

import itertools
import json
import math
import warnings

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck

import setemb.losses
from setemb.evaluation import evaluate_retrieval
from setemb.losses import diversity_loss, hardest_triplet_loss, info_nce_loss, mmd_loss
from setemb.similarity import set_similarity
from setemb_kernels import smooth_chamfer


def check_published_loss(arrays: dict[str, np.ndarray], group: str) -> None:
    cfg = json.loads(str(arrays[f"{group}/cfg"]))
    names = ("img", "txt", "img_r", "txt_r")
    img, txt, img_r, txt_r = inputs = [torch.tensor(arrays[f"{group}/{n}"], requires_grad=True) for n in names]
    captions = torch.arange(len(txt)) // 5
    loss = hardest_triplet_loss(smooth_chamfer(img, txt), captions, cfg["margin"], float(cfg["max_violation"]))
    loss = loss + cfg["mmd_weight"] * mmd_loss(img, txt)
    loss = loss + cfg["unif_weight"] * (diversity_loss(img_r) + diversity_loss(txt_r))
    loss.backward()
    tolerance = {"rtol": 0, "atol": 1e-12} if img.dtype == torch.float64 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(
        loss.double(), torch.tensor(float(arrays[f"{group}/loss"]), dtype=torch.float64), **tolerance
    )
    for name, tensor in zip(names, inputs, strict=True):
        torch.testing.assert_close(tensor.grad, torch.tensor(arrays[f"{group}/grad_{name}"]), **tolerance)


@pytest.mark.parametrize("group", ["full_f64", "sum_f64"])
def test_losses_meet_the_published_excerpt(published_excerpt, group):
    check_published_loss({k.removeprefix("losses/"): v for k, v in published_excerpt.items()}, group)


@pytest.mark.parametrize("group", ["full_f64", "sum_f64", "margin01_f64", "full_f32"])
def test_losses_meet_the_published_numbers(published, group):
    check_published_loss(published("losses.npz"), group)


def test_regularisers_meet_the_published_numbers(published):
    arrays = published("losses.npz")
    x, y = torch.tensor(arrays["mmd/x"]), torch.tensor(arrays["mmd/y"])
    assert mmd_loss(x, y).item() == pytest.approx(float(arrays["mmd/gamma_0.5"]), abs=1e-12)
    slots = torch.tensor(arrays["unif/x"])
    assert diversity_loss(slots).item() == pytest.approx(float(arrays["unif/value"]), abs=1e-12)
    assert diversity_loss(slots[:, :1].expand(-1, 4, -1)).item() == pytest.approx(1, abs=1e-12)


def many_to_many() -> tuple[torch.Tensor, torch.Tensor]:
    """Similarities and positives in which a caption holds for several images and an image for several captions."""
    generator = torch.Generator().manual_seed(0)
    sim = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    positive = torch.tensor(
        [[1, 1, 0, 0, 0, 1], [0, 0, 1, 0, 0, 1], [0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 1, 0]], dtype=torch.bool
    )
    return sim, positive


@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_triplet_loss_is_its_formula_for_many_to_many_positives(fraction):
    sim, positive = many_to_many()
    total = 0.0
    for i, c in itertools.product(range(4), range(6)):
        if positive[i, c]:
            rows = [max(0.2 + float(sim[i, d] - sim[i, c]), 0) for d in range(6) if not positive[i, d]]
            columns = [max(0.2 + float(sim[j, c] - sim[i, c]), 0) for j in range(4) if not positive[j, c]]
            for costs in (rows, columns):
                total += fraction * max(costs) + (1 - fraction) * sum(costs) / len(costs)
    loss = hardest_triplet_loss(sim, positive, 0.2, fraction)
    assert loss.item() == pytest.approx(total / int(positive.sum()), rel=1e-12)


def test_info_nce_is_its_formula_for_many_to_many_positives():
    sim, positive = many_to_many()
    total = 0.0
    for i, c in itertools.product(range(4), range(6)):
        if positive[i, c]:
            own = math.exp(float(sim[i, c]) / 0.1)
            rows = sum(math.exp(float(sim[i, d]) / 0.1) for d in range(6) if not positive[i, d])
            columns = sum(math.exp(float(sim[j, c]) / 0.1) for j in range(4) if not positive[j, c])
            total -= 0.5 * (math.log(own / (own + rows)) + math.log(own / (own + columns)))
    assert info_nce_loss(sim, positive, 0.1).item() == pytest.approx(total / int(positive.sum()), rel=1e-12)


@pytest.mark.parametrize("loss", [hardest_triplet_loss, info_nce_loss])
def test_ids_and_matrix_say_the_same(loss):
    sim = torch.randn(3, 6)
    ids = torch.tensor([0, 0, 1, 2, 2, 1])
    torch.testing.assert_close(loss(sim, ids), loss(sim, torch.arange(3)[:, None] == ids))


@pytest.mark.parametrize("loss", [hardest_triplet_loss, info_nce_loss])
def test_losses_without_negatives_or_positives_are_zero_with_finite_gradient(loss):
    for sim, positive in (
        (torch.randn(1, 3), torch.ones(1, 3, dtype=torch.bool)),
        (torch.randn(2, 3), torch.zeros(2, 3, dtype=torch.bool)),
    ):
        sim.requires_grad_()
        value = loss(sim, positive)
        value.backward()
        assert value.item() == 0
        assert sim.grad is not None
        assert (sim.grad == 0).all()


def test_gradients_of_the_losses():
    torch.manual_seed(0)
    sim, positive = many_to_many()
    sim.requires_grad_()
    for function in (
        lambda s: hardest_triplet_loss(s, positive, 0.2, 0.5),
        lambda s: info_nce_loss(s, positive, 0.3),
    ):
        assert gradcheck(function, (sim,))
    x, y = torch.randn(3, 2, 4).double().requires_grad_(), torch.randn(5, 4).double().requires_grad_()
    assert gradcheck(mmd_loss, (x, y))
    assert gradcheck(diversity_loss, (x,))


def test_mmd_of_a_cloud_with_itself_is_zero_with_finite_gradient():
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    value = mmd_loss(x, x)
    value.backward()
    assert value.item() == pytest.approx(0, abs=1e-6)
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda s, i: hardest_triplet_loss(s[0], i), ValueError, "sim must be"),
        (lambda s, i: hardest_triplet_loss(s, i.float()), TypeError, "image_ids must be of an integer type"),
        (lambda s, i: hardest_triplet_loss(s, i[:2]), ValueError, r"image_ids must have shape \[3\]"),
        (lambda s, i: hardest_triplet_loss(s, torch.ones(3, 3).bool()), ValueError, "image_ids must have the shape"),
        (lambda s, i: hardest_triplet_loss(s, i, margin=-1), ValueError, "margin must be"),
        (lambda s, i: hardest_triplet_loss(s, i, margin=math.nan), ValueError, "margin must be"),
        (lambda s, i: hardest_triplet_loss(s, i, hardest_fraction=1.5), ValueError, "hardest_fraction must"),
        (lambda s, i: info_nce_loss(s, i, temperature=0), ValueError, "temperature must be"),
        (lambda s, i: diversity_loss(s), ValueError, "slots must have shape"),
        (lambda s, i: mmd_loss(s, s[:, :2]), ValueError, "x and y must have shapes"),
    ],
)
def test_losses_refuse(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.zeros(2, 3), torch.tensor([0, 0, 1]))


def check_published_recall(arrays: dict[str, np.ndarray]) -> None:
    images, captions = torch.tensor(arrays["img"]), torch.tensor(arrays["txt"])
    report = evaluate_retrieval(images, captions, block=7)
    np.testing.assert_array_equal(report.image_ranks, arrays["i2t_ranks"])
    np.testing.assert_array_equal(report.caption_ranks, arrays["t2i_ranks"])
    folds = evaluate_retrieval(images, captions, folds=5)
    for found, expected in (
        (report, np.concatenate([arrays["i2t"], arrays["t2i"]])),
        (folds, arrays["fold5_mean"]),
    ):
        figures = [v for way in ("image_to_text", "text_to_image") for v in found.to_dict()[way].values()]
        np.testing.assert_allclose(figures, expected, rtol=1e-12)
    assert report.rsum == pytest.approx(float(arrays["rsum"]))


def test_recall_meets_the_published_excerpt(published_excerpt):
    check_published_recall({k.removeprefix("recall/"): v for k, v in published_excerpt.items()})


@pytest.mark.parametrize("group", ["sc_n50", "sc_n50_f32"])
def test_recall_meets_the_published_numbers(published, group):
    arrays = published("recall.npz")
    check_published_recall({k.removeprefix(f"{group}/"): v for k, v in arrays.items() if k.startswith(f"{group}/")})


def test_ranks_by_group_are_those_of_sorting():
    generator = torch.Generator().manual_seed(0)
    images, captions = torch.randn(20, 2, 4, generator=generator), torch.randn(30, 3, 4, generator=generator)
    image_groups = torch.arange(20) % 8
    caption_groups = torch.arange(30) % 8
    report = evaluate_retrieval(images, captions, image_groups=image_groups, caption_groups=caption_groups)
    sim = smooth_chamfer(images, captions)
    for ranks, scores, own, other in (
        (report.image_ranks, sim, image_groups, caption_groups),
        (report.caption_ranks, sim.T, caption_groups, image_groups),
    ):
        for query, rank in enumerate(ranks):
            order = other[scores[query].argsort(descending=True)]
            assert rank == int((order == own[query]).nonzero()[0])  # everything before the first relevant one is not
    groups = {"image_groups": image_groups, "caption_groups": caption_groups}
    again = evaluate_retrieval(images, captions, block=3, **groups)
    np.testing.assert_array_equal(again.image_ranks, report.image_ranks)
    np.testing.assert_array_equal(again.caption_ranks, report.caption_ranks)


@pytest.mark.parametrize(("kind", "k"), [("smooth_chamfer", 4), ("chamfer", 3), ("max", 3), ("cosine", 1)])
def test_ranks_by_name_are_those_by_function(kind, k):
    generator = torch.Generator().manual_seed(1)
    images, captions = torch.randn(20, k, 8, generator=generator), torch.randn(100, k, 8, generator=generator)
    images, captions = (torch.nn.functional.normalize(sets.double(), dim=-1) for sets in (images, captions))
    for folds in (None, 4):
        named = evaluate_retrieval(images, captions, folds=folds, similarity=kind, alpha=5.0, block=7)
        given = evaluate_retrieval(
            images, captions, folds=folds, similarity=lambda x, y: set_similarity(x, y, kind, 5.0)
        )
        np.testing.assert_array_equal(named.image_ranks, given.image_ranks)
        np.testing.assert_array_equal(named.caption_ranks, given.caption_ranks)
        assert named == given


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_embeddings_may_be_mapped_from_files_that_must_not_be_written(tmp_path, dtype):
    generator = torch.Generator().manual_seed(0)
    images, captions = torch.randn(10, 4, 8, generator=generator), torch.randn(50, 4, 8, generator=generator)
    mapped = []
    for name, sets in (("images", images), ("captions", captions)):
        np.save(tmp_path / f"{name}.npy", sets.numpy().astype(dtype))
        mapped.append(np.load(tmp_path / f"{name}.npy", mmap_mode="r"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = evaluate_retrieval(*mapped, folds=2, block=8)
    exact = evaluate_retrieval(*(torch.from_numpy(np.array(sets, np.float32)) for sets in mapped), folds=2)
    np.testing.assert_array_equal(found.image_ranks, exact.image_ranks)
    np.testing.assert_array_equal(found.caption_ranks, exact.caption_ranks)


def test_a_model_that_scores_all_alike_ranks_last():
    report = evaluate_retrieval(torch.ones(4, 1, 2), torch.ones(20, 1, 2))
    assert (report.image_ranks == 15).all()
    assert (report.caption_ranks == 3).all()


def test_a_model_that_says_nan_ranks_last():
    images, captions = torch.eye(4)[:, None], torch.eye(4)[:, None].repeat_interleave(5, 0)
    report = evaluate_retrieval(torch.full_like(images, torch.nan), captions)
    assert report.image_to_text.r1 == report.text_to_image.r1 == 0
    assert (report.image_ranks == 15).all()
    assert (report.caption_ranks == 3).all()
    images[2] = torch.nan
    report = evaluate_retrieval(images, captions)
    assert report.image_ranks.tolist() == [0, 0, 15, 0]
    assert report.caption_ranks.tolist() == [1] * 10 + [3] * 5 + [1] * 5


def test_ranks_in_folds_stand_in_the_order_of_the_captions():
    images, captions = torch.eye(4)[:, None], torch.eye(4)[[3, 2, 1, 1]][:, None]  # the last is of image 0
    groups = {"image_groups": torch.arange(4), "caption_groups": torch.tensor([3, 2, 1, 0])}
    report = evaluate_retrieval(images, captions, folds=2, **groups)
    assert report.caption_ranks.tolist() == [0, 0, 0, 1]
    with pytest.raises(ValueError, match="all images of a group must lie in one fold"):
        evaluate_retrieval(images, captions[:2], folds=2, image_groups=[0, 1, 0, 1], caption_groups=[0, 1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"captions_per_image": 4}, "4 images with captions_per_image = 4 need 16 captions, got 20"),
        ({"folds": 3}, r"folds must divide the number of images \(4\), got 3"),
        ({"block": 0}, "block must be at least 1"),
        ({"similarity": "euclid"}, "similarity must be one of"),
        ({"alpha": 0.0}, "alpha: expected a finite number > 0"),
        ({"image_groups": torch.arange(4)}, "must be given together"),
        ({"image_groups": torch.arange(4), "caption_groups": torch.zeros(20)}, "caption_groups must be integers"),
        ({"image_groups": torch.arange(4), "caption_groups": torch.arange(20) // 10}, "image_groups: nothing .* row 2"),
        ({"image_groups": torch.arange(4), "caption_groups": torch.arange(20)}, "caption_groups: nothing .* row 4"),
    ],
)
def test_evaluation_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        evaluate_retrieval(torch.ones(4, 1, 2), torch.ones(20, 1, 2), **arguments)


def test_mmd_by_tiles_is_that_of_one_tile(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 2, 4), (7, 4)))
    x[0, 0] = y[2]  # at distance 0 without being one vector
    results = []
    for tile in (1024, 1, 3):
        monkeypatch.setattr(setemb.losses, "_TILE", tile)
        leaves = [t.clone().requires_grad_() for t in (x, y)]
        value = mmd_loss(*leaves)
        results.append((value, *torch.autograd.grad(value, leaves)))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    x = x.flatten(0, 1)
    means = [torch.exp(-0.5 * (a[:, None] - b).norm(dim=2)).mean() for a, b in ((x, x), (y, y), (x, y))]
    torch.testing.assert_close(results[0][0].detach(), means[0] + means[1] - 2 * means[2], rtol=1e-12, atol=1e-12)


def test_a_vector_is_at_no_distance_from_itself():
    """In float32 |a|^2 + |a|^2 - 2 a.a of long vectors is not 0."""
    generator = torch.Generator().manual_seed(0)
    x, y = (10 * torch.randn(n, 64, generator=generator) for n in (6, 9))
    results = []
    for dtype in (torch.float32, torch.float64):
        leaves = [t.to(dtype).requires_grad_() for t in (x, y)]
        value = mmd_loss(*leaves)
        results.append([t.double() for t in (value, *torch.autograd.grad(value, leaves))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * results[1][0].item())
