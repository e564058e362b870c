"""Checkpoints of the published code: the same numbers from our modules, and nothing in them is run."""

from __future__ import annotations

import argparse
import json
import os
import pickle
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("typer")

from typer.testing import CliRunner

from setemb.cli import app
from setemb.config import DataConfig, ModelConfig
from setemb.data.vocab import Vocabulary, treebank_words
from setemb.model import SetEmbedder
from setemb.published import NAMES, convert
from tests.model.folders import write_bert
from tests.model.test_modules import RUNNING_MEAN, RUNNING_VAR

DEPTH = 4


def tied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As the published module lists its weights: the shared layer once for each iteration."""
    result = dict(state)
    for name, tensor in state.items():
        if ".layers.0." in name:
            result |= {name.replace(".layers.0.", f".layers.{i}."): tensor for i in range(1, DEPTH)}
    return result


def save_published(path: Path, state: dict[str, torch.Tensor], prefix: str = "", **settings: object) -> Path:
    options = {"temperature": 16.0, "spm_txt_pos_enc_type": "sine", "cnn_type": "resnet152"}
    options |= {"img_res_pool": "max", "txt_pooling": "rnn", **settings}
    state = {prefix + name: tensor for name, tensor in tied(state).items()}
    torch.save({"args": argparse.Namespace(**options), "epoch": 79, "best_score": 524.6, "model": state}, path)
    return path


def save_words(path: Path, words: list[str]) -> Path:
    """A pickle of an object of the published class."""
    module = types.ModuleType("vocab")
    module.Vocabulary = type("Vocabulary", (), {"__module__": "vocab"})
    instance = module.Vocabulary()
    instance.word2idx = {word: i for i, word in enumerate(words)}
    instance.idx2word = dict(enumerate(words))
    instance.idx = len(words)
    sys.modules["vocab"] = module
    try:
        path.write_bytes(pickle.dumps(instance, 4))
    finally:
        del sys.modules["vocab"]
    return path


def published_names(model: SetEmbedder) -> dict[str, torch.Tensor]:
    """A model's weights under the published names."""
    result = {}
    for name, tensor in model.state_dict().items():
        ours = name.replace(".regions.", ".")
        theirs, head = max(
            ((t, o) for t, o in NAMES.items() if ours.startswith(f"{o}.") or ours == o), key=lambda p: len(p[1])
        )
        result[theirs + ours.removeprefix(head)] = tensor
    return result


def small_model() -> SetEmbedder:
    torch.manual_seed(0)
    config = ModelConfig(dim=8)
    config.image.dim_in, config.text.dim_word, config.sets.dim_head, config.sets.padding = 6, 5, 3, "dive"
    config.text.tokenizer, config.image.hidden = "treebank", 4
    words = Vocabulary(["a", "dog", ",", "cat", "'s"], "treebank")
    config.text.vocab_size = len(words)
    return SetEmbedder(config, words).eval()


THEIR_WORDS = ["<pad>", "<start>", "<end>", "<unk>", "a", "dog", ",", "cat", "'s"]


def small_published(folder: Path, **settings: object) -> tuple[SetEmbedder, Path, Path]:
    """A model, and the same in the published layout: other numbers of the words, "<mask>" last."""
    model = small_model()
    state = published_names(model)
    order = [model.vocabulary.words.index(word) for word in [*THEIR_WORDS, "<mask>"]]
    state["txt_enc.embed.weight"] = state["txt_enc.embed.weight"][order]
    return model, save_published(folder / "c.pth.tar", state, **settings), save_words(folder / "v.pkl", THEIR_WORDS)


@pytest.mark.parametrize("prefix", ["", "module."])
def test_a_checkpoint_becomes_the_model_that_it_was(tmp_path, prefix):
    model, path, words = small_published(tmp_path, prefix=prefix)
    found = convert(path, words)
    assert found.config == model.config
    assert found.vocabulary.words == model.vocabulary.words
    for name, tensor in model.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    (tmp_path / "v.json").write_text(json.dumps({"word2idx": {word: i for i, word in enumerate(THEIR_WORDS)}}))
    assert convert(path, tmp_path / "v.json").vocabulary.words == model.vocabulary.words
    other = convert(small_published(tmp_path, prefix=prefix, temperature=8.0, spm_txt_pos_enc_type="none")[1], words)
    assert (other.config.alpha, other.config.text.position) == (8.0, "none")
    mean = convert(small_published(tmp_path, prefix=prefix, img_res_pool="avg")[1], words)
    assert (mean.config.image.pooling, found.config.image.pooling) == ("mean", "max")


