"""The field's precomputed format: ``{split}_ims.npy`` and ``{split}_caps.txt`` in one folder.

``{split}_ims.npy``   ``[n, tokens, d]`` float16 or float32: features of regions or grid cells of n images (mapped).
``{split}_caps.txt``  UTF-8, a caption a line, the same number of captions for each image, one image after the other
                      (five an image: captions 5i..5i+4 belong to image i).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from setemb.data.vocab import Vocabulary


class Captions(Protocol):
    """Captions in the form that a text encoder takes."""

    def __len__(self) -> int: ...

    def batch(self, indices: Sequence[int], rng: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        """``texts`` and ``text_mask`` of `setemb.model.Batch`; some words are dropped where there is an ``rng``."""
        ...


class PrecompDataset:
    """Images and captions of one split.

    Args:
        folder, split: see the module.
        region_drop: share of an image's regions left out in training; the same number for each image, at least one
            stays. Regions are drawn anew in every batch.
        captions_per_batch: captions drawn for an image in training, without repetition; 0: all.

    `captions` (of the texts in `texts`) must be set before batches are made.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: a file is cut short or of the wrong shape, captions are not a whole number an image, or a caption is
            empty; naming the file and the line.
    """

    def __init__(self, folder: str | Path, split: str, region_drop: float = 0.2, captions_per_batch: int = 0) -> None:
        folder = Path(folder)
        self.split, self.region_drop = split, region_drop
        self.images = _read_images(folder / f"{split}_ims.npy")
        self.texts = _read_captions(folder / f"{split}_caps.txt", len(self.images))
        self.captions_per_image = len(self.texts) // len(self.images)
        if not 0 <= region_drop < 1:
            raise ValueError(f"region_drop must lie in [0, 1), got {region_drop}")
        if not 0 <= captions_per_batch <= self.captions_per_image:
            raise ValueError(
                f"captions_per_batch must lie in [0, {self.captions_per_image}] (captions an image), "
                f"got {captions_per_batch}"
            )
        self.captions_per_batch = captions_per_batch or self.captions_per_image
        self.captions: Captions | None = None

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: Sequence[int], rng: np.random.Generator | None) -> dict[str, Tensor]:
        """See `setemb.data.loader.RetrievalData`; ``image_group`` and ``caption_group`` are rows of the split."""
        if self.captions is None:
            raise RuntimeError("set PrecompDataset.captions before making batches")
        chosen = np.asarray(indices)
        images = self.images[chosen].astype(np.float32)
        own = np.arange(self.captions_per_image)[None].repeat(len(chosen), 0)
        if rng is not None:
            images = _drop_regions(images, self.region_drop, rng)
            own = rng.permuted(own, axis=1)[:, : self.captions_per_batch]
        rows = (chosen[:, None] * self.captions_per_image + own).ravel()
        texts, text_mask = self.captions.batch(rows.tolist(), rng)
        return {
            "images": torch.from_numpy(images),
            "texts": texts,
            "text_mask": text_mask,
            "image_group": torch.from_numpy(chosen),
            "caption_group": torch.from_numpy(rows // self.captions_per_image),
        }


class WordCaptions:
    """Captions as the numbers of their words.

    In training, ``drop`` of the words are hit: half of them masked, a tenth made another word, the rest deleted.
    """

    def __init__(self, texts: Sequence[str], vocabulary: Vocabulary, drop: float = 0.2) -> None:
        _check_share("drop", drop)
        self.ids = [np.asarray(vocabulary.encode(text)) for text in texts]
        self.vocabulary, self.drop = vocabulary, drop

    def __len__(self) -> int:
        return len(self.ids)

    def batch(self, indices: Sequence[int], rng: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        """int64 ``[C, T]`` and bool ``[C, T]``."""
        rows = [torch.from_numpy(self.ids[i] if rng is None else self._hit(self.ids[i], rng)) for i in indices]
        return _pad(rows)

    def _hit(self, ids: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        first, words, last = ids[:1], ids[1:-1].copy(), ids[-1:]
        # One draw says whether a word is hit and how.
        how = rng.random(len(words)) / self.drop if self.drop > 0 else np.ones(len(words))
        random = rng.integers(
            len(Vocabulary.SPECIAL), max(len(self.vocabulary), 1 + len(Vocabulary.SPECIAL)), len(words)
        )
        words[how < 0.5] = Vocabulary.MASK
        replaced = (how >= 0.5) & (how < 0.6)
        words[replaced] = np.minimum(random, len(self.vocabulary) - 1)[replaced]
        return np.concatenate([first, words[(how < 0.6) | (how >= 1)], last])


class FeatureCaptions:
    """Captions as token features of a frozen language model.

    Rows ``offsets[i]:offsets[i + 1]`` of ``states`` are caption i.

    In training, ``drop`` of the tokens are left out, at least one stays.
    """

    def __init__(self, states: np.ndarray, offsets: np.ndarray, drop: float = 0.2) -> None:
        _check_share("drop", drop)
        self.states, self.offsets, self.drop = states, offsets, drop

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def batch(self, indices: Sequence[int], rng: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        """float32 ``[C, T, d]`` and bool ``[C, T]``."""
        rows = []
        for i in indices:
            states = self.states[self.offsets[i] : self.offsets[i + 1]]
            if rng is not None and self.drop > 0:
                hit = rng.random(len(states))
                states = states[(hit >= self.drop) | (hit == hit.max())]
            rows.append(torch.from_numpy(states.astype(np.float32)))
        return _pad(rows)

    @classmethod
    def cached(cls, texts: Sequence[str], source: str, folder: str | Path, drop: float = 0.2) -> FeatureCaptions:
        """Token states of the language model ``source``, computed once for these texts and kept under ``folder``.

        By default under ``$XDG_CACHE_HOME/setemb`` or ``~/.cache/setemb``.
        """
        from setemb.features import ArrayCache, TextFeatures, model_digest

        def make(target: Path) -> None:
            states, offsets = TextFeatures(source).extract(texts)
            np.save(target / "states.npy", states)
            np.save(target / "offsets.npy", offsets)

        digest = hashlib.sha256("\n".join(texts).encode()).hexdigest()
        base = Path(folder or Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "setemb")
        key = {"texts": digest, "model": model_digest(source)}
        arrays = ArrayCache(base / f"tokens-{digest[:16]}").load_or_make(key, make)
        return cls(arrays["states"], arrays["offsets"], drop)


class TokenCaptions:
    """Captions as the token numbers of a pretrained language model; nothing is dropped.

    Args:
        tokenize: texts -> int64 ``[B, T]`` and bool ``[B, T]``.
    """

    def __init__(self, texts: Sequence[str], tokenize: Callable[[Sequence[str]], tuple[Tensor, Tensor]]) -> None:
        self.texts, self.tokenize = texts, tokenize

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, indices: Sequence[int], rng: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        """int64 ``[C, T]`` and bool ``[C, T]``."""
        return self.tokenize([self.texts[i] for i in indices])


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {share}")


def _pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]


def _drop_regions(images: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    n, regions = images.shape[:2]
    kept = max(1, round(regions * (1 - share)))
    if kept == regions:
        return images
    chosen = np.sort(rng.random((n, regions)).argsort(1)[:, :kept], 1)
    return np.take_along_axis(images, chosen[:, :, None], 1)


def _read_images(path: Path) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"no image features {path}")
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:  # a file that is shorter than its header says is a ValueError
        raise ValueError(f"{path} was cut short or is no .npy file: {error}") from error
    if images.ndim != 3 or 0 in images.shape or images.dtype.kind != "f":
        raise ValueError(f"{path} must hold floats [images, tokens, features], got {images.dtype} {list(images.shape)}")
    return images


def _read_captions(path: Path, images: int) -> list[str]:
    if not path.is_file():
        raise FileNotFoundError(f"no captions {path}")
    try:
        captions = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    for number, caption in enumerate(captions, 1):
        if not caption.strip():
            raise ValueError(f"{path}, line {number}: the caption is empty")
    if len(captions) % images:
        raise ValueError(
            f"{path} must hold a whole number of captions for each of {images} images, got {len(captions)}"
        )
    return captions
