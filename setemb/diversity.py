"""How far apart the vectors of a set lie, and which of them do the matching: what tells a set from one vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from setemb.ensemble import Similarities
from setemb.files import as_tensor
from setemb_kernels.retrieval import Tiles

LEAST = 1e-16
"""Circular variance that a set has at least: of float32 vectors that are equal but for their last digit."""

AT_ONCE = 4096
"""Sets, or pairs of them, looked at together."""

WAYS = ("positive", "image_to_text", "text_to_image")
"""The pairs whose closest vectors are counted: all positive ones, each image with the caption that it finds first, and
each caption with its image."""


@torch.inference_mode()
def log_circular_variance(sets: Tensor | np.ndarray) -> float | None:
    """The mean over sets of the natural logarithm of their circular variance::

        log(1 - |mean of e_k over k|),   e_k the set's vectors at unit length

    0 where the vectors point everywhere, far below where they are nearly one; at least ``log(LEAST)`` of a set. It is
    computed as ``mean of |e_k - m|^2 / (1 + |m|)``, m the mean: nothing in that cancels.

    Args:
        sets: ``[n, K, D]``, also memory-mapped.

    Returns:
        None for K = 1: one vector has no variance.

    Source: Kim, Kim, Kwak, CVPR 2023, measure how diverse the elements of an embedding set are by circular variance.
    """
    sets = as_tensor(sets)
    if sets.ndim != 3 or len(sets) == 0:
        raise ValueError(f"sets must have shape [n, K, D] with n > 0, got {list(sets.shape)}")
    if sets.shape[1] < 2:
        return None
    total = 0.0
    for part in sets.split(AT_ONCE):
        unit = functional.normalize(part.double(), dim=-1)
        middle = unit.mean(1, keepdim=True)
        variance = (unit - middle).square().sum(2).mean(1) / (1 + middle[:, 0].norm(dim=-1))
        total += float(variance.clamp(min=LEAST).log().sum())
    return total / len(sets)


@dataclass(frozen=True)
class SlotUse:
    """Of pairs of an image and a caption: how often each vector is in the closest pair of vectors, in percent."""

    image: list[float]
    """``[K]``, sums to 100."""
    caption: list[float]
    """``[L]``."""


@dataclass(frozen=True)
class SetReport:
    """What `set_report` found in one model's sets."""

    image_variance: float | None
    """`log_circular_variance` of the images' sets."""
    caption_variance: float | None
    slots: dict[str, SlotUse]
    """For each of `WAYS`."""

    def to_dict(self) -> dict[str, Any]:
        """The figures, as JSON takes them."""
        return {
            "log_circular_variance": {"image": self.image_variance, "caption": self.caption_variance},
            "slots": {way: {"image": use.image, "caption": use.caption} for way, use in self.slots.items()},
        }


@torch.inference_mode()
def set_report(
    similarities: Similarities, image_groups: Tensor | np.ndarray, caption_groups: Tensor | np.ndarray
) -> SetReport:
    """Diversity of one model's sets, and which of their vectors match.

    The closest pair of vectors is the one with the largest dot product, the first of equals. What an image or caption
    finds first is so by the model's own similarity, among all of the collection.

    Args:
        similarities: of one model.
        image_groups, caption_groups: integers ``[N]`` and ``[M]``: image and caption are a positive pair where they are
            equal.

    Raises:
        ValueError: it is an ensemble, whose models have slots of their own.
    """
    if len(similarities.members) != 1:
        raise ValueError(f"similarities must be of one model, got an ensemble of {len(similarities.members)}")
    (member,) = similarities.members
    images, captions = as_tensor(member.image_sets), as_tensor(member.caption_sets)
    own_images, own_captions = (torch.as_tensor(ids).to(images.device) for ids in (image_groups, caption_groups))
    found_captions, found_images = best_of_tiles(similarities)
    every_image, every_caption = (torch.arange(n, device=images.device) for n in similarities.shape)
    pairs = dict(
        zip(
            WAYS,
            (positive_pairs(own_images, own_captions), (every_image, found_captions), (found_images, every_caption)),
            strict=True,
        )
    )
    slots = {way: _slot_use(images, captions, *of) for way, of in pairs.items()}
    return SetReport(log_circular_variance(images), log_circular_variance(captions), slots)


def best_of_tiles(search: Tiles) -> tuple[Tensor, Tensor]:
    """The most similar column of each row, int64 ``[N]``, and row of each column, ``[M]``; the first of equals.

    What is not a number is less than everything.
    """
    best, index = [], []
    for n in search.shape:
        best.append(torch.full((n,), -torch.inf, dtype=search.dtype, device=search.device))
        index.append(torch.zeros(n, dtype=torch.int64, device=search.device))
    for rows, columns in search.tiles():
        s = search.similarity(rows, columns)
        s = s.masked_fill(s.isnan(), -torch.inf)
        for side, own, other, of in ((0, rows, columns, s), (1, columns, rows, s.T)):
            highest = of.amax(1)
            better = highest > best[side][own]
            best[side][own] = torch.where(better, highest, best[side][own])
            first = (of == highest[:, None]).int().argmax(1)  # argmax of the similarities may be any of equals
            index[side][own] = torch.where(better, first + other.start, index[side][own])
    return index[0], index[1]


def positive_pairs(image_groups: Tensor, caption_groups: Tensor) -> tuple[Tensor, Tensor]:
    """All pairs of equal groups: indices of images and of captions, int64 ``[pairs]`` each."""
    order = caption_groups.argsort(stable=True)
    ordered = caption_groups[order]
    first = torch.searchsorted(ordered, image_groups)
    counts = torch.searchsorted(ordered, image_groups, right=True) - first
    images = torch.arange(len(image_groups), device=counts.device).repeat_interleave(counts)
    within = torch.arange(len(images), device=counts.device) - (counts.cumsum(0) - counts)[images]
    return images, order[first[images] + within]


def _slot_use(images: Tensor, captions: Tensor, i: Tensor, c: Tensor) -> SlotUse:
    K, L = images.shape[1], captions.shape[1]
    counts = torch.zeros(K * L, dtype=torch.int64, device=images.device)
    for own, other in zip(i.split(AT_ONCE), c.split(AT_ONCE), strict=True):
        dots = images[own].float() @ captions[other.to(captions.device)].to(images.device).float().mT
        counts += torch.bincount(dots.flatten(1).argmax(1), minlength=K * L)
    share = 100 * counts.double().view(K, L) / max(len(i), 1)
    return SlotUse(share.sum(1).tolist(), share.sum(0).tolist())