def test_the_command_gives_the_published_numbers(published, tmp_path):
    arrays = published("encoders.npz")
    state = {
        f"{enc}.{key.removeprefix(group)}": torch.tensor(value)
        for group, enc in (("img_param/", "img_enc"), ("txt_param/", "txt_enc"))
        for key, value in arrays.items()
        if key.startswith(group)
    }
    state["img_enc.mlp.bn.bn.running_mean"] = torch.tensor(RUNNING_MEAN)
    state["img_enc.mlp.bn.bn.running_var"] = torch.tensor(RUNNING_VAR)
    path = save_published(tmp_path / "model_best.pth.tar", state, prefix="module.")
    theirs = ["<pad>", "<start>", "<end>", "<unk>", *(f"w{i}" for i in range(4, 39))]
    words = save_words(tmp_path / "vocab.pkl", theirs)
    result = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "out"), "--vocabulary", str(words)])
    assert result.exit_code == 0, result.output
    model = SetEmbedder.from_pretrained(tmp_path / "out")
    assert (model.config.sets.iterations, model.config.sets.dim_head, model.config.sets.padding) == (4, 512, "dive")
    ids = torch.tensor(arrays["txt/ids"])
    ours = torch.tensor([model.vocabulary.words.index(word) for word in [*theirs, "<mask>"]])[ids]
    mask = torch.arange(ids.shape[1]) < torch.tensor(arrays["txt/lens"])[:, None]
    with torch.inference_mode():
        images = model.encode_image({"images": torch.tensor(arrays["img/feats"])})
        texts = model.encode_text({"texts": ours, "text_mask": mask})
    for found, side in ((images, "img"), (texts, "txt")):
        for key, value in (("out", found.embeddings), ("set_prediction", found.slots)):
            torch.testing.assert_close(value, torch.tensor(arrays[f"{side}/{key}"]), rtol=1e-5, atol=1e-5)
    again = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "out"), "--vocabulary", str(words)])
    assert again.exit_code == 2 and "exists and is not empty" in again.stderr


def test_a_converted_model_is_evaluated(tmp_path):
    pytest.importorskip("lightning")
    pytest.importorskip("nltk")
    from setemb.training import evaluate_precomp

    model, path, words = small_published(tmp_path)
    np.save(tmp_path / "test_ims.npy", np.random.default_rng(0).normal(size=(4, 3, 6)).astype(np.float32))
    texts = ["A dog, a cat.", "a cat's", "dog", "The cat"] * 2
    (tmp_path / "test_caps.txt").write_text("\n".join(texts) + "\n")
    convert(path, words).save_pretrained(tmp_path / "out")
    model.save_pretrained(tmp_path / "original")
    settings = DataConfig(dir=str(tmp_path))
    reports = [evaluate_precomp(tmp_path / name, settings, "test") for name in ("out", "original")]
    assert reports[0] == reports[1]
    np.testing.assert_array_equal(reports[0].caption_ranks, reports[1].caption_ranks)


def test_words_are_those_of_the_published_tokenizer():
    pytest.importorskip("nltk")
    assert treebank_words("A man's dog isn't (here). It ran, far.") == [
        *("a", "man", "'s", "dog", "is", "n't", "(", "here", ")", ".", "it", "ran", ",", "far", "."),
    ]
    vocabulary = Vocabulary.build(["A dog.", "a cat, a dog."], 2, "treebank")
    assert vocabulary.words[5:] == ["a", ".", "dog"]
    assert vocabulary.encode("dog.") == [Vocabulary.START, 7, 6, Vocabulary.END]
    assert Vocabulary.from_text(vocabulary.to_text(), "treebank").encode("dog.") == vocabulary.encode("dog.")
    with pytest.raises(ValueError, match="tokenizer must be one of words, treebank, got 'nltk'"):
        Vocabulary([], "nltk")


