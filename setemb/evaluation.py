"""Retrieval recall by the field's convention, both ways, in one blocked pass with ranks found by counting."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from setemb.ensemble import Encoded, Similarities, SimilarityFunction
from setemb.similarity import Similarity
from setemb_kernels.retrieval import rank_of_tiles


@dataclass(frozen=True)
class Recall:
    """One direction: percentage of queries whose best relevant item is among the first 1, 5, 10; ranks start at 1."""

    r1: float
    r5: float
    r10: float
    median_rank: float
    mean_rank: float

    @classmethod
    def from_ranks(cls, ranks: np.ndarray) -> Recall:
        """From ranks that start at 0. The median of an even number of ranks is rounded down, as the field does."""
        if len(ranks) == 0:
            raise ValueError("there must be at least one query, got none")
        r1, r5, r10 = (100.0 * float(np.mean(ranks < k)) for k in (1, 5, 10))
        return cls(r1, r5, r10, float(np.floor(np.median(ranks)) + 1), float(np.mean(ranks) + 1))


@dataclass(frozen=True)
class RecallReport:
    """Recall of captions for images (``image_to_text``) and of images for captions (``text_to_image``).

    With folds the figures are means over the folds, and the ranks are those within a query's own fold.
    """

    image_to_text: Recall
    text_to_image: Recall
    image_ranks: np.ndarray = field(repr=False, compare=False)
    """int64 ``[images]``: rank of the best relevant caption, from 0."""
    caption_ranks: np.ndarray = field(repr=False, compare=False)
    """int64 ``[captions]``: rank of the best relevant image, from 0."""

    @property
    def rsum(self) -> float:
        """The sum of the six recalls."""
        a, b = self.image_to_text, self.text_to_image
        return a.r1 + a.r5 + a.r10 + b.r1 + b.r5 + b.r10

    def to_dict(self) -> dict[str, Any]:
        """The figures (not the ranks), as JSON takes them."""
        return {
            "image_to_text": asdict(self.image_to_text),
            "text_to_image": asdict(self.text_to_image),
            "rsum": self.rsum,
        }


@torch.inference_mode()
def evaluate_retrieval(
    image_sets: Tensor | np.ndarray,
    caption_sets: Tensor | np.ndarray,
    captions_per_image: int = 5,
    folds: int | None = None,
    similarity: Similarity | SimilarityFunction = "smooth_chamfer",
    block: int = 1024,
    image_groups: Tensor | np.ndarray | None = None,
    caption_groups: Tensor | np.ndarray | None = None,
    alpha: float = 16.0,
) -> RecallReport:
    """Ranks every caption for every image and every image for every caption.

    The rank of a query is the number of items that are *not* relevant to it and score at least as high as its best
    relevant item: ties count against it, so a model that gives one score to all ranks last. So does a score that is
    not a number.

    Memory beyond the sets: a few times ``block x block`` similarities and, where the sets have another dtype than
    float32, ``block`` of them. So they may be mapped from files.

    Args:
        image_sets: ``[N, K, D]``, floating; a tensor or a numpy array, also a memory-mapped one.
        caption_sets: ``[M, L, D]``. By default caption c belongs to image ``c // captions_per_image``.
        captions_per_image: M / N.
        folds: evaluate this many contiguous parts by themselves and average the figures (5 for COCO 1K); with groups,
            all images of a group must lie in one.
        similarity: see `setemb.similarity.set_similarity`, or a function of two batches of sets.
        block: sets on either side of a tile of similarities.
        image_groups, caption_groups: integers ``[N]`` and ``[M]``, given together in place of ``captions_per_image``:
            image and caption are relevant to each other where their groups are equal (several images a caption,
            several captions an image). Every query needs something relevant.
        alpha: sharpness of smooth_chamfer.

    Raises:
        TypeError, ValueError: naming the argument, what came and what was expected.
    """
    of = Similarities([Encoded(image_sets, caption_sets, similarity, alpha)], block)
    return evaluate_similarities(of, captions_per_image, folds, image_groups, caption_groups)


@torch.inference_mode()
def evaluate_similarities(
    similarities: Similarities,
    captions_per_image: int = 5,
    folds: int | None = None,
    image_groups: Tensor | np.ndarray | None = None,
    caption_groups: Tensor | np.ndarray | None = None,
) -> RecallReport:
    """`evaluate_retrieval` of one model or of an ensemble: ``Similarities([Encoded(...), Encoded(...)])``."""
    N, M = similarities.shape
    own_images, own_captions = (
        ids.to(similarities.device) for ids in _groups(N, M, captions_per_image, image_groups, caption_groups)
    )
    parts = _folds(own_images, own_captions, folds)
    ranks = []
    for i, c in parts:
        found = rank_of_tiles(similarities.part(i, c), own_images[i], own_captions[c])
        ranks.append((found.x.cpu().numpy(), found.y.cpu().numpy()))
    caption_ranks = np.empty(M, np.int64)
    for (_, c), (_, of_fold) in zip(parts, ranks, strict=True):
        caption_ranks[c.cpu().numpy()] = of_fold

    def mean(recalls: list[Recall]) -> Recall:
        return Recall(**{key: float(np.mean([getattr(r, key) for r in recalls])) for key in asdict(recalls[0])})

    return RecallReport(
        mean([Recall.from_ranks(image_ranks) for image_ranks, _ in ranks]),
        mean([Recall.from_ranks(of_fold) for _, of_fold in ranks]),
        np.concatenate([image_ranks for image_ranks, _ in ranks]),
        caption_ranks,
    )


def _groups(
    images: int,
    captions: int,
    captions_per_image: int,
    image_groups: Tensor | np.ndarray | None,
    caption_groups: Tensor | np.ndarray | None,
) -> tuple[Tensor, Tensor]:
    if image_groups is None and caption_groups is None:
        if captions_per_image < 1 or captions != images * captions_per_image:
            raise ValueError(
                f"{images} images with captions_per_image = {captions_per_image} need {images * captions_per_image} "
                f"captions, got {captions}"
            )
        return torch.arange(images), torch.arange(captions) // captions_per_image
    if image_groups is None or caption_groups is None:
        raise ValueError("image_groups and caption_groups must be given together, got one of them")
    result = []
    for name, ids, n in (("image_groups", image_groups, images), ("caption_groups", caption_groups, captions)):
        group = torch.as_tensor(ids).cpu()
        if group.shape != (n,) or group.is_floating_point():
            raise ValueError(f"{name} must be integers of shape [{n}], got {group.dtype} {list(group.shape)}")
        result.append(group.long())
    for name, group, others in (("image_groups", result[0], result[1]), ("caption_groups", result[1], result[0])):
        lonely = ~torch.isin(group, others)
        if lonely.any():
            row = int(lonely.nonzero()[0])
            raise ValueError(f"{name}: nothing on the other side is relevant to row {row} (group {int(group[row])})")
    return result[0], result[1]


def _folds(image_groups: Tensor, caption_groups: Tensor, folds: int | None) -> list[tuple[Tensor, Tensor]]:
    """Indices of the images and of the captions of each fold."""
    if folds is None:
        return [(torch.arange(len(image_groups)), torch.arange(len(caption_groups)))]
    if folds < 1 or len(image_groups) % folds:
        raise ValueError(f"folds must divide the number of images ({len(image_groups)}), got {folds}")
    result = []
    for images in torch.arange(len(image_groups), device=image_groups.device).chunk(folds):
        captions = torch.isin(caption_groups, image_groups[images]).nonzero()[:, 0]
        result.append((images, captions))
    if sum(len(captions) for _, captions in result) != len(caption_groups):
        raise ValueError("image_groups: with folds, all images of a group must lie in one fold")
    return result
