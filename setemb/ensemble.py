"""Similarities of images with captions as one model sees them, or the mean over several, a tile at a time.

What evaluates (`setemb.evaluation`, `setemb.coco`, `setemb.diversity`) walks over the tiles, so the similarities of all
images with all captions are never held, of however many models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import get_args

import numpy as np
import torch
from torch import Tensor

from setemb.files import as_tensor
from setemb.similarity import Similarity, set_similarity
from setemb_kernels.measure import Measure
from setemb_kernels.retrieval import SetTiles, Tiles

SimilarityFunction = Callable[[Tensor, Tensor], Tensor]
"""Sets ``[n, K, D]`` and ``[m, L, D]`` -> ``[n, m]``."""


@dataclass(frozen=True)
class Encoded:
    """What one model made of a collection, and how it compares it."""

    image_sets: Tensor | np.ndarray
    """``[N, K, D]``, floating; a tensor or a numpy array, also a memory-mapped one."""
    caption_sets: Tensor | np.ndarray
    """``[M, L, D]``."""
    similarity: Similarity | SimilarityFunction = "smooth_chamfer"
    """See `setemb.similarity.set_similarity`, or a function of two batches of sets."""
    alpha: float = 16.0
    """Sharpness of smooth_chamfer."""


class Similarities:
    """`setemb_kernels.retrieval.Tiles` of one model's similarities, or of an ensemble's::

        s(image i, caption c) = mean over models m of s_m(image i, caption c)

    Each model has sets of its own sizes K, L and D, and its own similarity. The mean is taken in float64, which adds
    float32 similarities without rounding: what is equal in one model is not made so, or otherwise, by another.

    Args:
        members: of one collection each: the same images and captions in the same order.
        block: images, and captions, in a tile.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.

    Source: Kim, Kim, Kwak, CVPR 2023, section 4, and others before report two models whose similarities are averaged.
    """

    def __init__(self, members: Sequence[Encoded], block: int = 1024) -> None:
        if not members:
            raise ValueError("members must hold at least one model's sets, got none")
        if block < 1:
            raise ValueError(f"block must be at least 1, got {block}")
        self.block = block
        self.members: list[Encoded] = []
        for i, member in enumerate(members):
            where = f"members[{i}]." if len(members) > 1 else ""
            sets = {"image_sets": as_tensor(member.image_sets), "caption_sets": as_tensor(member.caption_sets)}
            for name, own in sets.items():
                if own.ndim != 3 or len(own) == 0:
                    raise ValueError(f"{where}{name} must have shape [n, K, D] with n > 0, got {list(own.shape)}")
                if i and len(own) != len(getattr(self.members[0], name)):
                    known = len(getattr(self.members[0], name))
                    raise ValueError(f"{where}{name} must be of the {known} that the first model has, got {len(own)}")
            self.members.append(Encoded(**sets, similarity=member.similarity, alpha=member.alpha))
        first = self.members[0]
        self.shape = len(first.image_sets), len(first.caption_sets)
        self.device = as_tensor(first.image_sets).device
        self._tiles = [_tiles(member, block) for member in self.members]
        self.dtype = self._tiles[0].dtype if len(members) == 1 else torch.float64

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """Images and captions of each tile, images outermost."""
        return _blocks(self.shape, self.block)

    def similarity(self, rows: slice, columns: slice) -> Tensor:
        """``[n, m]``."""
        if len(self._tiles) == 1:
            return self._tiles[0].similarity(rows, columns)
        total = self._tiles[0].similarity(rows, columns).double()
        for other in self._tiles[1:]:
            total += other.similarity(rows, columns).to(self.device)
        return total / len(self._tiles)

    def part(self, images: Tensor, captions: Tensor) -> Similarities:
        """Of these images and captions alone, int64 indices; no set is copied where they follow each other."""
        return Similarities(
            [
                Encoded(
                    _rows(as_tensor(m.image_sets), images),
                    _rows(as_tensor(m.caption_sets), captions),
                    m.similarity,
                    m.alpha,
                )
                for m in self.members
            ],
            self.block,
        )

    @property
    def T(self) -> Tiles:  # noqa: N802 - as of a tensor
        """Of captions with images."""
        return _Transposed(self)


class _Transposed:
    def __init__(self, of: Tiles) -> None:
        self.of, self.dtype, self.device = of, of.dtype, of.device
        self.shape = of.shape[1], of.shape[0]

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        """The columns of a row stand in order, which is all that `topk_of_tiles` asks."""
        return ((columns, rows) for rows, columns in self.of.tiles())

    def similarity(self, rows: slice, columns: slice) -> Tensor:
        return self.of.similarity(columns, rows).T


class _Called:
    """Tiles by a function of two batches of sets."""

    dtype = torch.float64  # which holds every similarity as it is

    def __init__(self, images: Tensor, captions: Tensor, similarity: SimilarityFunction, block: int) -> None:
        self.images, self.captions, self.of, self.block = images, captions, similarity, block
        self.shape, self.device = (len(images), len(captions)), images.device

    def tiles(self) -> Iterator[tuple[slice, slice]]:
        return _blocks(self.shape, self.block)

    def similarity(self, rows: slice, columns: slice) -> Tensor:
        return self.of(self.images[rows], self.captions[columns]).double()


def _tiles(member: Encoded, block: int) -> Tiles:
    images, captions, kind = as_tensor(member.image_sets), as_tensor(member.caption_sets), member.similarity
    if callable(kind):
        return _Called(images, captions, kind, block)
    if kind not in get_args(Similarity):
        raise ValueError(f"similarity must be one of {', '.join(get_args(Similarity))}, got {kind!r}")
    if kind == "cosine" and (images.shape[1] != 1 or captions.shape[1] != 1):
        set_similarity(images[:1], captions[:1], kind)  # says so
    of_one_vector = "smooth_chamfer"  # which is their cosine
    measure = Measure.of(of_one_vector if kind == "cosine" else kind, member.alpha, 0.0, "sum", images.device)
    return SetTiles(images, captions, measure, chunk=block, names=("x", "y"))


def _blocks(shape: tuple[int, int], block: int) -> Iterator[tuple[slice, slice]]:
    for i in range(0, shape[0], block):
        for j in range(0, shape[1], block):
            yield slice(i, min(i + block, shape[0])), slice(j, min(j + block, shape[1]))


def _rows(sets: Tensor, rows: Tensor) -> Tensor:
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows) and bool((rows[1:] > rows[:-1]).all()):
        return sets[first : last + 1]
    return sets[rows.to(sets.device)]