def test_tokenizing_without_its_package_names_the_extra(monkeypatch):
    from setemb.data import vocab

    vocab._treebank_tokenizer.cache_clear()
    monkeypatch.setitem(sys.modules, "nltk", None)
    monkeypatch.setitem(sys.modules, "nltk.tokenize.destructive", None)
    with pytest.raises(ImportError, match=r'pip install "setemb\[nltk\]"'):
        treebank_words("a")
    vocab._treebank_tokenizer.cache_clear()


class Evil:
    """Unpickled, it makes a folder."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_what_could_run_is_refused_and_not_run(tmp_path):
    trap = tmp_path / "trap"
    _, path, words = small_published(tmp_path)
    content = torch.load(path, weights_only=False)
    for place in ("args", "extra"):
        torch.save({**content, place: Evil(trap)}, tmp_path / "evil.pth.tar")
        with pytest.raises(ValueError, match=r"evil\.pth\.tar holds more than tensors and settings: .*mkdir.*refused"):
            convert(tmp_path / "evil.pth.tar", words)
    torch.save({**content, "x": Evil(trap)}, tmp_path / "evil.pth.tar", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match="refused"):
        convert(tmp_path / "evil.pth.tar", words)
    for value in (Evil(trap), {"word2idx": Evil(trap)}):
        (tmp_path / "evil.pkl").write_bytes(pickle.dumps(value))
        with pytest.raises(ValueError, match=r"evil\.pkl holds more than words: it could run anything; refused"):
            convert(path, tmp_path / "evil.pkl")
    assert not trap.exists()
    pickle.loads(pickle.dumps(Evil(trap)))
    assert trap.exists()  # the trap works
    result = CliRunner().invoke(app, ["convert", str(tmp_path / "evil.pth.tar"), str(tmp_path / "out")])
    assert result.exit_code == 2 and "refused" in result.stderr
    assert not (tmp_path / "out").exists()


def test_what_does_not_fit_is_named(tmp_path):
    _, path, words = small_published(tmp_path)
    content = torch.load(path, weights_only=False)
    state, args = content["model"], content["args"]

    def refused(message: str, change: dict[str, object] | None, vocabulary: Path | None = words) -> None:
        changed = {k: v for k, v in {**state, **(change or {})}.items() if v is not None}
        torch.save({**content, "model": changed}, tmp_path / "bad.pth.tar")
        with pytest.raises(ValueError, match=message):
            convert(tmp_path / "bad.pth.tar", vocabulary)

    refused(r"bad\.pth\.tar has a GRU: name its vocabulary", {}, None)
    refused("another architecture: img_enc.pie.w", {"img_enc.pie.w": torch.zeros(1)})
    refused("another architecture: img_enc.mlp.fc1.weight is missing", {"img_enc.mlp.fc1.weight": None})
    refused("another architecture: .*text_encoder.rnn.bias_hh_l0", {"txt_enc.rnn.bias_hh_l0": None})
    refused("images have 4 slots of 8, texts 3 of 8", {"txt_enc.spm.agg_block.latents": torch.zeros(3, 8)})
    tied_name = "img_enc.spm.agg_block.layers.2.0.fn.to_q.weight"
    refused(r"layers\.2\.0\.fn\.to_q\.weight differs from .*layers\.0\.", {tied_name: state[tied_name] + 1})
    refused("something other than tensors under 'model'", {"x": "text"})
    refused("another architecture: img_enc.fc.weight is missing", {"img_enc.fc.weight": None})
    queries = [f"img_enc.spm.agg_block.layers.{i}.0.fn.to_q.weight" for i in range(DEPTH)]
    refused(r"another architecture: img_enc.*layers\.0\.0\.fn\.to_q\.weight is missing", dict.fromkeys(queries))
    fewer = {name: None for name in state if name.startswith("txt_enc") and ".layers.3." in name}
    refused(r"as many iterations.*img_enc.*layers\.: 0, 1, 2, 3; txt_enc.*layers\.: 0, 1, 2$", fewer)
    cnn = {"img_enc.cnn.conv1.weight": torch.zeros(1)}
    for name, bad in (
        ("temperature", "16"),
        ("spm_txt_pos_enc_type", "fourier"),
        ("img_res_pool", "avgmax"),
        ("txt_pooling", "max"),
        ("cnn_type", None),
    ):
        content["args"] = argparse.Namespace(**{k: v for k, v in vars(args).items() if k != name})
        refused(f"bad.pth.tar.*settings.*{name}|does not say '{name}'", cnn if name == "cnn_type" else {})
        content["args"] = argparse.Namespace(**{**vars(args), name: bad})
        refused(f"{name}.*got {bad!r}", cnn if name == "cnn_type" else {})
    content["args"] = args
    content["args"].cnn_type = "vgg19"
    refused("cnn_type must be one of resnet152, resnext_wsl, got 'vgg19'", cnn)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        convert(tmp_path / "none.pth.tar")
    torch.save({"weights": {}}, tmp_path / "bad.pth.tar")
    with pytest.raises(ValueError, match="holds no weights under 'model'"):
        convert(tmp_path / "bad.pth.tar")
    whole = path.read_bytes()
    for size in (0, 100, len(whole) - 100):
        (tmp_path / "bad.pth.tar").write_bytes(whole[:size])
        with pytest.raises(ValueError, match=r"bad\.pth\.tar was cut short or is no checkpoint"):
            convert(tmp_path / "bad.pth.tar", words)
    for bad, message in (
        (save_words(tmp_path / "few.pkl", THEIR_WORDS[:-1]), r"few\.pkl holds 9 words, the checkpoint 10"),
        (save_words(tmp_path / "odd.pkl", ["x", *THEIR_WORDS[1:]]), r"odd\.pkl lacks <pad>"),
    ):
        with pytest.raises(ValueError, match=message):
            convert(path, bad)
    (tmp_path / "cut.pkl").write_bytes(words.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"cut\.pkl was cut short or holds no vocabulary"):
        convert(path, tmp_path / "cut.pkl")


def test_a_checkpoint_with_bert(tmp_path):
    source = tmp_path / "bert"
    write_bert(source)
    model_settings = ModelConfig(dim=8)
    model_settings.image.dim_in, model_settings.sets.dim_head, model_settings.sets.padding = 6, 3, "dive"
    model_settings.text.encoder, model_settings.text.source = "transformer", str(source)
    model_settings.text.pooling = "max"
    model = SetEmbedder(model_settings, pretrained=False).eval()
    state = published_names(model) | {"txt_enc.bert.embeddings.position_ids": torch.arange(512)[None]}
    found = convert(save_published(tmp_path / "c.pth.tar", state, txt_pooling="max"), source=str(source))
    assert found.config.text.pooling == "max"
    ids, mask = model.text_encoder.tokenize(["a dog", "two cats and a dog"])
    batch = {"texts": ids, "text_mask": mask}
    with torch.inference_mode():
        assert torch.equal(found.encode_text(batch).embeddings, model.encode_text(batch).embeddings)
    first = convert(save_published(tmp_path / "d.pth.tar", state, txt_pooling="cls"), source=str(source))
    assert first.config.text.pooling == "first"
    local, whole, _ = first.text_encoder(ids, mask)
    assert torch.equal(local[:, 0], whole)


def test_a_checkpoint_with_a_backbone(tmp_path):
    """Published backbones are torchvision's, whose names are timm's."""
    pytest.importorskip("timm", exc_type=ImportError)
    torch.manual_seed(0)
    config = ModelConfig(dim=8)
    config.image.encoder, config.image.hidden, config.sets.dim_head, config.sets.padding = "pictures", 4, 3, "dive"
    config.text.dim_word, config.text.vocab_size = 5, 10
    model = SetEmbedder(config, pretrained=False).eval()
    state = published_names(model)
    assert "img_enc.cnn.layer4.2.bn3.running_var" in state
    found = convert(save_published(tmp_path / "c.pth.tar", state), save_words(tmp_path / "v.pkl", THEIR_WORDS))
    pictures = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    with torch.inference_mode():
        embeddings = [m.encode_image({"images": pictures}).embeddings for m in (found, model)]
    assert torch.equal(*embeddings)
