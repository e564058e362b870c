"""The paper's recipes: their settings, and that each trains, with small sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("omegaconf")
pytest.importorskip("PIL")

from setemb.config import load_config, recipes
from setemb.data.vectors import read_vectors
from setemb.modules import TransformerTextEncoder
from setemb.training import load_model, read_metrics, train_precomp
from tests.model.folders import write_bert, write_karpathy
from tests.model.stand_in import StandIn, timm

__all__ = ["timm"]

OURS = ["f30k-clip"]  # see tests.model.test_open_clip
PAPER = [name for name in recipes() if name.startswith(("coco-", "f30k-")) and name not in OURS]
SMALL = [
    "model.dim=16",
    "model.sets.dim_head=4",
    "data.batch_size=4",
    "data.min_word_count=1",
    "data.workers=0",
    "trainer.epochs=2",
    "trainer.precision=32",
    "trainer.accelerator=cpu",
    "trainer.progress=false",
    "trainer.log_every=1",
]


def test_there_is_one_for_each_row_of_the_tables():
    rows = ("region-bigru", "region-bert", "resnet152-bigru", "resnext101-bert")
    assert sorted(f"{data}-{row}" for data in ("coco", "f30k") for row in rows) == PAPER


@pytest.mark.parametrize("name", PAPER)
def test_the_settings_are_those_of_the_paper(name):
    data, image, text = name.split("-")
    config = load_config(name)
    model, loss, optimizer, trainer = config.model, config.loss, config.optimizer, config.trainer
    assert (model.dim, model.similarity, model.alpha) == (1024, "smooth_chamfer", 16.0)
    sets = model.sets
    assert (sets.num_slots, sets.iterations, sets.heads, sets.dim_head, sets.dropout) == (4, 4, 4, 512, 0.1)
    assert (loss.kind, loss.margin, loss.hardest_fraction) == ("triplet", 0.2, 1.0)
    assert (loss.mmd, loss.diversity) == (0.01, 0.01)
    assert (optimizer.lr, optimizer.weight_decay, optimizer.warmup_steps) == (1e-3, 1e-4, 0)
    assert (optimizer.image_factor, optimizer.text_factor, optimizer.sets_factor) == (0.1, 1.0, 0.1)
    assert (trainer.epochs, trainer.gradient_clip, trainer.precision) == (80, 1.0, "16-mixed")
    assert (config.data.batch_size, config.data.captions_per_image, config.data.word_drop) == (200, 5, 0.2)
    assert (model.image.pooling, model.image.dropout, model.image.hidden or model.dim // 2) == ("max", 0.1, 512)
    if image == "region":
        assert (model.image.encoder, config.data.format, config.data.region_drop) == ("regions", "precomp", 0.2)
    else:
        size, backbone = (224, "resnet152.tv") if image == "resnet152" else (512, "resnext101_32x8d.fb_wsl")
        assert (model.image.encoder, model.image.frozen, config.data.picture_size) == ("pictures", False, size)
        assert model.image.backbone.startswith(backbone)
        assert config.data.caption_limit == 5
        assert config.data.train_split == ("train+restval" if data == "coco" else "train")
    if text == "bigru":
        assert (model.text.encoder, model.text.dim_word, model.text.tokenizer) == ("bigru", 300, "treebank")
    else:
        assert (model.text.encoder, model.text.source) == ("transformer", "bert-base-uncased")
        assert not model.text.frozen
    assert model.text.position == "sine"


@pytest.mark.parametrize("name", PAPER)
def test_each_trains_with_small_sizes(name, timm: StandIn, tmp_path: Path):
    _, image, text = name.split("-")
    if text == "bigru":
        pytest.importorskip("nltk")
    settings = [*SMALL, f"data.dir={tmp_path / 'data'}"]
    if image == "region":
        (tmp_path / "data").mkdir()
        for split in ("train", "dev"):
            np.save(tmp_path / "data" / f"{split}_ims.npy", np.random.default_rng(0).normal(size=(8, 6, 12)))
            captions = "".join(f"A thing, number {i}; it's text {k}.\n" for i in range(8) for k in range(5))
            (tmp_path / "data" / f"{split}_caps.txt").write_text(captions)
    else:
        write_karpathy(tmp_path / "data", {"train": 8, "restval": 4, "val": 4, "test": 4})
        settings += ["model.image.backbone=tiny", "model.image.weights=random", "data.picture_size=16"]
    if text == "bert":
        write_bert(tmp_path / "bert")
        settings.append(f"model.text.source={tmp_path / 'bert'}")
    model = load_model(train_precomp(load_config(name, settings), tmp_path / "run"))
    losses = [row["loss"] for row in read_metrics(tmp_path / "run") if "loss" in row]
    assert len(losses) == (4 if image == "region" or name.startswith("f30k") else 6)
    assert np.isfinite(losses).all()
    trained = {head for head, p in model.named_parameters() if p.requires_grad}
    assert any(".backbone." in head for head in trained) == (image != "region")
    assert any(head.startswith("text_encoder.model.") for head in trained) == (text == "bert")
    if text == "bigru":
        assert "," in model.vocabulary.words


def test_a_language_model_is_pooled_as_asked_and_built_without_its_weights(tmp_path):
    write_bert(tmp_path / "bert")
    encoders = {
        pooling: TransformerTextEncoder(str(tmp_path / "bert"), 8, pooling=pooling).eval()
        for pooling in ("mean", "max", "first")
    }
    ids, mask = encoders["max"].tokenize(["a dog", "two cats and a dog"])
    for pooling, encoder in encoders.items():
        local, whole, _ = encoder(ids, mask)
        own = local[0, mask[0]]
        expected = {"mean": own.mean(0), "max": own.amax(0), "first": own[0]}[pooling]
        torch.testing.assert_close(whole[0], expected)
    assert (encoders["max"].mask_id, encoders["max"].vocab_size) == (103, 30522)
    (tmp_path / "bert" / "model.safetensors").unlink()
    TransformerTextEncoder(str(tmp_path / "bert"), 8, pretrained=False)
    with pytest.raises(ValueError, match='pooling must be "mean", "max" or "first", got \'min\''):
        TransformerTextEncoder(str(tmp_path / "bert"), 8, pooling="min")


def test_word_vectors_are_read_a_line_at_a_time(tmp_path):
    path = tmp_path / "v.txt"
    path.write_text("dog 1 2\n. . . 9 9\nice-cream 5 6\nmans 3 4\nman's 7 8\nunused x y\n", encoding="utf-8")
    vectors, found = read_vectors(path, ["man's", "cat", "dog", "ice-cream", "dog's", ". . ."], 2)
    assert vectors.tolist() == [[7, 8], [0, 0], [1, 2], [5, 6], [0, 0], [9, 9]]
    assert found.tolist() == [True, False, True, True, False, True]
    for order in ("mans 3 4\nman's 7 8\n", "man's 7 8\nmans 3 4\n"):  # the word itself wins, wherever it stands
        path.write_text(order)
        assert read_vectors(path, ["man's"], 2)[0].tolist() == [[7, 8]]
    path.write_text("mans 3 4\n")
    assert read_vectors(path, ["man's"], 2)[0].tolist() == [[3, 4]]
    path.write_text("2 2\ndog 1 2\ncat 3 4\n")  # word2vec's first line
    assert read_vectors(path, ["cat"], 2)[0].tolist() == [[3, 4]]
    for text, message in (
        ("dog 1\n", r"v\.txt, line 1: expected a word and 2 numbers"),
        ("a 1 2\ndog 1 x\n", "line 2:"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_vectors(path, ["dog"], 2)
    with pytest.raises(FileNotFoundError, match="no word vectors"):
        read_vectors(tmp_path / "none", ["dog"], 2)


def test_training_starts_at_word_vectors(tiny_precomp, tmp_path):
    tiny = Path(__file__).parents[1] / "data" / "tiny.yaml"
    path = tmp_path / "v.txt"
    path.write_text("dog 1 2\nnothing 3 4\n")
    settings = [f"data.dir={tiny_precomp}", "trainer.epochs=1", "optimizer.lr=0", "model.text.dim_word=2"]
    config = load_config(tiny, [*settings, f"model.text.word_vectors={path}"])
    model = load_model(train_precomp(config, tmp_path / "run"))
    weight = model.text_encoder.embed.weight
    assert weight[model.vocabulary.words.index("dog")].tolist() == [1, 2]
    assert weight[model.vocabulary.words.index("cat")].tolist() != [0, 0]
    path.write_text("nothing 3 4\n")
    with pytest.raises(ValueError, match=r"v\.txt holds none of the \d+ words of the training captions"):
        train_precomp(config, tmp_path / "other")
