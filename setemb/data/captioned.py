"""What the splits of all formats share: images with one caption or more each, read when a batch asks for them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from typing import ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from setemb.data.captions import Captions

ALIASES = {"dev": ("val", "validation")}
"""Other names of a split, which mean it where a data set of whatever format has none of that name."""


def find_split(name: str, known: Collection[str]) -> str | None:
    """What a data set with these splits calls ``name``; None: it has no such split."""
    return next((own for own in (name, *ALIASES.get(name, ())) if own in known), None)


class CaptionedImages(ABC):
    """One split; `setemb.data.loader` feeds it to the trainer.

    Captions are kept as texts; images stay on disk.

    Args:
        name: of the split, for messages.
        texts: the captions, those of one image after those of the one before.
        counts: int ``[n]``, captions of each image, at least one.
        captions_per_batch: captions drawn for an image in training, without repetition (all of an image that has
            fewer); 0: all.

    `captions` (of the texts in `texts`) must be set before batches are made.
    """

    kind: ClassVar[Literal["regions", "pictures"]]
    """What images are: float features ``[T, d]`` of regions or cells, or uint8 pictures ``[3, H, W]``."""

    def __init__(self, name: str, texts: Sequence[str], counts: np.ndarray, captions_per_batch: int = 0) -> None:
        self.name, self.texts = name, texts
        self.offsets = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        if self.offsets[-1] != len(texts):
            raise ValueError(f"{self.offsets[-1]} captions are counted, got {len(texts)}")
        most = int(counts.max()) if len(counts) else 0
        if not 0 <= captions_per_batch <= most:
            raise ValueError(
                f"captions_per_batch must lie in [0, {most}] (captions an image), got {captions_per_batch}"
            )
        self.captions_per_batch = captions_per_batch or most
        self.captions: Captions | None = None

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @abstractmethod
    def read(self, rows: np.ndarray, rng: np.random.Generator | None) -> Tensor:
        """The images of these rows; some of what they hold is dropped, or cropped at random, where there is an rng."""

    def batch(self, indices: Sequence[int], rng: np.random.Generator | None) -> dict[str, Tensor]:
        """See `setemb.data.loader.RetrievalData`; ``image_group`` and ``caption_group`` are rows of the split."""
        if self.captions is None:
            raise RuntimeError(f"set {type(self).__name__}.captions before making batches")
        chosen = np.asarray(indices)
        images = self.read(chosen, rng)
        own = [np.arange(self.offsets[i], self.offsets[i + 1]) for i in chosen]
        if rng is not None:
            own = [rng.permutation(rows)[: self.captions_per_batch] for rows in own]
        texts, text_mask = self.captions.batch(np.concatenate(own).tolist(), rng)
        return {
            "images": images,
            "texts": texts,
            "text_mask": text_mask,
            "image_group": torch.from_numpy(chosen),
            "caption_group": torch.from_numpy(chosen.repeat([len(rows) for rows in own])),
        }
