"""Where the demo's training starts: the least-squares map from pictures to the vectors of their names.

A thousand emoji are few. Heads that start at random spend them on finding out that a name's MiniLM vector already says
what is meant; heads that start at the solution of a ridge regression know it. In closed form, from training emoji only:

    text     t' = normalised P (t - mean t),       P = (cov t + w mean eigenvalue I)^(-1/2), a partial whitening
    picture  W = argmin |W z - t'|^2 + l n |W|^2   z = standardised features, mean over the cells

`RegionEncoder` is linear at first when the last layer of its residual MLP is 0, so both maps fit into its first layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from setemb.data.emoji import STYLES
from setemb.demo.data import EmojiFeatures
from setemb.features import with_context
from setemb.model import SetEmbedder
from setemb.modules import RegionEncoder, SetPrediction

RIDGE = 0.8
"""l: the penalty on W relative to the variance of a standardised feature."""
WHITENING = 3.0
"""w: 0 whitens fully, infinity not at all."""
PHRASE_SHARE = 0.2
"""Of the mean of all training phrases in an emoji's target; the rest is its name."""
SLOT_SCALE = 0.25
"""First weight of the slots' last layer norm: the global vectors decide at the start."""


@torch.no_grad()
def start_from_least_squares(model: SetEmbedder, features: EmojiFeatures, phrases: Mapping[int, Sequence[str]]) -> None:
    """Sets the first layers of both heads, in place.

    Args:
        model: with the text encoder "features", mean pooling on both sides and the tokens' width as ``dim``.
        features: of all emoji.
        phrases: training emoji and their training phrases, the name first; nothing else is looked at.
    """
    members = list(phrases)
    names = torch.stack([_vector(features, phrases[i][0]) for i in members])
    everything = torch.stack([torch.stack([_vector(features, p) for p in phrases[i]]).mean(0) for i in members])
    centre = names.mean(0)
    eigenvalues, basis = torch.linalg.eigh((names - centre).T @ (names - centre) / len(names))
    scale = (eigenvalues.clamp(min=0) + WHITENING * eigenvalues.mean()).rsqrt()
    whiten = basis * scale @ basis.T
    targets = nn.functional.normalize(((1 - PHRASE_SHARE) * names + PHRASE_SHARE * everything - centre) @ whiten, dim=1)

    rows = [len(STYLES) * i + j for i in members for j in range(len(STYLES))]
    chunks = np.array_split(rows, len(rows) // 256 + 1)
    pooled = torch.cat([torch.from_numpy(with_context(features.grids[chunk])).mean(1) for chunk in chunks])
    mean, deviation = pooled.mean(0), pooled.std(0).clamp(min=1e-3)
    z = (pooled - mean) / deviation
    gram = z.T @ z + RIDGE * len(z) * torch.eye(z.shape[1])
    solution = torch.linalg.solve(gram, z.T @ (targets - targets.mean(0)).repeat_interleave(len(STYLES), 0))
    solution = solution / (z @ solution).std() / deviation[:, None]
    _set_linear(model.image_encoder, solution.T, mean)
    _set_linear(model.text_encoder, whiten / ((names - centre) @ whiten).std(), centre)
    for sets in (model.image_sets, model.text_sets):
        assert isinstance(sets, SetPrediction)
        sets.norm_last.weight.fill_(SLOT_SCALE)


def _vector(features: EmojiFeatures, phrase: str) -> Tensor:
    """The mean of a phrase's token states."""
    tokens, mask = features.captions.batch([features.caption_of[phrase]], None)
    return tokens[0, mask[0]].mean(0)


def _set_linear(encoder: nn.Module, weight: Tensor, centre: Tensor) -> None:
    """Makes a head ``x -> weight (x - centre)``."""
    assert isinstance(encoder, RegionEncoder)
    encoder.fc.weight.copy_(weight)
    encoder.fc.bias.copy_(-weight @ centre)
    nn.init.zeros_(encoder.mlp.fc2.weight)
    nn.init.zeros_(encoder.mlp.fc2.bias)
