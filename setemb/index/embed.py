"""Sets of many images, and of texts, made by a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from setemb.model import SetEmbedder


@torch.inference_mode()
def embed_images(
    model: SetEmbedder,
    features: np.ndarray,
    batch_size: int = 128,
    prepare: Callable[[np.ndarray], np.ndarray] = lambda batch: batch,
) -> Tensor:
    """Sets ``[n, K, D]`` of images, from region or grid features (numpy, also memory-mapped).

    ``prepare`` makes of a batch of them what the model takes, ``[n, T, dim_in]``.
    """
    model.eval()
    parts = [torch.empty(0, model.config.sets.num_slots, model.config.dim)]
    for start in range(0, len(features), batch_size):
        images = torch.from_numpy(prepare(features[start : start + batch_size]).astype(np.float32))
        parts.append(model.encode_image({"images": images}).embeddings)
    return torch.cat(parts)


def embed_texts(model: SetEmbedder, texts: Sequence[str]) -> Tensor:
    """Sets ``[n, K, D]`` of texts, at least one; see `SetEmbedder.encode_text`."""
    return model.encode_text(texts).embeddings
