"""Ensembles and several models at evaluation: the mean of similarities, and the command that prints them."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize

from setemb.ensemble import Encoded, Similarities
from setemb.evaluation import evaluate_retrieval, evaluate_similarities
from setemb.similarity import set_similarity
from setemb_kernels.retrieval import topk_of_tiles

TINY = Path(__file__).parents[1] / "data" / "tiny.yaml"


def two_models(n: int = 24) -> tuple[Encoded, Encoded]:
    """Of other sizes and another similarity; both know something about which caption belongs to which image."""
    members = []
    for seed, (K, L, D), similarity in ((0, (4, 4, 16), "smooth_chamfer"), (1, (2, 3, 12), "max")):
        generator = torch.Generator().manual_seed(seed)
        meaning = torch.randn(n, 1, D, generator=generator)
        images = normalize(meaning + 1.5 * torch.randn(n, K, D, generator=generator), dim=-1)
        captions = meaning.repeat_interleave(5, 0) + 1.5 * torch.randn(5 * n, L, D, generator=generator)
        members.append(Encoded(images, normalize(captions, dim=-1), similarity, 9.0))
    return members[0], members[1]


def whole(members: tuple[Encoded, ...]) -> Tensor:
    """All similarities, in float64."""
    parts = [
        set_similarity(m.image_sets.double(), m.caption_sets.double(), m.similarity, m.alpha)  # type: ignore[union-attr, arg-type]
        for m in members
    ]
    return torch.stack(parts).mean(0)


def ranks_by_counting(s: Tensor, near: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Of images and captions: those of others that come before the best one of one's own, ``near`` ties as well."""
    own = torch.arange(len(s))[:, None] == torch.arange(s.shape[1]) // 5
    best = s.masked_fill(~own, -torch.inf)
    images, captions = ((~own & (s >= best.amax(dim, keepdim=True) - near)).sum(dim) for dim in (1, 0))
    return images.numpy(), captions.numpy()


@pytest.mark.parametrize("block", [1, 7, 1024])
def test_ranks_of_an_ensemble_are_those_of_the_mean(block: int) -> None:
    members = two_models()
    report = evaluate_similarities(Similarities(members, block))
    images, captions = ranks_by_counting(whole(members))
    np.testing.assert_array_equal(report.image_ranks, images)
    np.testing.assert_array_equal(report.caption_ranks, captions)
    alone = [evaluate_similarities(Similarities([m], block)) for m in members]
    assert all((of.caption_ranks != captions).any() for of in alone)
    for member, of in zip(members, alone, strict=True):
        same = evaluate_retrieval(
            member.image_sets, member.caption_sets, similarity=member.similarity, alpha=member.alpha, block=block
        )
        assert of == same


def test_folds_of_an_ensemble_are_ensembles_of_folds() -> None:
    members = two_models()
    report = evaluate_similarities(Similarities(members, 5), folds=4)
    s, at_1 = whole(members), []
    for fold in range(4):
        i, c = slice(6 * fold, 6 * fold + 6), slice(30 * fold, 30 * fold + 30)
        images, captions = ranks_by_counting(s[i, c])
        np.testing.assert_array_equal(report.image_ranks[i], images)
        np.testing.assert_array_equal(report.caption_ranks[c], captions)
        at_1.append(100 * np.mean(captions < 1))
    assert report.text_to_image.r1 == pytest.approx(np.mean(at_1))


def test_a_tile_is_all_that_is_held_and_two_of_a_kind_are_one(monkeypatch: pytest.MonkeyPatch) -> None:
    members = two_models()
    sizes = []
    real = Similarities.similarity

    def watched(self: Any, rows: slice, columns: slice) -> Tensor:
        sizes.append(tuple(real(self, rows, columns).shape))
        return real(self, rows, columns)

    monkeypatch.setattr(Similarities, "similarity", watched)
    twice = evaluate_similarities(Similarities([members[0]] * 2, 10))
    assert max(sizes) == (10, 10)
    assert twice == evaluate_similarities(Similarities([members[0]], 10))


