"""The precomputed format, vocabularies, and batches that are a function of the seed and the step."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from setemb.data.captions import FeatureCaptions, TokenCaptions, WordCaptions
from setemb.data.precomp import PrecompDataset
from setemb.data.vocab import Vocabulary, words

loader = pytest.importorskip("setemb.data.loader", reason="needs lightning", exc_type=ImportError)


def test_words_and_vocabulary_round_trip():
    assert words("A man's hat, 2 dogs -- café!") == ["a", "man's", "hat", "2", "dogs", "café"]
    vocabulary = Vocabulary.build(["b a b", "c b a"], min_count=2)
    assert vocabulary.words[5:] == ["b", "a"]
    ids = vocabulary.encode("A c b")
    assert ids == [Vocabulary.START, 6, Vocabulary.UNKNOWN, 5, Vocabulary.END]
    assert Vocabulary.from_text(vocabulary.to_text()).encode("A c b") == ids
    with pytest.raises(ValueError, match="each word once, got 'b' twice"):
        Vocabulary(["b", "b"])
    with pytest.raises(ValueError, match="a vocabulary starts with <pad>"):
        Vocabulary.from_text("a\nb\n")


def test_words_are_hit_as_often_as_asked():
    vocabulary = Vocabulary([f"w{i}" for i in range(50)])
    captions = WordCaptions([" ".join(f"w{i}" for i in range(10))] * 2000, vocabulary, drop=0.2)
    clean, mask = captions.batch([0], None)
    assert clean[0].tolist() == [Vocabulary.START, *range(5, 15), Vocabulary.END]
    assert mask.all()
    ids, mask = captions.batch(range(2000), np.random.default_rng(0))
    deleted = 12 - mask.sum(1).float().mean().item()
    masked = (ids == Vocabulary.MASK).sum(1).float().mean().item()
    assert deleted == pytest.approx(10 * 0.2 * 0.4, rel=0.1)
    assert masked == pytest.approx(10 * 0.2 * 0.5, rel=0.1)
    first = ids[:, 0]
    last = ids[torch.arange(2000), mask.sum(1) - 1]
    assert (first == Vocabulary.START).all()
    assert (last == Vocabulary.END).all()
    other = ((ids >= 15) & mask).sum(1).float().mean().item()  # replaced by one of the 40 words that are not there
    assert other == pytest.approx(10 * 0.2 * 0.1 * 40 / 50, rel=0.2)
    unhit, _ = WordCaptions(["w1 w2"], vocabulary, drop=0.0).batch([0], np.random.default_rng(0))
    assert unhit[0].tolist() == [Vocabulary.START, 6, 7, Vocabulary.END]


def test_feature_captions_pad_and_keep_a_token():
    states = np.arange(12, dtype=np.float16).reshape(6, 2)
    captions = FeatureCaptions(states, np.array([0, 1, 4, 6]), drop=0.9)
    texts, mask = captions.batch([1, 0], None)
    assert texts.dtype == torch.float32
    assert mask.tolist() == [[True, True, True], [True, False, False]]
    np.testing.assert_array_equal(texts[0].numpy(), states[1:4])
    np.testing.assert_array_equal(texts[1, 0].numpy(), states[0])
    _, mask = captions.batch([0, 1, 2] * 50, np.random.default_rng(0))
    assert mask.any(1).all()
    assert mask.sum() < 250


def test_token_captions_pass_texts_on():
    seen = []

    def tokenize(texts):
        seen.append(texts)
        return torch.zeros(len(texts), 1, dtype=torch.long), torch.ones(len(texts), 1, dtype=torch.bool)

    captions = TokenCaptions(["a", "b", "c"], tokenize)
    assert captions.batch([2, 0], None)[0].shape == (2, 1)
    assert (seen, len(captions)) == ([["c", "a"]], 3)


def precomp(folder, region_drop=0.2, captions_per_batch=0) -> PrecompDataset:
    data = PrecompDataset(folder, "train", region_drop, captions_per_batch)
    data.captions = WordCaptions(data.texts, Vocabulary.build(data.texts))
    return data


def test_evaluation_batches_hold_everything(tiny_precomp):
    data = precomp(tiny_precomp)
    batch = data.batch([3, 1], None)
    np.testing.assert_array_equal(batch["images"].numpy(), data.images[[3, 1]].astype(np.float32))
    assert batch["image_group"].tolist() == [3, 1]
    assert batch["caption_group"].tolist() == [3] * 5 + [1] * 5
    vocabulary = data.captions.vocabulary
    assert batch["texts"][5][batch["text_mask"][5]].tolist() == vocabulary.encode(data.texts[5])


def test_training_batches_draw_regions_and_captions(tiny_precomp):
    data = precomp(tiny_precomp, region_drop=0.5, captions_per_batch=2)
    batch = data.batch([0, 1, 2], np.random.default_rng(0))
    assert batch["images"].shape == (3, 3, 12)
    assert batch["caption_group"].tolist() == [0, 0, 1, 1, 2, 2]
    for row, image in enumerate(batch["images"].numpy()):
        whole = data.images[row].astype(np.float32)
        places = [int(np.flatnonzero((whole == region).all(1))[0]) for region in image]
        assert places == sorted(set(places))  # no region twice
    again = data.batch([0, 1, 2], np.random.default_rng(0))
    assert all(torch.equal(batch[key], again[key]) for key in batch)


def test_captions_are_drawn_without_repetition_and_all_in_time(tiny_precomp):
    data = precomp(tiny_precomp, captions_per_batch=2)

    class Rows:
        def batch(self, indices, rng):
            self.seen = indices
            return torch.zeros(len(indices), 1, dtype=torch.long), torch.ones(len(indices), 1, dtype=torch.bool)

    data.captions, pairs = Rows(), set()
    for seed in range(100):
        data.batch([3], np.random.default_rng(seed))
        pairs.add(tuple(data.captions.seen))
    assert pairs == {(i, j) for i in range(15, 20) for j in range(15, 20) if i != j}


def test_batches_are_a_function_of_seed_and_step(tiny_precomp):
    whole = list(loader.StepBatches(10, 3, seed=1, step=lambda: 0))
    assert [step for step, _ in whole] == [0, 1, 2]
    assert len({i for _, indices in whole for i in indices}) == 9
    assert list(loader.StepBatches(10, 3, seed=1, step=lambda: 1)) == whole[1:]
    second = list(loader.StepBatches(10, 3, seed=1, step=lambda: 3))
    assert [step for step, _ in second] == [3, 4, 5]
    assert [i for _, i in second] != [i for _, i in whole]
    assert list(loader.StepBatches(10, 3, seed=2, step=lambda: 0)) != whole
    with pytest.raises(ValueError, match=r"batch_size must lie in \[1, 10\] .*, got 11"):
        loader.StepBatches(10, 11, seed=0, step=lambda: 0)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_gives_the_same_batches_with_workers(tiny_precomp, workers):
    data = precomp(tiny_precomp)
    module = loader.RetrievalDataModule(data, data, batch_size=32, seed=3, workers=workers)
    state = torch.get_rng_state()
    batches = list(module.train_dataloader())
    assert torch.equal(torch.get_rng_state(), state)  # dropout's generator is left alone
    sampler = loader.StepBatches(128, 32, 3, lambda: 0)
    for batch, (step, indices) in zip(batches, sampler, strict=True):
        expected = data.batch(indices, np.random.default_rng((3, step, 1)))
        assert all(torch.equal(batch[key], expected[key]) for key in expected)
    evaluation = list(module.val_dataloader())
    assert torch.cat([batch["image_group"] for batch in evaluation]).tolist() == list(range(128))


def test_bad_files_are_named(tmp_path):
    def files(images=None, captions=None):
        for old in tmp_path.iterdir():
            old.unlink()
        if images is not None:
            np.save(tmp_path / "train_ims.npy", images)
        if captions is not None:
            (tmp_path / "train_caps.txt").write_bytes(captions)

    good = np.zeros((2, 3, 4), np.float16)
    files(None, b"a\nb\n")
    with pytest.raises(FileNotFoundError, match=r"train_ims\.npy"):
        PrecompDataset(tmp_path, "train")
    files(good)
    with pytest.raises(FileNotFoundError, match=r"train_caps\.txt"):
        PrecompDataset(tmp_path, "train")
    files(good, b"a\nb\nc\n")
    with pytest.raises(
        ValueError,
        match=r"train_caps\.txt must hold a whole number of captions for each of 2 images in train_ims\.npy, got 3",
    ):
        PrecompDataset(tmp_path, "train")
    files(good, b"a\nb\n \nd\n")
    with pytest.raises(ValueError, match=r"train_caps\.txt, line 3: the caption is empty"):
        PrecompDataset(tmp_path, "train")
    files(good, b"a\n\xff\n")
    with pytest.raises(ValueError, match=r"train_caps\.txt is not UTF-8"):
        PrecompDataset(tmp_path, "train")
    for bad in (np.zeros((2, 3), np.float16), np.zeros((2, 3, 4), np.int64), np.zeros((2, 0, 4), np.float32)):
        files(bad, b"a\nb\n")
        with pytest.raises(ValueError, match=r"train_ims\.npy must hold floats \[images, tokens, features\], got"):
            PrecompDataset(tmp_path, "train")
    files(good, b"a\nb\n")
    path = tmp_path / "train_ims.npy"
    for size in (path.stat().st_size - 1, 20, 0):
        path.write_bytes(path.read_bytes()[:size])
        with pytest.raises(ValueError, match=r"train_ims\.npy was cut short"):
            PrecompDataset(tmp_path, "train")
    files(good, b"a\nb\nc\nd\n")
    with pytest.raises(ValueError, match=r"captions_per_batch must lie in \[0, 2\]"):
        PrecompDataset(tmp_path, "train", captions_per_batch=3)
    with pytest.raises(ValueError, match=r"region_drop must lie in \[0, 1\)"):
        PrecompDataset(tmp_path, "train", region_drop=1.0)
