"""Files of models and checkpoints: round trips, and refusal of what was cut short or altered."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from setemb.checkpoint import load_checkpoint, save_checkpoint, write_file
from setemb.config import ModelConfig
from setemb.data.vocab import Vocabulary
from setemb.model import SetEmbedder


def tiny_model(encoder: str = "bigru", **settings) -> SetEmbedder:
    torch.manual_seed(0)
    config = ModelConfig(dim=8, **settings)
    config.image.dim_in = 6
    config.text.encoder, config.text.dim_word, config.text.dim_in = encoder, 5, 7
    config.sets.dim_head = 4
    vocabulary = Vocabulary(["dog", "cat"]) if encoder == "bigru" else None
    config.text.vocab_size = len(vocabulary) if vocabulary is not None else 0
    return SetEmbedder(config, vocabulary).eval()


def tiny_batch(encoder: str = "bigru") -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    texts = torch.randint(1, 7, (6, 4)) if encoder == "bigru" else torch.randn(6, 4, 7)
    return {
        "images": torch.randn(3, 5, 6),
        "texts": texts,
        "text_mask": torch.arange(4) < torch.tensor([4, 3, 2, 1, 4, 4])[:, None],
    }


@pytest.mark.parametrize("encoder", ["bigru", "features"])
def test_a_saved_model_comes_back_bit_by_bit(tmp_path, encoder):
    model, batch = tiny_model(encoder), tiny_batch(encoder)
    model.save_pretrained(tmp_path / "m")
    again = SetEmbedder.from_pretrained(tmp_path / "m")
    assert not again.training
    assert again.config == model.config
    assert (again.vocabulary is None) == (encoder != "bigru")
    images, texts = model.encode_image(batch, return_attention=True), model.encode_text(batch)
    assert torch.equal(again.encode_image(batch).embeddings, images.embeddings)
    assert torch.equal(again.encode_text(batch).embeddings, texts.embeddings)
    assert images.attention is not None
    assert images.attention.shape == (3, 4, 4, 5)
    assert model.similarity(images, texts).shape == (3, 6)
    assert sorted(p.name for p in (tmp_path / "m").iterdir() if p.name != "vocab.txt") == [
        "config.json",
        "model.safetensors",
    ]


@pytest.mark.parametrize("name", ["model.safetensors", "vocab.txt"])
def test_a_model_file_cut_short_or_altered_is_refused(tmp_path, name):
    tiny_model().save_pretrained(tmp_path)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:-1])
    with pytest.raises(
        ValueError, match=rf"{name} was cut short or altered: {len(whole) - 1} bytes, expected {len(whole)}"
    ):
        SetEmbedder.from_pretrained(tmp_path)
    (tmp_path / name).write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    with pytest.raises(ValueError, match=f"{name} was altered"):
        SetEmbedder.from_pretrained(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        SetEmbedder.from_pretrained(tmp_path)


def test_a_saved_model_loads_with_the_required_packages_alone(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['omegaconf', 'lightning', 'typer', 'transformers']))\n"
        "from setemb import SetEmbedder; print(len(SetEmbedder.from_pretrained(sys.argv[1]).state_dict()))"
    )
    root = Path(__file__).parents[2]
    result = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, cwd=root)
    assert result.stdout.strip() == str(len(tiny_model().state_dict())), result.stderr


def test_a_wrong_model_description_is_refused(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    whole = path.read_text()
    path.write_text(whole[:40])
    with pytest.raises(ValueError, match=r"config\.json is not the description"):
        SetEmbedder.from_pretrained(tmp_path)
    for change, message in (
        ({"format": 99}, "has format 99, expected 1"),
        ({"model": {"width": 3}}, 'unknown setting "width"'),
        ({"files": {}}, r"config\.json"),
    ):
        path.write_text(json.dumps(json.loads(whole) | change))
        with pytest.raises(ValueError, match=message):
            SetEmbedder.from_pretrained(tmp_path)
    other = json.loads(whole)
    other["model"]["dim"] = 12
    path.write_text(json.dumps(other))
    with pytest.raises(ValueError, match="the weights do not fit"):
        SetEmbedder.from_pretrained(tmp_path)


def test_settings_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r'"cosine" needs sets\.num_slots = 1, got 4'):
        tiny_model(similarity="cosine")
    with pytest.raises(ValueError, match=r"image.dim_in must be at least 1"):
        SetEmbedder(ModelConfig())
    config = ModelConfig()
    config.image.dim_in = config.text.dim_in = 4
    config.text.encoder, config.text.pooling = "features", "first"
    with pytest.raises(ValueError, match=r'text\.pooling "first" is for the text encoder "transformer" alone'):
        SetEmbedder(config)


def test_a_checkpoint_comes_back_as_it_was(tmp_path):
    shared = torch.arange(6.0)
    content = {
        "tensors": [shared, shared.view(2, 3).T, torch.tensor(3), torch.ones(2, dtype=torch.bfloat16)],
        "numbers": {0: 1, 7: 0.1 + 0.2, "nan": float("inf")},
        "none": (None, True, "text"),
        "ordered": OrderedDict([("b", 1), ("a", ())]),
        "$tensor": "a key that looks like a tag",
    }
    save_checkpoint(content, tmp_path / "c.safetensors")
    again = load_checkpoint(tmp_path / "c.safetensors")
    for ours, theirs in zip(again.pop("tensors"), content.pop("tensors"), strict=True):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)
    assert again == content
    assert isinstance(again["ordered"], OrderedDict)
    assert list(again["numbers"]) == [0, 7, "nan"]
    with pytest.raises(TypeError, match=r"checkpoint\.a\.1 holds a object"):
        save_checkpoint({"a": [1, object()]}, tmp_path / "c.safetensors")
    assert load_checkpoint(tmp_path / "c.safetensors")["none"] == (None, True, "text")  # the old file is whole
    with pytest.raises(TypeError, match="a key of tuple"):
        save_checkpoint({(1, 2): 3}, tmp_path / "c.safetensors")


def test_names_with_dots_are_kept_apart(tmp_path):
    tensors = {"a.b": torch.zeros(1), "a": {"b": torch.ones(1)}, 1: torch.ones(2), "1": torch.zeros(2)}
    save_checkpoint(tensors, tmp_path / "c")
    again = load_checkpoint(tmp_path / "c")
    assert again["a.b"] == 0 and again["a"]["b"] == 1
    assert again[1].tolist() == [1, 1] and again["1"].tolist() == [0, 0]


def test_a_checkpoint_cut_short_or_altered_is_refused(tmp_path):
    path = tmp_path / "c.safetensors"
    save_checkpoint({"w": torch.arange(100.0), "epoch": 3}, path)
    whole = path.read_bytes()
    for size in (0, 7, 50, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="was cut short or altered"):
            load_checkpoint(path)
    for place in (len(whole) - 10, whole.index(b"epoch")):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="altered"):
            load_checkpoint(path)
    tiny_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"model\.safetensors has format 'pt', expected 'setemb-checkpoint-1'"):
        load_checkpoint(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        load_checkpoint(tmp_path / "none.safetensors")


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_file(path, b"old")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", fail)
        with pytest.raises(OSError, match="disk full"):
            write_file(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["f"]
