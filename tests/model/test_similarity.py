"""Similarities by name: published numbers, masks, ties, and models that train with them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from setemb.index import SetIndex
from setemb.similarity import set_similarity
from setemb_kernels import smooth_chamfer

KINDS = ("chamfer", "max", "match_probability")


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return functional.normalize(torch.randn(*shape, generator=generator, dtype=torch.float64), dim=-1)


def pair(x: torch.Tensor, y: torch.Tensor, kind: str, scale: float = 1.0, bias: float = 0.0) -> float:
    """Two sets ``[K, D]`` and ``[L, D]``, written out."""
    if len(x) == 0 or len(y) == 0:
        return 0.0
    scores = [[float(a @ b) for b in y] for a in x]
    if kind == "max":
        return max(map(max, scores))
    if kind == "chamfer":
        return 0.5 * sum(map(max, scores)) / len(x) + 0.5 * sum(map(max, zip(*scores, strict=True))) / len(y)
    return sum(1 / (1 + math.exp(-scale * c - bias)) for row in scores for c in row) / (len(x) * len(y))


@pytest.mark.parametrize("group", ["base_f64", "base_f32", "k1_f64", "batch_f64", "collapsed_f64"])
@pytest.mark.parametrize(("kind", "theirs"), [("chamfer", "chamfer"), ("max", "max"), ("match_probability", "mp")])
def test_published_numbers(published, group, kind, theirs):
    arrays = published("similarity.npz")
    if f"{group}/{theirs}/sim" not in arrays:
        assert (group, theirs) == ("batch_f64", "mp")
        return
    n, m = arrays[f"{group}/{theirs}/sim"].shape
    sides = [torch.tensor(arrays[f"{group}/{name}"]) for name in ("img", "txt")]
    x, y = (s.view(count, -1, s.shape[1]).requires_grad_() for s, count in zip(sides, (n, m), strict=True))
    sim = set_similarity(x, y, kind)
    (sim * torch.tensor(arrays[f"{group}/W"])).sum().backward()
    bound = {"atol": 1e-14, "rtol": 1e-13} if group.endswith("f64") else {"atol": 1e-6, "rtol": 1e-5}
    torch.testing.assert_close(sim.detach(), torch.tensor(arrays[f"{group}/{theirs}/sim"]), **bound)
    for sets, name in ((x, "grad_img"), (y, "grad_txt")):
        assert sets.grad is not None
        torch.testing.assert_close(sets.grad.flatten(0, 1), torch.tensor(arrays[f"{group}/{theirs}/{name}"]), **bound)


@pytest.mark.parametrize("kind", KINDS)
def test_masked_vectors_do_not_exist(kind):
    x, y = unit(4, 3, 5), unit(6, 2, 5, seed=1)
    x_mask = torch.tensor([[True, True, True], [True, False, True], [False, False, False], [False, True, False]])
    y_mask = torch.tensor([[True, True]] * 3 + [[False, True], [True, False], [False, False]])
    hidden_x, hidden_y = x.masked_fill(~x_mask[..., None], 1e30), y.masked_fill(~y_mask[..., None], 1e30)
    found = set_similarity(hidden_x, hidden_y, kind, scale=3.0, bias=-0.5, x_mask=x_mask, y_mask=y_mask)
    expected = [
        [pair(a[p], b[q], kind, 3.0, -0.5) for b, q in zip(y, y_mask, strict=True)]
        for a, p in zip(x, x_mask, strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-14, rtol=0)
    hidden_x.requires_grad_(), hidden_y.requires_grad_()
    set_similarity(hidden_x, hidden_y, kind, x_mask=x_mask, y_mask=y_mask).sum().backward()
    for sets, mask in ((hidden_x, x_mask), (hidden_y, y_mask)):
        assert sets.grad is not None and sets.grad.isfinite().all()
        assert (sets.grad[~mask] == 0).all()


def test_chamfer_gives_the_gradient_of_equals_to_the_first():
    x, y = torch.ones(1, 1, 2, requires_grad=True), torch.ones(1, 3, 2, requires_grad=True)
    set_similarity(x, y, "chamfer").sum().backward()
    assert y.grad is not None
    # every vector of y has its own half of a third; the half of x's goes to the first of the equals
    assert y.grad[0, :, 0].tolist() == pytest.approx([1 / 6 + 1 / 2, 1 / 6, 1 / 6])


def test_smooth_chamfer_goes_to_chamfer():
    x, y = unit(4, 3, 5), unit(6, 2, 5, seed=1)
    # log-sum-exp exceeds the maximum by at most log(3) / alpha
    assert 0 < (smooth_chamfer(x, y, alpha=1e4) - set_similarity(x, y, "chamfer")).abs().max() < math.log(3) / 1e4


def test_similarities_agree_on_sets_of_one_vector_and_max_is_the_closest_pair():
    x, y = unit(4, 3, 5), unit(6, 3, 5, seed=1)
    for kind in ("smooth_chamfer", "chamfer", "max", "cosine"):
        torch.testing.assert_close(set_similarity(x[:, :1], y[:, :1], kind), x[:, 0] @ y[:, 0].T)
    pairs = torch.einsum("nkd,mld->nmkl", x, y)
    torch.testing.assert_close(set_similarity(x, y, "max"), pairs.amax((2, 3)))
    torch.testing.assert_close(set_similarity(x, y, alpha=7.0), smooth_chamfer(x, y, alpha=7.0))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "cosine"}, '"cosine" compares sets of one vector, got K = 3'),
        ({"kind": "mean"}, "kind must be one of"),
        ({"kind": "max", "x_mask": torch.ones(4, 2, dtype=torch.bool)}, r"x_mask must be bool \[4, 3\]"),
        ({"kind": "chamfer", "y_mask": torch.ones(6, 3)}, r"y_mask must be bool \[6, 3\], got torch.float32"),
    ],
)
def test_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        set_similarity(unit(4, 3, 5), unit(6, 3, 5), **arguments)


def test_an_index_knows_no_match_probability():
    with pytest.raises(ValueError, match="similarity must be one of smooth_chamfer, chamfer, max, cosine, got 'match_"):
        SetIndex(unit(2, 1, 3), ["a", "b"], similarity="match_probability")


def trained(tmp_path: Path, tiny_precomp: Path, *overrides: str):
    pytest.importorskip("lightning")
    pytest.importorskip("omegaconf")
    from setemb.config import load_config
    from setemb.training import evaluate_precomp, load_model, read_metrics, train_precomp

    tiny = Path(__file__).parents[1] / "data" / "tiny.yaml"
    config = load_config(tiny, [f"data.dir={tiny_precomp}", "trainer.epochs=6", "loss.kind=info_nce", *overrides])
    train_precomp(config, tmp_path / "run")
    model = load_model(tmp_path / "run")
    last = [row["dev/rsum"] for row in read_metrics(tmp_path / "run") if "dev/rsum" in row]
    assert max(last) == pytest.approx(evaluate_precomp(tmp_path / "run", config.data).rsum, abs=1e-4)
    return model, last


@pytest.mark.parametrize("kind", ["chamfer", "match_probability"])
def test_a_model_trains_with_it(tmp_path, tiny_precomp, kind):
    model, rsums = trained(tmp_path, tiny_precomp, f"model.similarity={kind}")
    chance = 100 * (2 * 16 / 64 + 5 * (1 + 5 + 10) / 320)  # of 64 images and 320 captions, at least
    assert rsums[-1] > chance + 60, rsums
    if kind == "match_probability":
        assert model.match_scale.item() != 1.0 and model.match_bias.item() != 0.0, "they are learnt"
        x, y = unit(3, 4, 8).float(), unit(2, 4, 8, seed=1).float()
        expected = set_similarity(x, y, kind, scale=model.match_scale.item(), bias=model.match_bias.item())
        torch.testing.assert_close(model.similarity(x, y), expected)


def test_a_model_trains_with_pie_net(tmp_path, tiny_precomp):
    model, rsums = trained(tmp_path, tiny_precomp, "model.sets.kind=pie_net", "loss.diversity=0.01")
    assert type(model.image_sets).__name__ == type(model.text_sets).__name__ == "PIENet"
    assert rsums[-1] > 100, rsums
    assert np.isfinite(rsums).all()
