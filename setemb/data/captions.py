"""Captions in the forms that text encoders take; in training some of their words are hit."""

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
        rows = [self.ids[i] for i in indices]
        if rng is not None:
            size, special = len(self.vocabulary), len(Vocabulary.SPECIAL)
            others = (special, size) if size > special else (Vocabulary.UNKNOWN, Vocabulary.UNKNOWN + 1)
            rows = [hit(row, self.drop, Vocabulary.MASK, others, rng) for row in rows]
        return _pad([torch.from_numpy(row) for row in rows])


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
    """Captions as the token numbers of a pretrained language model.

    In training, ``drop`` of the tokens between the first and the last, which mark start and end, are hit as those of
    `WordCaptions` are.

    Args:
        tokenize: texts -> int64 ``[B, T]`` and bool ``[B, T]``, padding at the end.
        drop: see above.
        mask_id: number of the token that says "masked".
        vocab_size: numbers that a replaced token is drawn from.
    """

    def __init__(
        self,
        texts: Sequence[str],
        tokenize: Callable[[Sequence[str]], tuple[Tensor, Tensor]],
        drop: float = 0.0,
        mask_id: int = 0,
        vocab_size: int = 1,
    ) -> None:
        _check_share("drop", drop)
        self.texts, self.tokenize = texts, tokenize
        self.drop, self.mask_id, self.vocab_size = drop, mask_id, vocab_size

    def __len__(self) -> int:
        return len(self.texts)

    def batch(self, indices: Sequence[int], rng: np.random.Generator | None) -> tuple[Tensor, Tensor]:
        """int64 ``[C, T]`` and bool ``[C, T]``."""
        ids, mask = self.tokenize([self.texts[i] for i in indices])
        if rng is None or self.drop == 0:
            return ids, mask
        rows = [row[valid].numpy() for row, valid in zip(ids, mask, strict=True)]
        return _pad([torch.from_numpy(hit(row, self.drop, self.mask_id, (0, self.vocab_size), rng)) for row in rows])


def hit(ids: np.ndarray, drop: float, mask_id: int, others: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Words of a caption hit with probability ``drop``: half of them masked, a tenth made another, the rest deleted.

    Args:
        ids: ``[T]``; the first and the last stay.
        others: words to draw from, first and last + 1.

    Source: the published code of Kim, Kim, Kwak, CVPR 2023.
    """
    first, words, last = ids[:1], ids[1:-1].copy(), ids[-1:]
    # One draw says whether a word is hit and how.
    how = rng.random(len(words)) / drop if drop > 0 else np.ones(len(words))
    random = rng.integers(*others, len(words))
    words[how < 0.5] = mask_id
    replaced = (how >= 0.5) & (how < 0.6)
    words[replaced] = random[replaced]
    return np.concatenate([first, words[(how < 0.6) | (how >= 1)], last])


def _check_share(name: str, share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {share}")


def _pad(rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return padded, torch.arange(padded.shape[1]) < lengths[:, None]
