"""Towers of the package open_clip, trained on pairs of pictures and texts, as makers of local and global features."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from setemb.modules.linear import Linear
from setemb.packages import require

ELSEWHERE = ("hf-hub:", "local-dir:")
"""What names of models start with whose weights lie where the name says."""


class OpenClipBackbone(nn.Module):
    """The image tower of a model of open_clip: the last layer's patches as a feature map, and its pooled vector.

    Args:
        name: of the model: ``ViT-B-32``, or ``hf-hub:...`` and ``local-dir:...`` (see `open_clip.create_model`).
        weights: one of the model's tags (``laion2b_s34b_b79k``; open_clip downloads them once), a file, or "random";
            of a name with its place, "pretrained" or "random".
        size: pixels a side of the pictures it is built for; 0: as trained. Position embeddings are resized.

    Attributes:
        channels: of the feature map.
        pooled: features of the pooled vector, which open_clip compares with that of texts.
        mean, std: of the pictures that it was trained on, in [0, 1], a number a colour.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: open_clip has no such model; the weights cannot be had.
    """

    def __init__(self, name: str, weights: str = "pretrained", size: int = 0) -> None:
        super().__init__()
        options = {"force_image_size": size} if size else {}
        model = _model("model.image.backbone", name, weights, **options)
        self.network = model.visual
        described = require("open_clip", "open_clip").get_model_preprocess_cfg(model)
        self.mean, self.std = tuple(described["mean"]), tuple(described["std"])
        sides = self.network.image_size
        self.size: tuple[int, ...] = (sides, sides) if isinstance(sides, int) else tuple(sides)
        # CoCa normalises what it pools, which is of another size than its patches
        self.normalize = getattr(self.network, "attn_pool", None) is None
        with _evaluating(self.network):
            cells, pooled = self(torch.zeros(1, 3, *self.size))
        self.channels, self.pooled = cells.shape[1], pooled.shape[1]

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """``[B, 3, H, W]`` -> ``[B, channels, h, w]`` and ``[B, pooled]``, which is not of unit length."""
        if tuple(pictures.shape[2:]) != self.size:
            raise ValueError(
                f"pictures must have shape [B, 3, {self.size[0]}, {self.size[1]}], which the model is built for "
                f"(data.picture_size), got {list(pictures.shape)}"
            )
        found = self.network.forward_intermediates(pictures, indices=1, normalize_intermediates=self.normalize)
        return found["image_intermediates"][-1], found["image_features"]


class OpenClipTextEncoder(nn.Module):
    """The text tower of a model of open_clip: token states, projected, and its pooled vector as the global one.

    Args:
        name, weights: as in `OpenClipBackbone`.
        dim: features of ``local``; those of ``global`` are the tower's own.
        frozen: do not train the tower; it then also stays in evaluation mode.
        dropout: on ``local``.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: open_clip has no such model, or one whose texts go through transformers (which
            `setemb.modules.TransformerTextEncoder` does); the weights cannot be had.
    """

    def __init__(
        self, name: str, dim: int, weights: str = "pretrained", frozen: bool = True, dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.model = _model("model.text.source", name, weights).text
        if not hasattr(self.model, "forward_intermediates"):
            raise ValueError(f"model.text.source: texts of {name!r} go through transformers: choose another model")
        self.tokenizer = require("open_clip", "open_clip").get_tokenizer(name)
        (self.padding,) = self.tokenizer([""]).unbind()
        with _evaluating(self.model):
            states, pooled = self._states(self.padding[None])
        self.model.requires_grad_(not frozen)
        self.frozen = frozen
        self.project = Linear(states.shape[2], dim)
        self.dropout = nn.Dropout(dropout)
        self.dim_local, self.dim_global = dim, pooled.shape[1]
        self.train(self.training)

    def train(self, mode: bool = True) -> OpenClipTextEncoder:
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def tokenize(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """int64 ids ``[B, T]`` and bool mask ``[B, T]`` of texts, T that of the longest.

        What a row has in common with the empty text at its end is padding.
        """
        ids = self.tokenizer(list(texts))
        common = (ids == self.padding).flip(1).cumprod(1).sum(1)
        lengths = (ids.shape[1] - common).clamp(min=1)
        longest = int(lengths.max())
        return ids[:, :longest], torch.arange(longest) < lengths[:, None]

    @property
    def mask_id(self) -> int:
        """Of the token that says "masked", which these models do not know: padding stands in for it."""
        return int(self.padding[-1])

    @property
    def vocab_size(self) -> int:
        """Of the tokens of words: those that mark start and end come last in CLIP's."""
        return int(getattr(self.tokenizer, "sot_token_id", self.model.vocab_size))

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """int64 ``[B, T]``, bool ``[B, T]`` -> local ``[B, T, dim]``, global ``[B, pooled]``, the mask."""
        whole = self.padding.to(ids.device).repeat(len(ids), 1)  # the tower wants its full length
        if ids.shape[1] > whole.shape[1]:
            raise ValueError(f"ids must have at most {whole.shape[1]} tokens a text, got {ids.shape[1]}")
        whole[:, : ids.shape[1]] = torch.where(mask, ids, whole[:, : ids.shape[1]])
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            states, pooled = self._states(whole)
        return self.dropout(self.project(states[:, : ids.shape[1]])), pooled, mask

    def _states(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        found = self.model.forward_intermediates(ids, indices=1, normalize_intermediates=True, output_fmt="NLC")
        return found["text_intermediates"][-1], found["text_features"]


def _model(setting: str, name: str, weights: str, **options: Any) -> Any:
    """A model with a tower for pictures (``visual``) and one for texts (``text``)."""
    open_clip = require("open_clip", "open_clip")
    elsewhere = name.startswith(ELSEWHERE)
    if not elsewhere and name not in open_clip.list_models():
        near = ", ".join(difflib.get_close_matches(name, open_clip.list_models(), 5, 0.5))
        raise ValueError(f"{setting} must be a model of open_clip, got {name!r}" + (f"; near: {near}" if near else ""))
    if weights == "random":
        options |= {"load_weights": False, "pretrained_text": False}
    elif elsewhere and weights != "pretrained":
        raise ValueError(f'weights of {name} must be "pretrained" or "random", got {weights!r}')
    elif not elsewhere:
        tags = open_clip.list_pretrained_tags_by_model(name)
        if weights not in tags and not Path(weights).is_file():
            raise ValueError(
                f'weights of {name} must be one of {", ".join(tags) or "no tags"}, "random" or a file, got {weights!r}'
            )
        options["pretrained"] = weights
    known = logging.root.manager.disable
    try:
        if weights == "random":
            logging.disable(max(known, logging.WARNING))  # it warns that weights are random
        return open_clip.create_model(name, force_custom_text=True, **options)
    except Exception as error:  # no network, no such weights, another model's weights
        raise ValueError(f"{setting} {name}: its weights ({weights}) cannot be had: {error}") from error
    finally:
        logging.disable(known)


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradients."""
    training = module.training
    module.eval()
    with torch.no_grad():
        yield
    module.train(training)