def test_the_best_items_of_an_ensemble_both_ways() -> None:
    members = two_models()
    s = whole(members)
    of = Similarities(members, 11)
    for tiles, expected in ((of, s), (of.T, s.T)):
        found = topk_of_tiles(tiles, 6)
        torch.testing.assert_close(found.values, expected.topk(6).values, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(expected.gather(1, found.indices), found.values, rtol=1e-6, atol=1e-6)


def test_any_similarity_takes_part() -> None:
    first, second = two_models()
    learnt = partial(set_similarity, kind="match_probability", scale=torch.tensor(5.0), bias=torch.tensor(-1.0))
    of = Similarities([first, Encoded(second.image_sets, second.caption_sets, learnt)], 50)
    expected = whole((first,)) + learnt(second.image_sets.double(), second.caption_sets.double())
    torch.testing.assert_close(of.similarity(slice(0, 24), slice(0, 120)), expected / 2, rtol=1e-6, atol=1e-6)


def test_what_does_not_fit_is_named() -> None:
    first, second = two_models()
    with pytest.raises(ValueError, match="members must hold at least one model's sets"):
        Similarities([])
    with pytest.raises(ValueError, match="block must be at least 1, got 0"):
        Similarities([first], 0)
    short = Encoded(second.image_sets[1:], second.caption_sets)
    with pytest.raises(
        ValueError, match=r"members\[1\]\.image_sets must be of the 24 that the first model has, got 23"
    ):
        Similarities([first, short])
    with pytest.raises(ValueError, match=r"members\[1\]\.caption_sets must have shape \[n, K, D\]"):
        Similarities([first, Encoded(second.image_sets, second.caption_sets[:, 0])])
    with pytest.raises(ValueError, match=r"similarity must be one of smooth_chamfer, .*got 'dot'"):
        Similarities([Encoded(first.image_sets, first.caption_sets, "dot")])  # type: ignore[arg-type]


# the command, with tiny trained runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two seeds, and one with a language model's features of another kind of similarity, on the tiny data set."""
    pytest.importorskip("lightning")
    pytest.importorskip("omegaconf")
    from setemb.config import load_config
    from setemb.training import train_precomp
    from tests.model.conftest import write_tiny_precomp

    root = tmp_path_factory.mktemp("ensemble")
    (root / "data").mkdir()
    write_tiny_precomp(root / "data")
    for name, settings in (
        ("a", ["trainer.seed=0"]),
        ("b", ["trainer.seed=1", "model.sets.num_slots=2", "model.similarity=match_probability", "loss.kind=info_nce"]),
    ):
        config = load_config(TINY, [f"data.dir={root / 'data'}", "trainer.epochs=2", *settings])
        train_precomp(config, root / name)
    return {"root": root, "data": root / "data", "a": root / "a", "b": root / "b"}


def told(*arguments: object, code: int = 0) -> str:
    pytest.importorskip("typer")
    from typer.testing import CliRunner

    from setemb.cli import app

    result = CliRunner().invoke(app, ["eval", *map(str, arguments)], env={"COLUMNS": "220"})
    assert result.exit_code == code, result.output
    return result.output


def test_the_command_compares_models_and_adds_them_up(runs: dict[str, Path], tmp_path: Path) -> None:
    pytest.importorskip("typer")
    from setemb.training import encode_precomp, load_trained

    out = tmp_path / "all.json"
    text = told(runs["a"], runs["b"], "--ensemble", "--json", out)
    report = json.loads(out.read_text())
    assert [of["model"] for of in report["models"]] == [str(runs["a"]), str(runs["b"])]
    for of in report["models"]:
        alone = tmp_path / "one.json"
        said = told(of["model"], "--json", alone)
        assert json.loads(alone.read_text()) == {key: value for key, value in of.items() if key != "model"}
        assert f"RSUM {of['rsum']:.1f}" in " ".join(said.split())
        assert f"{of['rsum']:.1f}" in text
    # what was encoded by each model's own encoders, compared by its own similarity, added up
    sims = []
    for name in ("a", "b"):
        model, trained = load_trained(runs[name])
        assert trained is not None
        _, parts = encode_precomp(model, trained, "dev")
        with torch.inference_mode():
            sims.append(model.similarity(*(torch.cat([part[i] for part in parts]) for i in (0, 1))).double())
    ensemble = report["ensemble"]
    s, near = (sims[0] + sims[1]) / 2, 1e-5  # other sums of float32: a near tie may turn
    for way, least, most in zip(
        ("image_to_text", "text_to_image"), ranks_by_counting(s, -near), ranks_by_counting(s, near), strict=True
    ):
        assert least.mean() <= ensemble[way]["mean_rank"] - 1 <= most.mean()
        for k in (1, 5, 10):
            assert 100 * np.mean(most < k) <= ensemble[way][f"r{k}"] <= 100 * np.mean(least < k)
        assert most.mean() - least.mean() < 1
    assert f"{ensemble['rsum']:.1f}" in text and "ensemble" in text
    assert "sets" not in ensemble
    folds = tmp_path / "folds.json"
    told(runs["a"], runs["b"], "--ensemble", "--folds", 4, "--json", folds)
    within = json.loads(folds.read_text())["ensemble"]
    assert within["rsum"] > ensemble["rsum"]  # among a quarter of the others


def test_settings_between_models_are_of_the_one_before(runs: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for name in ("dev_ims.npy", "dev_caps.txt"):
        (other / name).write_bytes((runs["data"] / name).read_bytes())
    captions = (other / "dev_caps.txt").read_text()
    (other / "dev_caps.txt").write_text(captions.replace("A ", "a ").replace(".", ""))  # the same but for their form
    told(runs["a"], f"data.dir={other}", runs["b"], "--ensemble")
    (other / "dev_caps.txt").write_text("something else\n" + captions.split("\n", 1)[1])
    said = told(runs["a"], runs["b"], f"data.dir={other}", "--ensemble")  # both of them
    assert "ensemble" in said
    said = told(runs["a"], f"data.dir={other}", runs["b"], "--ensemble", code=2)
    assert "caption 0 of" in said and "'something else'" in said
    told(runs["a"], f"data.dir={other}", runs["b"])  # side by side they may differ
    np.save(other / "dev_ims.npy", np.load(other / "dev_ims.npy")[:60])
    (other / "dev_caps.txt").write_text("".join(line + "\n" for line in captions.split("\n")[:300]))
    said = told(runs["a"], runs["b"], f"data.dir={runs['data']}", "--ensemble")
    said = told(runs["a"], f"data.dir={other}", runs["b"], f"data.dir={runs['data']}", "--ensemble", code=2)
    assert "has 60 images and 300 captions" in said and "64 and 320" in said


def test_eccv_caption_of_each_and_of_all(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures themselves are in `tests.model.test_coco`; they want COCO's 25,000 captions."""
    asked = []

    def counted(similarities: Similarities, pmrp_files: Path | None = None) -> dict[str, dict[str, float]]:
        asked.append((len(similarities.members), similarities.shape, pmrp_files))
        return {"eccv_r1": {"image_to_text": 10.0 * len(asked), "text_to_image": 0.5}}

    monkeypatch.setattr("setemb.coco.eccv_caption_of", counted)
    out = tmp_path / "report.json"
    said = told(runs["a"], runs["b"], "--ensemble", "--eccv", "--pmrp", tmp_path, "--json", out)
    assert asked == [(1, (64, 320), tmp_path), (1, (64, 320), tmp_path), (2, (64, 320), tmp_path)]
    report = json.loads(out.read_text())
    assert [of["eccv"]["eccv_r1"]["image_to_text"] for of in (*report["models"], report["ensemble"])] == [10, 20, 30]
    assert "eccv_r1" in said and "ensemble, image → text" in said and "30.0" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{a}", "--ensemble"], "--ensemble wants two models or more, got 1"),
        (["{a}", "--plot", "x.png"], "--plot draws an .svg file, got x.png"),
        (["data.dir=x", "{a}"], "the first argument must be a model, got 'data.dir=x'"),
        (["{a}", "loss.margin=1"], "eval takes data.KEY=VALUE settings alone, got 'loss.margin=1'"),
        (["{a}", "{root}"], "holds neither a model nor a run"),
    ],
)
def test_wrong_commands_are_one_sentence(runs: dict[str, Path], arguments: list[str], message: str) -> None:
    said = told(*(argument.format(**runs) for argument in arguments), code=2)
    assert message in " ".join(said.split())


def test_a_converted_checkpoint_in_an_ensemble(runs: dict[str, Path], tmp_path: Path) -> None:
    """Published weights look at padding (padding="dive"); they need no run and take the settings that are given."""
    pytest.importorskip("nltk")
    from setemb.config import ModelConfig
    from setemb.data.vocab import Vocabulary
    from setemb.model import SetEmbedder
    from setemb.published import convert
    from tests.model.test_published import published_names, save_published, save_words

    torch.manual_seed(0)
    config = ModelConfig(dim=8)
    config.image.dim_in, config.text.dim_word, config.sets.dim_head, config.sets.padding = 12, 5, 3, "dive"
    config.text.tokenizer, config.image.hidden = "treebank", 4
    words = Vocabulary(["a", "dog", "cat", "red", "green"], "treebank")
    config.text.vocab_size = len(words)
    state = published_names(SetEmbedder(config, words))
    theirs = ["<pad>", "<start>", "<end>", "<unk>", "a", "dog", "cat", "red", "green"]
    order = [words.words.index(word) for word in [*theirs, "<mask>"]]
    state["txt_enc.embed.weight"] = state["txt_enc.embed.weight"][order]
    path = save_published(tmp_path / "c.pth.tar", state)
    converted = convert(path, save_words(tmp_path / "v.pkl", theirs))
    assert converted.config.sets.padding == "dive"
    converted.save_pretrained(tmp_path / "converted")
    out = tmp_path / "report.json"
    told(runs["a"], tmp_path / "converted", f"data.dir={runs['data']}", "--ensemble", "--json", out)
    report = json.loads(out.read_text())
    trained, random = (of["rsum"] for of in report["models"])
    assert trained > report["ensemble"]["rsum"] > random
