"""Sets of many images, and of texts, made by a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

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


@torch.inference_mode()
def embed_texts(model: SetEmbedder, texts: Sequence[str]) -> Tensor:
    """Sets ``[n, K, D]`` of texts, through whatever the model's text encoder takes as input."""
    config = model.config.text
    if config.encoder == "features":
        from setemb.features import TextFeatures

        tokens, mask = TextFeatures(config.source).encode(texts)
    elif model.vocabulary is not None:
        from setemb.data.precomp import WordCaptions

        tokens, mask = WordCaptions(texts, model.vocabulary, 0.0).batch(range(len(texts)), None)
    else:
        tokens, mask = cast(Any, model.text_encoder).tokenize(texts)
    return model.eval().encode_text({"texts": tokens, "text_mask": mask}).embeddings
